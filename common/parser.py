"""The flags of a script: same names, order and meaning in all of them.

script: a `command_line.Script`.
"""

import argparse
import os

from .datasets import DATASETS
from .errors import UserError
from .flags import number
from .networks.encoders import encoder_options


def build_parser(script, dataset):
    """The parser of a script's flags, with the dials of `dataset`.

    A default of None means "by dataset": the recipe fills it in, see `Command`.
    """
    parser = argparse.ArgumentParser(
        description=script.doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    positive = number(float, 0, open_low=True)
    names = ", ".join(m for m in script.methods if m != "unimodal")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=list(DATASETS), default=script.dataset, help="default: %(default)s")
    add("--data-root", default="data", metavar="DIR", help="where datasets lie (%(default)s)")
    add(
        "--data-seed",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="split, colors, pairing (0)",
    )
    add("--train-samples", type=number(int, 1), metavar="N", help="cap, other splits in proportion")
    add = parser.add_argument_group("method").add_argument
    add(
        "--method",
        nargs="+",
        metavar="NAME",
        help=f"{names}, unimodal-<modality>; default: a comparison, on large data "
        f"{next(iter(script.methods))}",
    )
    several = "%(default)s" if len(script.fusions) > 1 else argparse.SUPPRESS
    add("--fusion", choices=script.fusions, default=script.fusions[0], help=several)
    if "pretrained" in encoder_options(dataset):
        add("--pretrained", action="store_true", help="ResNet-18 starts from ImageNet's weights")
    recipe = script.recipes.get(dataset, script.recipes["features"]).get
    add = parser.add_argument_group(f"training; defaults for {dataset}").add_argument
    epochs = f"passes over the training data ({recipe('epochs')})"
    add("--epochs", type=number(int, 1), metavar="N", help=epochs)
    samples = f"samples of a step ({recipe('batch_size')})"
    add("--batch-size", type=number(int, 1), metavar="N", help=samples)
    add("--optimizer", choices=["sgd", "adam", "adagrad"], default="sgd", help="%(default)s")
    add("--lr", type=positive, metavar="X", help=f"learning rate ({recipe('lr')})")
    momentum = f"of sgd, no other ({recipe('momentum')})"
    add("--momentum", type=number(float, 0, 1), metavar="X", help=momentum)
    decay = f"of the optimizer ({recipe('weight_decay')})"
    add("--weight-decay", type=number(float, 0), metavar="X", help=decay)
    schedule = "of lr; step: a tenth for the last 30 percent; step-70: a tenth every 70 epochs "
    schedule += f"({recipe('schedule')})"
    add("--schedule", choices=["none", "step", "step-70", "cosine"], help=schedule)
    add = parser.add_argument_group("run").add_argument
    add("--seeds", type=number(int, 0), nargs="+", default=[0], metavar="N", help="default: 0")
    add(
        "--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="auto: cuda or cpu"
    )
    threads = "of the CPU; default: 1 where networks are small, as more get in each other's way"
    add("--threads", type=number(int, 1, 1024), metavar="N", help=threads)
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="%(default)s")
    add(
        "--num-workers",
        type=number(int, 0, 256),
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that read files of clips and views; changes no result (%(default)s)",
    )
    add("--out", default="runs", metavar="DIR", help="where runs are written (%(default)s)")
    existing = parser.add_mutually_exclusive_group()
    add = existing.add_argument
    add("--resume", action="store_true", help="go on with unfinished runs")
    add("--overwrite", action="store_true", help="replace existing runs")
    add("--eval-only", action="store_true", help="test checkpoints, write nothing")
    script.add_flags(parser.add_argument_group(f"{script.name}.py").add_argument)
    if DATASETS[dataset].dials:
        add = parser.add_argument_group(f"dials of {dataset}").add_argument
        if DATASETS[dataset].protocols:
            preset = "a release's frames, spectrogram, epochs, rate, schedule; other flags win"
            add("--protocol", choices=list(DATASETS[dataset].protocols), help=preset)
        for name, dial in DATASETS[dataset].dials.items():
            note = dial.help if dial.listed else argparse.SUPPRESS
            add(as_flag(name), type=dial.kind, metavar="X", help=note)
    return parser


def as_flag(name):
    return "--" + name.replace("_", "-")


def as_words(script, settings):
    """{"epochs": 2, "seeds": [0, 1]} -> ["--epochs=2", "--seeds", "0", "1"], for the parser to
    judge; None and False are left out."""
    words = [f"--dataset={settings.get('dataset', script.dataset)}"]
    unknown = sorted(settings.keys() - vars(parse_flags(script, words)).keys())
    if unknown:
        raise UserError(f"{script.name}.py has no {', '.join(map(as_flag, unknown))}.")
    for name, value in settings.items():
        if isinstance(value, (list, tuple)):
            words += [as_flag(name), *map(str, value)]
        elif value is True:
            words.append(as_flag(name))
        elif value is not None and value is not False:
            words.append(f"{as_flag(name)}={value}")
    return words


def dataset_of(argv, default):
    """The dataset that a command line names; a wrong name is left to the parser to refuse."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--dataset", nargs="?", default=default)
    name = first.parse_known_args(argv)[0].dataset
    return name if name in DATASETS else default


def parse_flags(script, argv, namespace=None):
    """argv: a list of words. The flags with their defaults, None where a recipe has the default."""
    dataset = dataset_of(argv, script.dataset)
    parser = build_parser(script, dataset)
    args, rest = parser.parse_known_args(argv, namespace)
    for word in rest:
        flag = word.split("=")[0]
        if flag == "--experiment":
            name = "compare" if script.name == "baselines" else script.name
            raise UserError(
                "Tables and figures have a command of their own: "
                f"python -m experiments.{name} --help."
            )
        if flag == "--pretrained":
            raise UserError(f"There are no pretrained weights for {dataset}; leave out {flag}.")
        dials = {dial for known in DATASETS.values() for dial in (*known.dials, "protocol")}
        if flag in map(as_flag, dials):
            raise UserError(f"The dataset {dataset} has no dial {flag}; leave it out.")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def given_flags(script, argv):
    """What a command line gives, without any default: a dict of settings for `Command`."""
    unset = object()
    names = vars(parse_flags(script, ["--dataset", dataset_of(argv, script.dataset)]))
    args = parse_flags(script, argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name: value for name, value in vars(args).items() if value is not unset}


def shared_knobs(dataset):
    """Names of the shared flags that decide a run's result, whatever the script."""
    own = ["data"] if DATASETS[dataset].own else []
    own += ["pretrained"] if "pretrained" in encoder_options(dataset) else []
    return [
        *("dataset", *own, "data_seed", "train_samples", *DATASETS[dataset].dials),
        *("method", "fusion", "epochs", "batch_size", "optimizer", "lr", "momentum"),
        *("weight_decay", "schedule", "precision"),
    ]
