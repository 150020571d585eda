"""What every run needs around its algorithm: device, precision, optimizer, and the run folder.

A run leaves behind config.json, metrics.jsonl, summary.json, predictions.npz, curves.png, last.pt
and best.pt. Files are written beside and renamed, so a kill at any moment leaves whole ones, and
`last.pt` is enough to go on: see `Run`.
"""

import json
import math
import os
import platform
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch

from .errors import UserError
from .figures import draw_curves

# ---- Device, precision, optimizer ----


def pick_device(name):
    """`auto`, `cpu`, `cuda` or `mps` -> torch.device; UserError if this machine lacks it.

    `auto` is CUDA where there is one, else the CPU; mps is there to try, nothing was tested on it.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available.get(name, True):
        raise UserError(f"PyTorch finds no {name} device on this machine; use --device cpu.")
    return torch.device(name)


def autocast(device, precision):
    """Context for the network's forward pass: bfloat16 where safe, or nothing for fp32.

    Losses, distances and running means stand outside of it and work on `.float()` values.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def forward(network, inputs, config):
    """Logits (B, C) and features, modality -> (B, D), of a batch, in float32."""
    with autocast(config.device, config.precision):
        logits, features = network(inputs)
    return logits.float(), {m: z.float() for m, z in features.items()}


def build_optimizer(name, parameters, lr, weight_decay, momentum=0.9):
    """SGD with `momentum`, Adam or AdaGrad with torch's other defaults."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay)
    optimizers = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}
    return optimizers[name](parameters, lr, weight_decay=weight_decay)


def scheduled_lr(schedule, lr, epoch, epochs):
    """Learning rate of `epoch` (from 0): `none`; `step` and `cosine` end at a tenth of `lr`.

    step:   a tenth for the last 30 percent of the epochs, as in PMR's released code.
    cosine: half a cosine from lr down to lr / 10.
    """
    if schedule == "step":
        return lr if epoch < 0.7 * epochs else lr / 10
    if schedule == "cosine":
        return lr / 10 + 0.9 * lr * (1 + math.cos(math.pi * epoch / max(1, epochs - 1))) / 2
    return lr


def set_lr(optimizer, lr):
    """Give every parameter group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# ---- Run folder ----


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot make the folder {folder} ({error}); choose another --out."
        ) from error


def write_atomically(path, write):
    """Call `write` with a binary file beside `path`, then rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # half a file must not keep a full disk full
        hint = "Make room or choose another --out."
        if isinstance(error, FileNotFoundError):
            hint = "Is another process training the same run?"
        raise UserError(
            f"Cannot write {path} ({error}); what was saved before is whole. {hint}"
        ) from error


def write_json(path, value):
    write_atomically(path, lambda file: file.write((json.dumps(value, indent=2) + "\n").encode()))


def write_figure(path, figure):
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def read_json(path, key=None):
    """The object in a JSON file, or its part `key`; UserError if it is not there or damaged."""
    try:
        value = json.loads(path.read_text())
        value = dict(value[key] if key else value)
        if not value:
            raise ValueError("it is empty")
        return value
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); start again by --overwrite.") from error


def environment(device):
    """What the numbers may depend on besides the arguments: recorded, never compared."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without history
        commit = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "git_commit": commit,
    }


def changed_knobs(arguments, defaults):
    """["<knob>=<value>", ...] of the arguments that have another value than their default."""
    named = {"script", "dataset", "method", "fusion", "seed"}
    return [
        f"{knob.replace('_', '-')}={value}"
        for knob, value in arguments.items()
        if knob not in named and value != defaults.get(knob)
    ]


def run_name(arguments, defaults):
    """<method>[-<fusion>][-<knob>=<value> where not default]-seed<k>."""
    fusion = [arguments["fusion"]] if arguments.get("fusion") else []
    knobs = changed_knobs(arguments, defaults)
    return "-".join([arguments["method"], *fusion, *knobs, f"seed{arguments['seed']}"])


class Run:
    """One training run: its folder, its history and its checkpoints.

    arguments: everything that decides the result; two runs are the same if these are equal.
    defaults:  the values that the folder's name leaves out.

    args:      the command line's out, resume, overwrite and eval_only.

    A folder that holds a finished run of the same arguments gives `summary`; nothing is trained
    again. One with an unfinished run is refused unless `resume`, one of other arguments always,
    unless `overwrite`. Use:

        run = Run(arguments, defaults, splits.sizes, device, args)
        for epoch in range(run.start(state), epochs):    # state: name -> module or optimizer
            ...
            run.end_epoch(metrics, state)                # metrics["val"]["accuracy"] picks the best
        run.finish(summary, predictions, curves)
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

    def __init__(self, arguments, defaults, sizes, device, args):
        name = run_name(arguments, defaults)
        self.folder = Path(args.out) / arguments["script"] / arguments["dataset"] / name
        self.arguments, self.device = arguments, device
        self.history, self.best, self.summary = [], None, None
        self.seconds_before, self.sitting_start = 0.0, time.perf_counter()
        self.cpu_before, self.cpu_start = 0.0, time.process_time()
        if args.overwrite:
            self.clear()
        if (self.folder / "config.json").exists():
            self.check_same_arguments()
            if (self.folder / "summary.json").exists():
                self.summary = read_json(self.folder / "summary.json")
            elif not args.resume:
                raise UserError(
                    f"{self.folder} holds an unfinished run; go on with it by --resume or start "
                    "again by --overwrite."
                )
        elif args.eval_only:
            raise UserError(f"{self.folder} holds no run; train it first, without --eval-only.")
        elif any((self.folder / name).exists() for name in self.FILES):
            raise UserError(
                f"{self.folder} holds files of a run but no config.json that says of which; "
                "replace them by --overwrite or choose another --out."
            )
        else:
            self.create({"arguments": arguments, "sizes": sizes, **environment(device)})

    def create(self, config):
        make_folder(self.folder)
        write_json(self.folder / "config.json", config)

    @property
    def label(self):
        return self.folder.name

    def clear(self):
        """Remove what an earlier run left in the folder, and nothing else.

        config.json goes first: whatever a kill leaves here is then refused, not taken for a run.
        """
        try:
            for name in self.FILES:
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"Cannot clear the folder {self.folder} ({error}); choose another --out."
            ) from error

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

    def restore(self, state, name):
        """Load checkpoint `name` (last.pt or best.pt) into `state`; returns its epoch.

        state: name -> module or optimizer, all or some of those given to `end_epoch`.
        """
        path = self.folder / name
        try:
            checkpoint = torch.load(path, map_location=self.device, weights_only=True)
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

    def start(self, state):
        """The epoch to begin with: 0, or after that of last.pt, which is loaded into `state`."""
        if not (self.folder / "last.pt").exists():
            return 0
        epoch = self.restore(state, "last.pt")
        self.write_metrics()
        return epoch + 1

    @property
    def seconds(self):
        """Training time so far, in all the sittings of the run."""
        return self.seconds_before + time.perf_counter() - self.sitting_start

    def end_epoch(self, metrics, state):
        """Add `metrics` to the history and save; best.pt is the first best validation epoch.

        best.pt goes first: a kill between the two repeats this epoch, which writes it equal again.
        """
        epoch, score = len(self.history), metrics["val"]["accuracy"]
        self.history.append({"epoch": epoch, **metrics})
        improved = self.best is None or score > self.best["accuracy"]
        if improved:
            self.best = {"epoch": epoch, "accuracy": score}
        checkpoint = {
            "epoch": epoch,
            "history": self.history,
            "best": self.best,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_before + time.process_time() - self.cpu_start,
            "state": {key: holder.state_dict() for key, holder in state.items()},
        }
        for name in ("best.pt", "last.pt") if improved else ("last.pt",):
            write_atomically(self.folder / name, lambda file: torch.save(checkpoint, file))
        self.write_metrics()

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

    def write_metrics(self):
        """metrics.jsonl, always whole from the history that last.pt holds."""
        lines = "".join(json.dumps(entry) + "\n" for entry in self.history)
        write_atomically(self.folder / "metrics.jsonl", lambda file: file.write(lines.encode()))

    def check_finite(self, loss, hint="--lr"):
        """End the run with a sentence if a loss of the present epoch is NaN or infinite.

        hint: flags that a lower value may help of.
        """
        if not math.isfinite(loss):
            epoch = len(self.history)
            kept = f"last.pt of epoch {epoch - 1} is kept" if epoch else "nothing was saved yet"
            raise UserError(
                f"The loss of {self.label} became {loss} in epoch {epoch}; {kept}. Try a lower "
                f"{hint}."
            )

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

    def finish(self, summary, predictions, curves, *steps):
        """Write predictions.npz, curves.png and, last of all, summary.json.

        curves, steps: see `draw_curves`; without curves there is no figure.
        """
        write_atomically(
            self.folder / "predictions.npz", lambda file: np.savez(file, **predictions)
        )
        if curves:
            write_figure(self.folder / "curves.png", draw_curves(self.label, curves, *steps))
        write_json(self.folder / "summary.json", summary)
        self.summary = summary
