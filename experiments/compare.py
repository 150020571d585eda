"""Every method of the scripts and of baselines.py on the same data, side by side.

    python -m experiments.compare --dataset digits --seeds 0
    python -m experiments.compare --dataset synthetic --seeds 0 1 2 3 4
    python -m experiments.compare --join runs/compare/*/table.json     # datasets side by side

Splits, epochs, batches and optimizer are the same for all: those of pmr.py's recipe. So are the
encoders within a network, and the knobs of a method are its own script's. Runs are those of the
scripts, under --out; finished ones are reused and unfinished ones gone on with, so the same command
can be given again and again. It takes all flags that the scripts share. rows.csv, table.json,
table.md and figure.png go to runs/compare/<dataset>[-<knob>=<value>]/. See docs/compare.md.
"""

import argparse
import math
import sys
from contextlib import suppress
from pathlib import Path

import baselines
import greedy_balance
import mhm
import pmr
import umt_ume
from common.command_line import Command, run_command
from common.device import environment
from common.errors import UserError
from common.naming import changed_knobs, join_name
from common.parser import as_flag, given_flags, shared_knobs
from common.storage import make_folder, read_json, write_figure, write_json, write_text
from common.tables import cell, format_text, lookup, made_up, spread

from .figures import draw_scatter
from .grid import paired_differences, write_rows
from .pages import format_markdown

JOINED = ("test", "- joint", "balance")


def plan(modalities):
    """What to run: (network, script, fusion, methods). A method is known by its network too.

    late:    an encoder for each modality and a fusion head.
    mmtm:    greedy_balance.py's, whose branches exchange gates between their stages.
    modular: mhm.py's, with a layer more between fusion and head.
    """
    alone = [f"unimodal-{m}" for m in modalities]
    two = len(modalities) == 2  # PMR, FiLM, the gated head and RUBi are of two modalities
    fusions, rubi = (("sum", "film", "gated"), ["rubi"]) if two else (("sum",), [])
    return [
        ("late", umt_ume, "concat", [*alone, "ume"]),
        ("late", baselines, "concat", [m for m in baselines.METHODS if m != "unimodal"]),
        ("late", umt_ume, "concat", ["umt"]),
        *([("late", pmr, "concat", ["pmr"])] if two else []),
        *(("late", baselines, fusion, ["joint"]) for fusion in fusions),
        ("mmtm", greedy_balance, "mmtm", [*alone, "joint"]),
        ("mmtm", greedy_balance, "mmtm", [*rubi, "random", "guided"]),  # rubi needs joint first
        ("modular", mhm, "concat", ["joint", "ensemble", "mhm"]),
    ]


def shared_settings(words):
    """pmr.py's command with its recipe, and the settings that all the scripts get."""
    given = given_flags(pmr.SCRIPT, words)
    own = {knob for flags in pmr.METHODS.values() for knob in flags}
    refused = sorted(given.keys() & {"method", "fusion", "eval_only", *own})
    if refused:
        raise UserError(f"The comparison runs all methods; leave out {as_flag(refused[0])}.")
    command = Command(pmr.SCRIPT, given | {"method": ["joint"]})
    shared = {knob: getattr(command.args, knob) for knob in shared_knobs(command.args.dataset)}
    for knob in ("method", "fusion", "data", "pretrained"):
        shared.pop(knob, None)
    settings = shared | given | ({} if "overwrite" in given else {"resume": True})
    return command, settings


def run_everything(settings, modalities):
    """A flat row for each run, with the `network` it is of."""
    if len(modalities) < 2:
        raise UserError("The comparison needs two modalities at least, and there is one.")
    columns = {"test": "test.accuracy", "best": "best.test.accuracy", "macro-F1": "test.macro_f1"}
    columns |= {f"{m} probe": f"test.{m}.probe" for m in modalities}
    columns |= {"cpu_seconds": "cpu_seconds", "parameters": "parameters"}
    runs = []
    for network, script, fusion, methods in plan(modalities):
        result = script.main({**settings, "fusion": fusion, "method": methods})
        for run in result.get("runs", [result]):
            row = {"network": network, **{k: run[k] for k in ("method", "fusion", "seed")}}
            runs.append(row | {title: lookup(run, path) for title, path in columns.items()})
    return complete(runs, modalities)


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
        run = dict(run)
        if run["method"] == "ume":
            run["cpu_seconds"] = 0.0
            run |= {f"{m} probe": teacher[f"{m} probe"] for m, teacher in teachers.items()}
        if run["method"] in ("ume", "umt"):
            run["cpu_seconds"] += sum(teacher["cpu_seconds"] for teacher in teachers.values())
        probes = [(run[f"{m} probe"], teachers[m][f"{m} probe"]) for m in modalities]
        defined = all(own is not None and best for own, best in probes)
        run["balance"] = min(100 * own / best for own, best in probes) if defined else None
        found.append(run)
    return found


# ---- The table ----


def tabulate(runs):
    """A row for each network, method and fusion; means over seeds with their standard error."""
    modalities = [m.removeprefix("unimodal-") for m in named(runs) if m.startswith("unimodal-")]
    reference = [run for run in runs if key_of(run) == ("late", "joint", "concat")]
    rows = []
    for key in dict.fromkeys(map(key_of, runs)):
        own = [run for run in runs if key_of(run) == key]
        row = dict(zip(("network", "method", "fusion"), key, strict=True))
        row["test"] = mean(own, "test")
        row["- joint"] = difference(runs, key)
        row |= {title: mean(own, title) for title in ("best", "macro-F1")}
        row |= {f"{m} probe": mean(own, f"{m} probe") for m in modalities}
        row["balance"] = mean(own, "balance")
        row["time"] = mean(own, "cpu_seconds")["mean"] / mean(reference, "cpu_seconds")["mean"]
        row["parameters"] = own[0]["parameters"]
        rows.append(row)
    return rows


def named(rows):
    """The methods, in order."""
    return list(dict.fromkeys(row["method"] for row in rows))


def key_of(run):
    return run["network"], run["method"], run["fusion"]


def mean(runs, column):
    """{"mean", "standard_error", "n"} of a column, or None."""
    found = spread([run[column] for run in runs if run[column] is not None])
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
        alone = [m for m in named(record["rows"]) if m.startswith("unimodal-")]
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


def shorten(rows, datasets):
    """Of a joined table a column for each dataset: test accuracy, and the difference to joint
    training in brackets; without other fusions and the uni-modal networks of `mmtm`."""
    found = []
    for row in rows:
        extra = row["network"] == "mmtm" and row["method"].endswith("alone")
        if row["fusion"] in ("-", "concat", "mmtm") and not extra:
            short = {"method": row["method"], "network": row["network"]}
            for dataset in datasets:
                change = row[f"{dataset} - joint"]
                test = row[f"{dataset} test"]
                short[dataset] = cell(test and test | {"n": 1}) + (f" ({change})" if change else "")
            found.append(short)
    return found


# ---- Command line ----


def main(argv=None):
    """Run everything, write rows.csv, table.json, table.md and figure.png; returns the record."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--join", nargs="+", metavar="FILE", help="put finished tables together")
    words = sys.argv[1:] if argv is None else argv
    own, words = parser.parse_known_args(words)
    command, settings = shared_settings(words)
    if own.join:
        return write_joined(own.join, Path(command.args.out) / "compare")
    runs = run_everything(settings, command.splits.modalities)
    return write_comparison(runs, command)


def write_comparison(runs, command):
    """The table of the runs, in <out>/compare/<dataset>[-<knob>=<value>]; returns the record."""
    args, rows = command.args, tabulate(runs)
    knobs = [knob for knob in shared_knobs(args.dataset) if knob not in ("method", "fusion")]
    arguments = {knob: getattr(args, knob) for knob in knobs}
    title = f"All methods on {args.dataset}{made_up(args.data)}"
    record = {"title": title, "dataset": args.dataset, "seeds": args.seeds, "arguments": arguments}
    record |= environment(args.device) | {"rows": readable(rows)}
    name = join_name(args.dataset, *changed_knobs(arguments, command.defaults))
    folder = Path(args.out) / "compare" / name
    write_record(folder, record)
    write_rows(folder / "rows.csv", runs)
    write_figure(folder / "figure.png", draw_scatter(title, rows, "balance", "test"))
    print(f"\n{title}: mean ± standard error, seeds {', '.join(map(str, args.seeds))}\n")
    print(f"{format_text(record['rows'])}\n\nTable and figure: {folder}")
    return record


def write_joined(names, folder):
    """Join the tables in the files `names`; returns the record."""
    records = [read_record(Path(name)) for name in names]
    datasets = [record["dataset"] for record in records]
    if len(set(datasets)) < len(datasets):
        raise UserError(f"--join takes one file of a dataset, not those of {', '.join(datasets)}.")
    record = {"title": f"All methods on {', '.join(datasets)}", "datasets": datasets}
    rows = join(records)
    record |= {"rows": rows, "short": shorten(rows, datasets)}
    write_record(folder, record)
    print(f"{format_text(record['rows'])}\n\nTable: {folder}")
    return record


def read_record(path):
    """A table.json of a comparison; UserError for a file that is none."""
    remedy = "let experiments.compare write it anew"
    record, columns = read_json(path, remedy=remedy), set()
    with suppress(TypeError, LookupError, AttributeError, ValueError):
        format_text(record["rows"])
        [row["test"]["mean"] + row["test"]["n"] for row in record["rows"]]
        shorten(join([record]), [record["dataset"]])
        columns = set.intersection(*(set(row) for row in record["rows"]))
    if isinstance(record.get("dataset"), str) and {"network", "method", *JOINED} <= columns:
        return record
    raise UserError(f"{path} is no table of a comparison; {remedy}.")


def write_record(folder, record):
    """table.json and, of its rows, table.md."""
    make_folder(folder)
    write_json(folder / "table.json", record)
    write_text(folder / "table.md", format_markdown(record["rows"]) + "\n")


if __name__ == "__main__":
    run_command(main)
