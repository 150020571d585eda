"""From flags to the configurations of runs: same names, order, meaning in all scripts.

Flags are what the user types, a recipe is a dataset's defaults, a configuration has the settings of
one run, and its `arguments` are those that decide the result. Nothing here calls a script: `main`
goes through the configurations and trains.
"""

import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch

from .datasets import DATASETS, load_dataset
from .device import pick_device
from .errors import UserError
from .naming import run_name
from .networks.encoders import encoder_options
from .parser import as_flag, as_words, parse_flags, shared_knobs
from .tables import describe, format_text, made_up, tabulate
from .terminal import INTERRUPTED, open_output


class Script(NamedTuple):
    """What a script has, as data: for the command line, the folders of runs, and the experiments.

    methods:  name -> the flags that decide its result, besides those that all scripts have.
              "unimodal" stands for unimodal-<modality>. The first is the paper's, and runs alone
              where data are large.
    compared: what runs beside each modality alone if no method is named.
    fusions:  the first is the default.
    recipes:  dataset -> flag -> default; a function of the flags gives one that depends on others.
    unfused:  the methods that have no fusion.
    legend:   a sentence on the columns of the table, printed below it.
    needs:    method -> the methods whose runs it starts from, or a function of the flags.
    naming:   flag -> what it may say besides the name of a modality.
    prepare:  (flags, splits) -> splits, where a flag of the script changes the data.
    """

    name: str
    doc: str
    methods: dict
    compared: tuple
    fusions: tuple
    recipes: dict
    add_flags: Callable = lambda add: None
    unfused: tuple = ("unimodal",)
    needs: dict = {}  # noqa: RUF012
    naming: dict = {}  # noqa: RUF012
    prepare: Callable = lambda args, splits: splits
    dataset: str = "digits"
    legend: str = ""


# ---- Configurations ----


class Command:
    """A command line: the dataset that it names, and a configuration for each of its runs.

    argv: a list of words, None for those of the process, or a dict of settings (experiments/).
    """

    def __init__(self, script, argv=None):
        self.script = script
        words = sys.argv[1:] if argv is None else argv
        self.args = args = parse_flags(
            script, as_words(script, argv) if isinstance(argv, dict) else words
        )
        args.seeds = list(dict.fromkeys(args.seeds))  # a seed named twice is still one run
        args.device = pick_device(args.device)
        large = "pretrained" in encoder_options(args.dataset)
        if args.threads or not large:
            torch.set_num_threads(args.threads or 1)
        args.pretrained = getattr(args, "pretrained", False)
        dataset = DATASETS[args.dataset]
        self.defaults = self.fill_in(args, dataset)
        splits = self.load_splits(args, dataset)
        args.data = splits.data
        for flag, words in script.naming.items():
            known = (*words, *splits.modalities)
            if getattr(args, flag) not in (None, *known):
                raise UserError(
                    f"There is no modality {getattr(args, flag)!r} in {args.dataset} for "
                    f"{as_flag(flag)}; choose from {', '.join(known)}."
                )
        self.splits = script.prepare(args, splits)
        self.methods = self.choose_methods(args.method, dataset)

    def fill_in(self, args, dataset):
        """Replace None by the protocol's value, else by the recipe's or the dataset's default;
        returns the defaults, without a protocol, of all: names of runs show what it changes."""
        preset = dataset.protocols.get(getattr(args, "protocol", None), {})
        defaults = vars(parse_flags(self.script, ["--dataset", args.dataset]))
        defaults |= {name: dial.default for name, dial in dataset.dials.items()}
        defaults |= self.script.recipes.get(args.dataset, self.script.recipes["features"])
        for name, default in sorted(defaults.items(), key=lambda item: callable(item[1])):
            defaults[name] = default(args) if callable(default) else default
            if getattr(args, name) is None:
                setattr(args, name, preset.get(name, defaults[name]))
        return defaults

    @staticmethod
    def load_splits(args, dataset):
        """The dataset that the command line names, with its dials."""
        dials = {dial: getattr(args, dial) for dial in dataset.dials}
        if dials.get("pair_type") == "sum-mod" and args.fusion in ("concat", "sum"):
            raise UserError(
                f"--fusion {args.fusion} is linear in the features, and no linear head can learn "
                "--pair-type sum-mod; choose another --fusion."
            )
        return load_dataset(
            args.dataset,
            args.data_root,
            args.data_seed,
            args.train_samples,
            args.device,
            args.num_workers,
            **dials,
        )

    def choose_methods(self, named, dataset):
        """The methods to run: those named, else a comparison, or the paper's on large data."""
        known = [m for m in self.script.methods if m != "unimodal"]
        unimodal = self.expand(["unimodal"])
        if not named:
            return [*unimodal, *self.script.compared] if dataset.small else known[:1]
        for method in named:
            if method not in (*known, *unimodal):
                raise UserError(
                    f"There is no method {method!r} for {self.args.dataset}; choose from "
                    f"{', '.join((*known, *unimodal))}."
                )
        return list(dict.fromkeys(named))  # a method named twice is still one run

    def expand(self, methods):
        """`methods` with unimodal-<modality> for each modality in place of "unimodal"."""
        alone = [f"unimodal-{m}" for m in self.splits.modalities]
        return [name for m in methods for name in (alone if m == "unimodal" else [m])]

    def needs(self, method):
        """The methods whose runs `method` starts from."""
        needed = self.script.needs.get(method, ())
        return self.expand(needed(self.args) if callable(needed) else needed)

    def configs(self, methods=None):
        """A configuration for each seed and method, those that another one needs before it."""
        methods = self.methods if methods is None else methods
        needed = [] if self.args.eval_only else [n for m in methods for n in self.needs(m)]
        first = [m for m in dict.fromkeys(needed) if m not in methods]
        ordered = sorted(methods, key=lambda m: m not in needed)
        for seed in self.args.seeds:
            for method in (*first, *ordered):
                yield self.config(method, seed)

    def config(self, method, seed):
        """The flags, with `method`, `seed`, `modalities`; `arguments` are what decides the result.

        What a run needs but nobody named is never overwritten.
        """
        config = SimpleNamespace(**vars(self.args) | {"method": method, "seed": seed})
        config.modalities, config.num_classes = self.splits.modalities, self.splits.num_classes
        kind = "unimodal" if method.startswith("unimodal-") else method
        if kind == "unimodal":
            config.modalities = (method.removeprefix("unimodal-"),)
        if kind in self.script.unfused:
            config.fusion = None
        if method not in self.methods and not config.eval_only:
            config.overwrite, config.resume = False, True
        knobs = [*shared_knobs(config.dataset), *self.script.methods[kind]]
        config.arguments = {"script": self.script.name, "seed": seed}
        config.arguments |= {knob: getattr(config, knob) for knob in knobs}
        config.defaults, config.sizes = self.defaults, self.splits.sizes
        config.needs = [self.config(m, seed) for m in self.needs(method)]
        for needed in config.needs:  # its turn was before: it is finished, only read, or refused
            needed.overwrite = needed.resume = False
        return config

    def report(self, summaries, columns, digits=None):
        """Print a row for each method named, what they say, and where the runs and a picture are.

        columns: title -> where the number stands in a summary; digits: title -> decimals.
        Returns {"runs": summaries, "table": rows}, or the only summary.
        """
        args = self.args
        runs = [run for run in summaries if run["method"] in self.methods]
        table = tabulate(runs, columns, digits)
        print(f"\n{args.dataset}{made_up(args.data)}, test split", end="")
        print(", percent; best: at the best validation epoch\n")
        print(f"{format_text(table)}\n")
        text = " ".join([*describe(runs, self.script.methods), self.script.legend])
        print("\n".join([*textwrap.wrap(text, 100), ""]))
        folder = Path(args.out) / self.script.name / args.dataset
        print(f"Runs: {folder}")
        configs = [self.config(run["method"], run["seed"]) for run in runs]
        names = [run_name(config.arguments, config.defaults) for config in configs]
        pictures = [folder / name / "curves.png" for name in names]
        for picture in [path for path in pictures if path.exists()][-1:]:
            print(f"One of them by epoch: {picture}")
        return runs[0] if len(runs) == 1 else {"runs": runs, "table": table}


# ---- Running ----

# What torch raises in the middle of its own work, told to the user.
TORCH_ERRORS = {
    "Expected more than 1 value per channel": "BatchNorm cannot learn from a training batch of one "
    "sample at this size; choose another --batch-size, so that no single sample is left over, or "
    "larger images.",
    "without overflow": "A number became too large for float32; try a lower --lr, or a lower "
    "weight of the method's own terms.",
    "allocate": "There is too little memory; choose a smaller --batch-size, or smaller samples.",
    "DataLoader worker": "A process that reads the files was ended from outside; if memory was "
    "short, or shared memory (docker run --shm-size), choose fewer --num-workers. --resume goes on "
    "from the last whole epoch.",
}


def run_command(main):
    """Call `main`; a UserError or Ctrl-C ends with one sentence on stderr, not with a traceback."""
    open_output()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except (ValueError, RuntimeError, MemoryError) as error:
        sentences = [text for words, text in TORCH_ERRORS.items() if words in str(error)]
        if not sentences:
            raise
        sys.exit(f"error: {sentences[0]}")
    except OSError as error:  # a closed pipe or a full disk behind stdout; nothing more goes there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
