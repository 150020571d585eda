"""Every method of the scripts and their rivals on the same data, side by side.

    python compare.py                                           # digits, one seed
    python compare.py --dataset synthetic --seeds 0 1 2 3 4
    python compare.py --dataset cg-mnist --seeds 0 1 2 --device cuda
    python compare.py --join runs/compare/*/compare.json        # datasets side by side

Splits, epochs, batches and optimizer are the same for all: those of pmr.py's recipe. So are the
encoders within a network, and the knobs of a method are its own script's. Runs are those of the
scripts, under --out; finished ones are reused and unfinished ones gone on with, so the same command
can be given again and again. Flags that compare.py does not know go to all the scripts. See
docs/compare.md.
"""

import argparse
import json
import math
from pathlib import Path

import torch

import greedy_balance
import mhm
import pmr
import umt_ume
from common.command_line import load_splits, recipe_for, run_command, shared_knobs
from common.datasets import DATASETS
from common.errors import UserError
from common.experiments import (
    as_flags,
    format_markdown,
    format_text,
    lookup,
    made_up,
    paired_differences,
    spread,
)
from common.figures import draw_scatter
from common.rebalance import RIVALS
from common.training import (
    changed_knobs,
    environment,
    make_folder,
    pick_device,
    write_atomically,
    write_figure,
    write_json,
)

JOINED = ("test", "- joint", "balance")
SHARED = ("epochs", "batch_size", "lr", "weight_decay", "schedule")
OWN = {"--method", "--fusion", "--experiment", "--eval-only"}  # compare.py decides on these


def plan(modalities):
    """What to run: (network, script, fusion, methods). A method is known by its network too.

    late:    an encoder for each modality and a fusion head.
    mmtm:    greedy_balance.py's, whose branches exchange gates between their stages.
    modular: mhm.py's, with a layer more between fusion and head.
    """
    alone = [f"unimodal-{m}" for m in modalities]
    late = [*alone, "ume", "joint", *RIVALS, "umt"]
    if len(modalities) != 2:  # PMR, FiLM, the gated head and RUBi are of two modalities
        return [
            ("late", umt_ume, "concat", late),
            ("late", pmr, "sum", ["joint"]),
            ("mmtm", greedy_balance, "mmtm", [*alone, "joint", "random", "guided"]),
            ("modular", mhm, "concat", ["joint", "ensemble", "mhm"]),
        ]
    return [
        ("late", umt_ume, "concat", late),
        ("late", pmr, "concat", ["pmr"]),
        *(("late", pmr, fusion, ["joint"]) for fusion in ("sum", "film", "gated")),
        ("mmtm", greedy_balance, "mmtm", [*alone, "joint", "rubi", "random", "guided"]),
        ("modular", mhm, "concat", ["joint", "ensemble", "mhm"]),
    ]


def shared_flags(args, rest):
    """The flags that all the scripts get: pmr.py's recipe, the dataset's dials, those in `rest`."""
    refused = [word for word in rest if word.split("=")[0] in OWN]
    if refused:
        raise UserError(f"compare.py runs all methods; leave out {refused[0]}.")
    recipe = recipe_for(args.dataset, pmr.RECIPES)
    shared = {knob: recipe[knob] for knob in SHARED}
    dials = {k: v for k, v in DATASETS[args.dataset].dials.items() if v is not None}
    flags = ["--dataset", args.dataset, "--out", args.out, "--seeds", *map(str, args.seeds)]
    flags += [*as_flags(shared | dials), *([] if "--overwrite" in rest else ["--resume"]), *rest]
    for script in (umt_ume, pmr, greedy_balance, mhm):  # a flag that one refuses: before training
        script.parse_args(flags)
    return flags


def run_everything(flags):
    """The summaries of all runs, each with the `network` it is of."""
    args, _ = umt_ume.parse_args(flags)
    modalities = load_splits(args, torch.device("cpu")).modalities
    if len(modalities) < 2:
        raise UserError(f"compare.py needs two modalities at least; {args.dataset} has one.")
    runs = []
    for network, script, fusion, methods in plan(modalities):
        result = script.run_all([*flags, "--fusion", fusion, "--method", *methods])
        runs += [{**run, "network": network} for run in result["runs"]]
    return runs


# ---- The table ----


def tabulate(runs):
    """A row for each network, method and fusion; means over seeds with their standard error."""
    modalities = [m.removeprefix("unimodal-") for m in named(runs) if m.startswith("unimodal-")]
    runs = complete(runs, modalities)
    reference = [run for run in runs if key_of(run) == ("late", "joint", "concat")]
    rows = []
    for key in dict.fromkeys(map(key_of, runs)):
        own = [run for run in runs if key_of(run) == key]
        row = dict(zip(("network", "method", "fusion"), key, strict=True))
        row["test"] = mean(own, "test.accuracy")
        row["- joint"] = difference(runs, key)
        row |= {"best": mean(own, "best.test.accuracy"), "macro-F1": mean(own, "test.macro_f1")}
        row |= {f"{m} probe": mean(own, f"test.{m}.probe") for m in modalities}
        row["balance"] = mean(own, "balance")
        row["time"] = mean(own, "cpu_seconds")["mean"] / mean(reference, "cpu_seconds")["mean"]
        row["parameters"] = own[0]["parameters"]
        rows.append(row)
    return rows


def named(runs):
    """The methods, in order."""
    return list(dict.fromkeys(run["method"] for run in runs))


def key_of(run):
    return run["network"], run["method"], run["fusion"]


def complete(runs, modalities):
    """What a run owes to the uni-modal ones of its seed: UME its encoders, and with UMT the time to
    train them. And its `balance`: of all encoders the lowest probe in percent of that of the
    encoder that was trained alone; in the network `modular`, that of `late`."""
    alone = {
        (run["network"], run["method"].removeprefix("unimodal-"), run["seed"]): run
        for run in runs
        if run["method"].startswith("unimodal-")
    }
    found = []
    for run in runs:
        network = "late" if run["network"] == "modular" else run["network"]
        teachers = {m: alone[network, m, run["seed"]] for m in modalities}
        run = {**run, "test": dict(run["test"])}
        if run["method"] == "ume":
            run["cpu_seconds"] = 0.0
            run["test"] |= {m: teacher["test"][m] for m, teacher in teachers.items()}
        if run["method"] in ("ume", "umt"):
            run["cpu_seconds"] += sum(teacher["cpu_seconds"] for teacher in teachers.values())
        probes = [
            (lookup(run, f"test.{m}.probe"), lookup(teacher, f"test.{m}.probe"))
            for m, teacher in teachers.items()
        ]
        defined = all(own is not None and best for own, best in probes)
        run["balance"] = min(100 * own / best for own, best in probes) if defined else None
        found.append(run)
    return found


def mean(runs, path):
    """{"mean", "standard_error", "n"} of the number at `path`, or None."""
    found = spread([x for x in (lookup(run, path) for run in runs) if x is not None])
    if found:
        found["standard_error"] = found.pop("std") / math.sqrt(found["n"])
    return found


def difference(runs, key):
    """`+1.2 ± 0.3`: test accuracy less that of joint training with the same network and fusion,
    paired by seed; UME is compared with the late fusion by concatenation."""
    network, method, fusion = key
    if method == "joint" or method.startswith("unimodal-"):
        return None
    runs = [{**run, "fusion": run["fusion"] or "concat"} for run in runs]
    runs = [run for run in runs if run["network"] == network]
    found = paired_differences(runs, method, "joint")
    (row,) = (row for row in found if row["fusion"] == (fusion or "concat"))
    error = row["standard_error"]
    return f"{row['mean']:+.1f}" + ("" if error is None else f" ± {error:.1f}")


def readable(rows):
    """Rows as the documents show them."""
    return [
        {
            **row,
            "fusion": row["fusion"] or "-",
            "time": f"{row['time']:.1f}",
            "parameters": f"{row['parameters']:,}",
        }
        for row in rows
    ]


def join(records):
    """The tables of several datasets side by side: test accuracy, difference and balance of each.

    Modalities have another name in every dataset, so those alone are numbered.
    """
    found = {}
    for record in records:
        alone = [m for m in named(record["runs"]) if m.startswith("unimodal-")]
        names = {method: f"modality {i} alone" for i, method in enumerate(alone, start=1)}
        for row in record["rows"]:
            key = row["network"], names.get(row["method"], row["method"]), row["fusion"]
            found.setdefault(key, {})[record["dataset"]] = row
    rows = []
    for key, by_dataset in found.items():
        row = dict(zip(("network", "method", "fusion"), key, strict=True))
        for dataset in (record["dataset"] for record in records):
            own = by_dataset.get(dataset, {})
            row |= {f"{dataset} {column}": own.get(column) for column in JOINED}
        rows.append(row)
    return rows


# ---- Command line ----


def parse_args(argv=None):
    """The flags that are compare.py's own, and the others, which go to the scripts."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", choices=list(DATASETS), default="digits", help="default: %(default)s")
    add("--seeds", type=int, nargs="+", default=[0], metavar="N", help="default: 0")
    add("--join", nargs="+", metavar="FILE", help="put finished compare.json side by side")
    add("--out", default="runs", metavar="DIR", help="where runs are written (%(default)s)")
    return parser.parse_known_args(argv)


def main(argv=None):
    """Run everything, write compare.json, compare.md and compare.png; returns the record."""
    args, rest = parse_args(argv)
    if args.join:
        return write_joined(args, rest)
    flags = shared_flags(args, rest)
    runs = run_everything(flags)
    rows = tabulate(runs)
    shared, defaults = pmr.parse_args(flags)
    names = [knob for knob in shared_knobs(args.dataset) if knob not in ("method", "fusion")]
    arguments = {knob: getattr(shared, knob) for knob in names}
    title = f"All methods on {args.dataset}{made_up(shared)}"
    record = {"title": title, "dataset": args.dataset, "seeds": shared.seeds}
    record |= {"arguments": arguments, **environment(pick_device(shared.device))}
    record |= {"rows": readable(rows), "runs": runs}
    name = "-".join([args.dataset, *changed_knobs(arguments, defaults)])
    folder = Path(args.out) / "compare" / name
    write_record(folder, record)
    write_figure(folder / "compare.png", draw_scatter(title, rows, "balance", "test"))
    print(f"\n{title}: mean ± standard error, seeds {', '.join(map(str, shared.seeds))}\n")
    print(f"{format_text(record['rows'])}\n\nTable and figure: {folder}")
    return record


def write_joined(args, rest):
    """Join the files that `--join` names; returns the record."""
    if rest:
        raise UserError(f"--join trains nothing; leave out {' '.join(rest)}.")
    records = [read_record(Path(name)) for name in args.join]
    names = [record["dataset"] for record in records]
    if len(set(names)) < len(names):
        raise UserError(f"--join takes one file of a dataset, not those of {', '.join(names)}.")
    record = {"title": f"All methods on {', '.join(names)}", "datasets": names}
    record |= {"rows": join(records)}
    folder = Path(args.out) / "compare"
    write_record(folder, record)
    print(f"{format_text(record['rows'])}\n\nTable: {folder}")
    return record


def read_record(path):
    """A compare.json; UserError for a file that is none."""
    try:
        record = json.loads(path.read_text())
        columns = set.intersection(*(set(row) for row in record["rows"]))
        if {"dataset", "runs"} <= record.keys() and {"network", "method", *JOINED} <= columns:
            return record
        reason = "it is no table of one dataset"
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise UserError(f"{path} is no compare.json ({reason}); let compare.py write it anew.")


def write_record(folder, record):
    """compare.json and, of its rows, compare.md."""
    make_folder(folder)
    write_json(folder / "compare.json", record)
    markdown = format_markdown(record["rows"]) + "\n"
    write_atomically(folder / "compare.md", lambda file: file.write(markdown.encode()))


if __name__ == "__main__":
    run_command(main)
