"""One training run: its epochs, its batches, and what it leaves in its folder.

A run leaves behind config.json, metrics.jsonl, summary.json, predictions.npz, curves.png, last.pt
and best.pt. Files are written beside and renamed, so a kill at any moment leaves whole ones, and
`last.pt` is enough to go on: see `Run`.
"""

import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch

from .curves import draw_curves
from .device import environment
from .errors import UserError
from .optimizer import scheduled_lr, set_lr
from .progress import Progress
from .seeding import seed_phase
from .storage import make_folder, read_json, write_atomically, write_figure, write_json, write_text
from .tables import lookup

LONGEST_NAME = 150  # of a folder; file systems take 255 bytes


def changed_knobs(arguments, defaults):
    """["<knob>=<value>", ...] of the arguments that have another value than their default."""
    named = {"script", "dataset", "method", "fusion", "seed"}
    return [
        f"{knob.replace('_', '-')}={value}"
        for knob, value in arguments.items()
        if knob not in named and value != defaults.get(knob)
    ]


def join_name(*parts):
    """Words joined by dashes; what is too long for a folder's name ends in a digest of it all."""
    name = "-".join(parts)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def run_name(arguments, defaults):
    """<method>[-<fusion>][-<knob>=<value> where not default]-seed<k>."""
    fusion = [arguments["fusion"]] if arguments.get("fusion") else []
    knobs = join_name(arguments["method"], *fusion, *changed_knobs(arguments, defaults))
    return f"{knobs}-seed{arguments['seed']}"


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
    epoch and draws what it would have drawn. Nothing is written before the first epoch.
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
        self.history, self.best, self.summary = [], None, None
        self.seconds_before, self.sitting_start = 0.0, time.perf_counter()
        self.cpu_before, self.cpu_start = 0.0, time.process_time()
        self.opened = (self.folder / "config.json").exists() and not config.overwrite
        if self.opened:
            self.check_same_arguments()
            if (self.folder / "summary.json").exists():
                self.summary = read_json(self.folder / "summary.json")
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

    def check_same_arguments(self):
        found = read_json(self.folder / "config.json", key="arguments")
        differing = [
            f"{key} {found.get(key)!r} there, {self.arguments.get(key)!r} here"
            for key in sorted(found.keys() | self.arguments.keys())
            if found.get(key) != self.arguments.get(key)
        ]
        if differing:
            raise UserError(
                f"{self.folder} holds a run of another configuration ({'; '.join(differing)}); "
                "replace it by --overwrite or choose another --out."
            )

    def open(self):
        """Make the folder, in place of what an earlier run left in it, and nothing else.

        config.json goes first: whatever a kill leaves here is then refused, not taken for a run.
        """
        if self.opened:
            return
        make_folder(self.folder)
        try:
            for name in self.FILES:
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot clear the folder {self.folder} ({error}); choose another --out."
            ) from error
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
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_text(self.folder / "metrics.jsonl", lines)

    # ---- What is there ----

    def restore(self, state, name):
        """Load checkpoint `name` (last.pt or best.pt) into `state`; returns its epoch.

        state: name -> module or optimizer, all or some of those given to `epochs`.
        """
        path = self.folder / name
        try:
            checkpoint = torch.load(path, map_location=self.config.device, weights_only=True)
            for key, holder in state.items():
                holder.load_state_dict(checkpoint["state"][key])
            self.history, self.best = checkpoint["history"], checkpoint["best"]
            self.seconds_before, self.sitting_start = checkpoint["seconds"], time.perf_counter()
            self.cpu_before, self.cpu_start = checkpoint["cpu_seconds"], time.process_time()
            return checkpoint["epoch"]
        except Exception as error:  # a truncated file has many ways to fail
            raise UserError(
                f"{path} is missing, damaged or of another version ({type(error).__name__}); start "
                f"that run again by --method {self.arguments['method']} --overwrite."
            ) from error

    def read_history(self):
        """The entries of metrics.jsonl of a finished run, one for each of its epochs."""
        path = self.folder / "metrics.jsonl"
        try:
            history = [json.loads(line) for line in path.read_text().splitlines()]
            if [entry["epoch"] for entry in history] != list(range(self.summary["epochs"])):
                raise ValueError("epochs are missing")
            return history
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); start again by --overwrite."
            ) from error

    def read_predictions(self):
        """The arrays of predictions.npz of a finished run."""
        path = self.folder / "predictions.npz"
        try:
            with np.load(path) as arrays:
                return dict(arrays)
        except Exception as error:  # a damaged zip file has many ways to fail
            raise UserError(
                f"{path} cannot be read ({error}); start again by --overwrite."
            ) from error

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
        self.summary = summary
        if self.config.eval_only:
            return
        self.open()
        found = {name: tensor.cpu().numpy() for name, tensor in predictions.items()}
        write_atomically(self.folder / "predictions.npz", lambda file: np.savez(file, **found))
        panels = self.panels(curves or {})
        if panels:
            write_figure(self.folder / "curves.png", draw_curves(self.label, panels, steps))
        write_json(self.folder / "summary.json", summary)

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
