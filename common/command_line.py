"""The command line that all scripts share: same names, order, meaning; defaults equal if possible.

A default of None means "by dataset": the script's recipe fills it in, see `fill_from_recipe`.
"""

import argparse
import os
import re
import sys

from .datasets import DATASETS, load_dataset
from .datasets.clips import SPECTROGRAMS
from .encoders import encoder_options
from .errors import UserError


def number(kind, low, high=None, open_low=False, infinite=False):
    """An argparse type: a number of `kind` (int or float) from `low` to `high`.

    high:     None is a thousand million for int, anything finite for float.
    open_low: `low` itself is refused; infinite: inf is accepted.
    """
    largest = high or (10**9 if kind is int else sys.float_info.max)

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        accepted = low <= value <= largest or (infinite and value == float("inf"))
        if not accepted or (open_low and value == low):
            bounds = f"above {low}" if open_low else f"at least {low}"
            if high or value > largest:
                bounds += f" and at most {largest:g}"
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} {bounds}, not {text!r}")
        return value

    return parse


def build_parser(docstring, method_help, fusions, experiments):
    """The parser with every shared flag; a script adds its own knobs to it."""
    parser = argparse.ArgumentParser(
        description=docstring,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), default="digits", help="default: %(default)s")
    add("--data-root", default="data", metavar="DIR", help="where datasets lie (%(default)s)")
    add("--data-seed", type=int, default=0, metavar="N", help="split, colors, pairing (0)")
    add("--train-samples", type=number(int, 1), metavar="N", help="cap, other splits in proportion")
    add("--method", nargs="+", metavar="NAME", help=method_help)
    add("--fusion", choices=fusions, help=f"default: {fusions[0]}")
    if experiments:
        add("--experiment", choices=experiments, help="a table or figure of the paper")
    add("--pretrained", action="store_true", help="ResNet-18 starts from ImageNet's weights")
    add("--epochs", type=number(int, 1), metavar="N", help="default: by dataset")
    add("--batch-size", type=number(int, 1), metavar="N", help="default: by dataset")
    add("--optimizer", choices=["sgd", "adam", "adagrad"], default="sgd", help="%(default)s")
    add("--lr", type=number(float, 0, open_low=True), metavar="X", help="default: by dataset")
    add("--weight-decay", type=number(float, 0), metavar="X", help="default: by dataset")
    add("--schedule", choices=["none", "step", "cosine"], help="default: by dataset")
    add("--seeds", type=number(int, 0), nargs="+", default=[0], metavar="N", help="default: 0")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="cuda or cpu")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="%(default)s")
    add(
        "--num-workers",
        type=number(int, 0, 256),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that read frames and sound; changes no result (%(default)s)",
    )
    add("--out", default="runs", metavar="DIR", help="where runs are written (%(default)s)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--resume", action="store_true", help="go on with unfinished runs")
    existing.add_argument("--overwrite", action="store_true", help="replace existing runs")
    existing.add_argument(
        "--eval-only", action="store_true", help="test checkpoints, write nothing"
    )
    add = parser.add_argument_group("dials of the datasets").add_argument
    for dial, defaults in dials().items():
        known = DIALS.get(dial, (type(next(iter(defaults.values()))), "a dial of your own"))
        notes = ", ".join(f"{name} {default}" for name, default in defaults.items())
        notes = notes.replace("None", "by configuration")
        add("--" + dial.replace("_", "-"), type=known[0], metavar="X", help=f"{known[1]} ({notes})")
    return parser


def add_rival_flags(parser):
    """The knobs of the rivals in common/rebalance.py."""
    add = parser.add_argument_group("rival methods").add_argument
    add("--ogm-alpha", type=SIZE, default=0.3, metavar="X", help="of ogm-ge (%(default)s)")
    add(
        "--drop-probability", type=SHARE, default=0.3, metavar="X", help="of modality-dropout (0.3)"
    )
    add(
        "--blend", choices=["offline", "online"], default="offline", help="g-blending (%(default)s)"
    )
    add("--super-epoch", type=number(int, 1), default=5, metavar="N", help="of online blending (5)")


def views(text):
    """An argparse type: numbers with commas, such as 0,6."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be numbers with commas such as 0,6, not {text!r}")
    return text


def spectrogram(text):
    """An argparse type: the name of a recipe."""
    if text not in SPECTROGRAMS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(SPECTROGRAMS)}, not {text!r}")
    return text


SIZE, SHARE = number(float, 0), number(float, 0, 1)
DIALS = {
    "color_variance": (SIZE, "variance of the colors"),
    "visual_energy": (
        number(float, 0, 1, open_low=True),
        "share of the images' PCA energy kept, 1 is clean",
    ),
    "audio_snr": (
        number(float, -100, infinite=True),
        "signal-to-noise ratio in dB, inf is clean",
    ),
    "configuration": (str, "defaults of the dials below: O, N, T or Q"),
    "pair_type": (str, "suppressor or sum-mod"),
    "samples": (number(int, 1, 10**6), "training samples"),
    "noise": (SIZE, "standard deviation of the noise"),
    "augment": (SIZE, "that of fresh noise in every training batch"),
    "easy_size": (SIZE, "size of the easy features"),
    "easy_1": (SHARE, "share of samples with the first modality's easy feature"),
    "easy_2": (SHARE, "and with the second's"),
    "hard": (SHARE, "share of samples with a modality's hard feature"),
    "hard_size_1": (SIZE, "size of the first modality's hard features"),
    "hard_size_2": (SIZE, "and of the second's"),
    "pair_size": (SIZE, "size of the paired features"),
    "nuisance": (SIZE, "what hides a suppressor pair from one modality"),
    "pair_only": (SHARE, "share of samples with paired features only; 0: all have them too"),
    "num_frames": (number(int, 1, 1000), "frames of a clip"),
    "spectrogram": (spectrogram, f"its recipe: {', '.join(SPECTROGRAMS)}"),
    "views": (views, "of the 12 around a shape, each a modality; 0 is front, 6 rear"),
    "frame_cache": (number(int, 0, 1), "1 keeps decoded frames on disk, for speed"),
    "image_size": (number(int, 32, 4096), "height and width of frames and views"),
}


def dials():
    """Every dial of every dataset, in order: dial -> dataset -> default."""
    found = {}
    for name, dataset in DATASETS.items():
        for dial, default in dataset.dials.items():
            found.setdefault(dial, {})[name] = default
    return found


def fill_from_recipe(parser, args, recipe):
    """Replace None by the dataset's or the recipe's default; returns the defaults of all flags.

    recipe: flag -> default for `args.dataset`; it may set the dataset's own dials too.
    """
    own_dials = DATASETS[args.dataset].dials
    foreign = [d for d in dials() if getattr(args, d) is not None and d not in own_dials]
    if foreign:
        flags = ", ".join("--" + dial.replace("_", "-") for dial in foreign)
        raise UserError(f"The dataset {args.dataset} has no dial {flags}; leave it out.")
    if args.eval_only and args.experiment:
        raise UserError(
            "--eval-only writes nothing and --experiment a table; leave one of them out."
        )
    if args.pretrained and "pretrained" not in encoder_options(args.dataset):
        raise UserError(
            f"There are no pretrained weights for {args.dataset}; leave out --pretrained."
        )
    args.seeds = list(dict.fromkeys(args.seeds))  # a seed named twice is still one run
    identify = DATASETS[args.dataset].identify
    args.data = identify(args.data_root) if identify else None
    defaults = {name: parser.get_default(name) for name in vars(args)} | own_dials | recipe
    for name, default in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
    return defaults


def recipe_for(dataset, recipes):
    """The dataset's recipe; one of the user's own has that of `features`."""
    return recipes.get(dataset, recipes["features"])


def shared_knobs(dataset):
    """Names of the shared flags that decide a run's result, whatever the script."""
    own = ["data"] if DATASETS[dataset].identify else []
    own += ["pretrained"] if "pretrained" in encoder_options(dataset) else []
    return [
        *("dataset", *own, "data_seed", "train_samples", *DATASETS[dataset].dials),
        *("method", "fusion", "epochs", "batch_size", "optimizer", "lr", "weight_decay"),
        *("schedule", "precision"),
    ]


def load_splits(args, device):
    """The dataset that the command line names, with its dials."""
    dials = {dial: getattr(args, dial) for dial in DATASETS[args.dataset].dials}
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
        device,
        args.num_workers,
        **dials,
    )


def check_methods(methods, known, dataset):
    """`methods` without repetitions; UserError for one that is not among the `known`."""
    for method in methods:
        if method not in known:
            raise UserError(
                f"There is no method {method!r} for {dataset}; choose from {', '.join(known)}."
            )
    return list(dict.fromkeys(methods))  # a method named twice is still one run


# What torch raises in the middle of its own work, told to the user.
TORCH_ERRORS = {
    "Expected more than 1 value per channel": "BatchNorm cannot learn from a training batch of one "
    "sample at this size; choose another --batch-size, so that no single sample is left over, or "
    "larger images.",
    "DataLoader worker": "A process that reads the files was ended from outside; if memory was "
    "short, choose fewer --num-workers. --resume goes on from the last whole epoch.",
}


def run_command(main):
    """Call `main`; a UserError or Ctrl-C ends with one sentence on stderr, not with a traceback."""
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(f"error: {error}")
    except (ValueError, RuntimeError) as error:
        sentences = [text for words, text in TORCH_ERRORS.items() if words in str(error)]
        if not sentences:
            raise
        sys.exit(f"error: {sentences[0]}")
    except OSError as error:  # a closed pipe or a full disk behind stdout; nothing more goes there
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(
            "\ninterrupted; the same command with --resume (and without --overwrite) goes on from "
            "the last whole epoch"
        )
