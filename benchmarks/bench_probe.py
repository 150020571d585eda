"""Benchmark of the linear probe: how long it takes, and how near it is to a converged one.

    python benchmarks/bench_probe.py --data-root DIR --json results/probe_bench.json   # ten minutes

On the encoders of a network that `baselines.py --method joint` has trained for a few epochs: the
CPU time of `linear_probe` on all modalities over that of a training epoch, and how many points its
test accuracy lies from that of scikit-learn's logistic regression of the same objective, which gets
as long as it needs. One thread.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import baselines
from common.command_line import Command
from common.evaluation import predict
from common.metrics import accuracy, linear_probe
from common.networks.multimodal import build_model
from common.run import Run
from common.tables import format_text

EPOCHS = {"digits": 20, "synthetic": 30, "av-digits": 4, "cg-mnist": 1}


def train(dataset, data_root, out):
    """Features of the training and test split, and the CPU time of a training epoch."""
    settings = {"dataset": dataset, "epochs": EPOCHS[dataset], "lr": 0.01, "method": ["joint"]}
    command = Command(baselines.SCRIPT, {**settings, "data_root": data_root, "out": out})
    config = next(command.configs())
    model, start = build_model(config, command.splits), time.process_time()
    baselines.train(Run(config), model, command.splits, config)
    seconds = (time.process_time() - start) / config.epochs
    with torch.no_grad():
        found = (predict(model, getattr(command.splits, x), config) for x in ("train", "test"))
        return *found, command.splits.modalities, seconds


def measure(dataset, data_root):
    """A row for each modality."""
    with tempfile.TemporaryDirectory() as out:
        seen, unseen, modalities, epoch = train(dataset, data_root, out)
    rows, total = [], 0.0
    for m in modalities:
        linear_probe(seen[m][:100], seen["labels"][:100], 10)  # warm
        start = time.process_time()
        classify = linear_probe(seen[m], seen["labels"], 10)
        total += time.process_time() - start
        own = accuracy(classify(unseen[m]), unseen["labels"])
        x, x_test = (found[m].double().numpy() for found in (seen, unseen))
        reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10**5, tol=1e-6))
        reference.fit(x, seen["labels"].numpy())
        converged = 100 * reference.score(x_test, unseen["labels"].numpy())
        rows.append({"dataset": dataset, "samples": len(x), "modality": m, "probe": f"{own:.2f}"})
        rows[-1] |= {"converged": f"{converged:.2f}", "difference": f"{own - converged:+.2f}"}
    share = f"{total:.2f} s / {epoch:.2f} s = {total / epoch:.3f}"
    return [{**row, "all probes / training epoch": share} for row in rows]


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--data-root", default="data", metavar="DIR")
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for dataset in EPOCHS for row in measure(dataset, options.data_root)]
    print(format_text(rows))
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
