"""One training run: its epochs, its batches, and what it leaves in its folder.

A run leaves behind config.json, metrics.jsonl, summary.json, predictions.npz, curves.png, last.pt
and best.pt. Files are written beside and renamed, so a kill at any moment leaves whole ones, and
`last.pt` is enough to go on: see `Run`.
"""

import math
import sys
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch

from .checks import check_checkpoint, check_summary, read_checkpoint
from .curves import draw_curves
from .device import environment
from .errors import UserError
from .lock import hold, release
from .naming import run_name
from .optimizer import scheduled_lr, set_lr
from .progress import Progress
from .seeding import seed_phase
from .storage import (
    make_folder,
    parse_json,
    read_json,
    refuse_another,
    strict,
    to_json,
    write_atomically,
    write_figure,
    write_json,
    write_text,
)
from .tables import lookup


class Run:
    """A run's folder, epochs, history and checkpoints.

        run = Run(config)                                # config: see `command_line.Command`
        for epoch in run.epochs(state):                  # state: name -> module or optimizer
            for inputs, labels, index in run.batches(splits.train, optimizer):
                ...
            run.end_epoch({"train": ..., "val": ...})    # val.accuracy picks the best epoch
        run.finish(summary, predictions, curves)

    Two runs are the same if their `config.arguments` are equal. A folder that holds a finished run
    of the same arguments gives `summary`; one with an unfinished run is refused unless `resume`,
    one of other arguments always, unless `overwrite`. A resumed run goes on after its last whole
    epoch and draws what it would have drawn. Nothing is written before the first epoch; from then
    on the folder is this process's own, see lock.py.
    """

    FILES = (
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "predictions.npz",
        "curves.png",
        "last.pt",
        "best.pt",
    )

    def __init__(self, config):
        self.config, self.arguments = config, config.arguments
        self.label = run_name(config.arguments, config.defaults)
        self.folder = Path(config.out) / self.arguments["script"] / config.dataset / self.label
        self.remedy = f"start that run again by --method {self.arguments['method']} --overwrite"
        self.history, self.best, self.summary = [], None, None
        self.seconds_before, self.sitting_start = 0.0, time.perf_counter()
        self.cpu_before, self.cpu_start = 0.0, time.process_time()
        self.opened = (self.folder / "config.json").exists() and not config.overwrite
        if self.opened:
            found = read_json(self.folder / "config.json", "arguments", self.remedy)
            refuse_another(self.folder, found, self.arguments)
            if (self.folder / "summary.json").exists():
                self.summary = self.read_summary()
            elif not config.resume:
                raise UserError(
                    f"{self.folder} holds an unfinished run; go on with it by --resume or start "
                    "again by --overwrite."
                )
        elif config.eval_only:
            raise UserError(f"{self.folder} holds no run; train it first, without --eval-only.")
        elif not config.overwrite and any((self.folder / name).exists() for name in self.FILES):
            raise UserError(
                f"{self.folder} holds files of a run but no config.json that says of which; "
                "replace them by --overwrite or choose another --out."
            )

    def open(self):
        """Take the folder for this process, and make it in place of what an earlier run left in it.

        config.json goes first: whatever a kill leaves here is then refused, not taken for a run.
        """
        make_folder(self.folder)
        hold(self.folder)
        there = [(self.folder / name).exists() for name in ("config.json", "summary.json")]
        if not self.config.overwrite and there != [self.opened, False]:
            raise UserError(
                f"Another process has trained in {self.folder} meanwhile; run the command again."
            )
        files = [self.folder / name for name in self.FILES]
        for path in files:
            if path.is_dir():
                raise UserError(
                    f"{path} is a folder, and a run writes a file of that name; move it away or "
                    "choose another --out."
                )
        unfinished = [half for path in files for half in self.folder.glob(f"{path.name}.*.tmp")]
        try:
            for path in unfinished if self.opened else (*files, *unfinished):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot clear the folder {self.folder} ({error}); choose another --out."
            ) from error
        if not self.opened:
            config = {"arguments": self.arguments, "sizes": self.config.sizes}
            write_json(self.folder / "config.json", config | environment(self.config.device))
        self.opened = True

    # ---- Training ----

    def epochs(self, state, samples=None):
        """Yield the epochs that are left, from 0.

        state:   what a checkpoint holds, name -> module or optimizer.
        samples: that an epoch trains on, for the time left; default: the training split.
        """
        config, self.state = self.config, state
        self.open()
        first = 0
        if (self.folder / "last.pt").exists():
            first = self.restore(state, "last.pt") + 1
            self.write_metrics()
            self.report_changes()
        steps = math.ceil((samples or config.sizes["train"]) / config.batch_size)
        self.progress = Progress(self.label, config.epochs, steps, first)
        try:
            for self.epoch in range(first, config.epochs):
                yield self.epoch
        finally:
            self.progress.close()

    def batches(self, split, *optimizers, part=()):
        """(inputs, labels, index) of a shuffled pass over `split`, drawn by (seed, epoch, *part).

        Gives the optimizers the learning rate of the epoch.
        """
        return self.progress(
            self.shuffled(split, "train", self.epoch, *part, optimizers=optimizers)
        )

    def shuffled(self, split, phase, epoch, *part, optimizers=()):
        """The same for another phase of a run, with the learning rate of another epoch."""
        config = self.config
        generator = seed_phase(config.seed, phase, epoch, *part)
        for optimizer in optimizers:
            set_lr(optimizer, scheduled_lr(config.schedule, config.lr, epoch, config.epochs))
        return split.batches(config.batch_size, generator, augment=True)

    def end_epoch(self, metrics):
        """Add `metrics` to the history and save; best.pt is the first best validation epoch.

        best.pt goes first: a kill between the two repeats this epoch, which writes it equal again.
        """
        self.check_finite(metrics["train"]["loss"] + metrics["val"]["loss"])
        epoch, accuracy = len(self.history), metrics["val"]["accuracy"]
        self.history.append({"epoch": epoch, **metrics})
        improved = self.best is None or accuracy > self.best["accuracy"]
        if improved:
            self.best = {"epoch": epoch, "accuracy": accuracy}
        checkpoint = {
            "arguments": self.arguments,
            "epoch": epoch,
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_before + time.process_time() - self.cpu_start,
            "state": {key: holder.state_dict() for key, holder in self.state.items()},
        }
        for name in ("best.pt", "last.pt") if improved else ("last.pt",):
            write_atomically(self.folder / name, lambda file: torch.save(checkpoint, file))
        self.write_metrics()

    def check_finite(self, loss):
        """End the run with a sentence if a loss of the present epoch is NaN or infinite."""
        if not math.isfinite(loss):
            epoch = len(self.history)
            kept = f"last.pt of epoch {epoch - 1} is kept" if epoch else "nothing was saved yet"
            raise UserError(
                f"The loss of {self.label} became {loss} in epoch {epoch}; {kept}. Try a lower "
                "--lr, or a lower weight of the method's own terms."
            )

    @property
    def seconds(self):
        """Training time so far, in all the sittings of the run."""
        return self.seconds_before + time.perf_counter() - self.sitting_start

    def write_metrics(self):
        """metrics.jsonl, always whole from the history that last.pt holds."""
        lines = "".join(to_json(entry) + "\n" for entry in self.history)
        write_text(self.folder / "metrics.jsonl", lines)

    # ---- What is there ----

    def restore(self, state, name):
        """Load checkpoint `name` (last.pt or best.pt) into `state`; returns its epoch.

        state: name -> module or optimizer, all or some of those given to `epochs`.
        """
        path = self.folder / name
        try:
            checkpoint = read_checkpoint(path, self.config.device)
            check_checkpoint(checkpoint, self.arguments, self.config.epochs)
            if checkpoint["epoch"] != self.expected_epoch(name, checkpoint):
                raise ValueError(f"it is of epoch {checkpoint['epoch']}")
            if self.best not in (None, checkpoint["best"]):
                raise ValueError("its best epoch is another one")
            for key, holder in state.items():
                holder.load_state_dict(checkpoint["state"][key])
        except Exception as error:  # a truncated file has many ways to fail
            reason = error if isinstance(error, ValueError) else type(error).__name__
            raise UserError(
                f"{path} is missing, damaged or of another version ({reason}); {self.remedy}."
            ) from error
        self.history, self.best = checkpoint["history"], checkpoint["best"]
        self.seconds_before, self.sitting_start = checkpoint["seconds"], time.perf_counter()
        self.cpu_before, self.cpu_start = checkpoint["cpu_seconds"], time.process_time()
        return checkpoint["epoch"]

    def expected_epoch(self, name, checkpoint):
        """What the summary of a finished run says, else the checkpoint itself."""
        if name == "best.pt":
            return lookup(self.summary or checkpoint, "best.epoch")
        return self.summary["epochs"] - 1 if self.summary else checkpoint["epoch"]

    def report_changes(self):
        """Say where the present sitting may give other numbers than the first one."""
        before, now = read_json(self.folder / "config.json"), environment(self.config.device)
        changed = [
            f"{name} {before.get(name)} then, {now[name]} now"
            for name in ("torch", "device", "threads")
            if before.get(name) != now[name]
        ]
        if changed:
            print(
                f"{self.label} goes on where other things hold ({'; '.join(changed)}): it may not "
                "end bit for bit where the uninterrupted run would have ended.",
                file=sys.stderr,
            )

    def read_summary(self):
        """summary.json of this run; --eval-only makes its numbers anew and takes what is there."""
        path = self.folder / "summary.json"
        summary = read_json(path, remedy=self.remedy)
        try:
            if not self.config.eval_only:
                check_summary(summary, self.arguments)
            return summary
        except ValueError as error:
            raise UserError(
                f"{path} is of another run or version ({error}); {self.remedy}."
            ) from error

    def number(self, path):
        """That at a dotted `path` in the summary of a finished run."""
        value = lookup(self.summary, path)
        if not isinstance(value, (int, float)):
            place = self.folder / "summary.json"
            raise UserError(f"{place} is of another version (see {path}); {self.remedy}.")
        return value

    def read_history(self, *paths):
        """The entries of metrics.jsonl of a finished run, one for each of its epochs; each has a
        number at all the `paths`."""
        path = self.folder / "metrics.jsonl"
        try:
            history = [parse_json(line) for line in path.read_text(encoding="utf-8").splitlines()]
            if [entry["epoch"] for entry in history] != list(range(self.summary["epochs"])):
                raise ValueError("epochs are missing")
            for key, entry in product(paths, history):
                if not isinstance(lookup(entry, key), (int, float)):
                    raise ValueError(f"{key} is missing")
            return history
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); {self.remedy}.") from error

    def read_predictions(self, name):
        """An array of predictions.npz of a finished run."""
        path = self.folder / "predictions.npz"
        try:
            with np.load(path) as arrays:
                found = arrays[name]
            samples = self.config.sizes["val" if name.startswith("val_") else "test"]
            shape = (samples,) if name in ("index", "label") else (samples, self.config.num_classes)
            if name == "val_trace":
                shape = (self.summary["epochs"], *shape)
            if found.shape != shape or found.dtype not in (np.int64, np.float32):
                raise ValueError(f"{name} is {found.dtype} of shape {found.shape}, not {shape}")
            return found
        except Exception as error:  # a damaged zip file has many ways to fail
            raise UserError(f"{path} cannot be read ({error}); {self.remedy}.") from error

    # ---- Its end ----

    def summarize(self, last, best):
        """What every summary holds; last, best: metrics of the test split by last.pt and best.pt.

        After `restore` of last.pt.
        """
        named = ("script", "dataset", "method", "fusion", "seed", "epochs")
        best_epoch = self.best["epoch"]
        return {
            **{key: self.arguments[key] for key in named},
            "seconds": round(self.seconds, 1),
            "cpu_seconds": round(self.cpu_before, 2),  # of training alone, other programs apart
            "val": self.history[-1]["val"],
            "test": last,
            "best": {"epoch": best_epoch, "val": self.history[best_epoch]["val"], "test": best},
        }

    def finish(self, summary, predictions, curves=None, steps=None):
        """Keep the summary and, unless it is only looked at, write it last of all files.

        predictions: name -> tensor, of the test split.
        curves:      panel -> label -> path in the entries of the history; what an entry lacks is
                     left out. steps: a last panel by training step, see `draw_curves`.
        """
        self.summary = strict(summary)
        if self.config.eval_only:
            return
        self.open()
        found = {name: tensor.cpu().numpy() for name, tensor in predictions.items()}
        write_atomically(self.folder / "predictions.npz", lambda file: np.savez(file, **found))
        panels = self.panels(curves or {})
        if panels:
            write_figure(self.folder / "curves.png", draw_curves(self.label, panels, steps))
        write_json(self.folder / "summary.json", summary)
        release(self.folder)

    def panels(self, curves):
        """panel -> label -> values by epoch, of the `curves` that the history has."""
        found = {}
        for panel, paths in curves.items():
            lines = {name: [lookup(x, path) for x in self.history] for name, path in paths.items()}
            lines = {
                name: values for name, values in lines.items() if values and None not in values
            }
            found |= {panel: lines} if lines else {}
        return found
