"""The tables of the PMR paper, on a dataset of yours.

    python -m experiments.pmr table1 --dataset digits --seeds 0 1 2 3 4

All flags of pmr.py. rows.csv, table.json and figure.png go to
runs/pmr/<dataset>/<experiment>[-<fusion>][-<knob>=<value>]/.
"""

import pmr
from common.command_line import run_command

from .grid import Experiment, Grid, paper_rows

FUSIONS = ("sum", "concat", "film", "gated")  # in the order of the table


def table1(experiment):
    """Table 1: each modality alone, then every fusion with joint training, PMR without PER, PMR."""
    chosen = experiment.methods(["unimodal", "joint", "pmr-no-per", "pmr"])
    alone = [m for m in chosen if m.startswith("unimodal-")]
    fused = [m for m in ("joint", "pmr-no-per", "pmr") if m in chosen]
    fusions = [experiment.given["fusion"]] if "fusion" in experiment.given else FUSIONS
    parts = [{"method": alone}] if alone else []
    if fused:
        parts += [{"method": fused, "fusion": fusion} for fusion in fusions]
    return Grid(
        title=f"Table 1 on {experiment.args.dataset}, test accuracy in percent",
        parts=parts,
        columns=pmr.columns(experiment.modalities),
        pairs=[("pmr", "joint"), ("pmr-no-per", "joint")],
        extend=papers_numbers(experiment),
    )


def papers_numbers(experiment):
    """Table 1's number for a row, where the paper has the dataset; its modalities are numbered."""
    dataset = experiment.args.dataset
    names = {f"unimodal-{m}": f"unimodal-{i}" for i, m in enumerate(experiment.modalities, start=1)}
    printed = {(r["method"], r["fusion"] or None): r.get(dataset) for r in paper_rows("pmr_table1")}
    if not any(printed.values()):
        return lambda row, runs: {}

    def extend(row, runs):
        number = printed.get((names.get(row["method"], row["method"]), row["fusion"]))
        return {"paper": float(number) if number else None}

    return extend


EXPERIMENTS = {"table1": table1}


def main(argv=None):
    """Run the command line; returns the record of the table."""
    experiment = Experiment(pmr, EXPERIMENTS, argv)
    return experiment.run(EXPERIMENTS[experiment.name](experiment))


if __name__ == "__main__":
    run_command(main)
