"""How much faster all runs of a configuration train together than one by one.

    python tests/bench_toy.py [--runs 50] [--pairs 3]

For each regime and dataset, `train` of toy_projection.py is timed on R runs at once and on the same
runs in turn (set A, intermediate fusion, joint training), in CPU time on one thread. Printed is the
median of the ratios of interleaved pairs, with their range.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import toy_projection as toy

TARGETS = {"table1": 15, "overtrained": 5}


def train(dataset, regime, seeds):
    """CPU seconds to train the runs of `seeds` together."""
    cpu, lines = torch.device("cpu"), toy.SETS[dataset]["A"]
    x, y = toy.draw_splits(dataset, regime["noise"], seeds, cpu)["train"]
    t = toy.project(x, lines).float()
    network = toy.build_network(
        "intermediate", lines, dataset, regime["hidden"], 1, seeds, cpu, torch.float32
    )
    start = time.process_time()
    toy.train(network, "joint", t, y, regime, seeds)
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of each regime and dataset")
    parser.add_argument("--share", type=float, default=0.05, help="share of the regime's epochs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(args.runs))
    for name, target in TARGETS.items():
        for dataset, regime in toy.REGIMES[name].items():
            regime = {**regime, "epochs": max(1, round(args.share * regime["epochs"]))}
            train(dataset, regime, seeds)  # warm up
            ratios = []
            for _ in range(args.pairs):
                together = train(dataset, regime, seeds)
                ratios.append(sum(train(dataset, regime, [seed]) for seed in seeds) / together)
            median, low, high = statistics.median(ratios), min(ratios), max(ratios)
            print(
                f"{name:12s} {dataset:11s} {args.runs} runs one by one / together: "
                f"{median:.1f} ({low:.1f} to {high:.1f}), target at least {target}",
                flush=True,
            )


if __name__ == "__main__":
    main()
