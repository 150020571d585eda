"""How much faster all runs of a configuration train together than one by one.

    python benchmarks/bench_toy.py [--runs 50] [--pairs 3]

For each regime and dataset, `train` of toy_projection.py is timed on R runs at once and on the same
runs in turn (set A, intermediate fusion, joint training), in CPU time on one thread. Printed is the
median of the ratios of interleaved pairs, with their range, for each dataset and, as the target is
one for a regime, for the sum of both.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import toy_projection as toy

TARGETS = {"table1": 15, "overtrained": 5}


def train(dataset, regime, seeds):
    """CPU seconds to train the runs of `seeds` together."""
    cell = {"dataset": dataset, "set": "A", "fusion": "intermediate", "method": "joint", "heads": 1}
    config = SimpleNamespace(**regime | cell, seeds=seeds, device=torch.device("cpu"))
    splits = toy.draw_splits(dataset, config.noise, seeds)
    t, y = toy.observe(splits, config)["train"]
    network = toy.build_network(config)
    start = time.process_time()
    toy.train(network, t, y, config)
    return time.process_time() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=20, help="pairs of each regime and dataset")
    parser.add_argument("--share", type=float, default=0.05, help="share of the regime's epochs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds = list(range(args.runs))
    for name, target in TARGETS.items():
        times = {dataset: measure(dataset, name, seeds, args) for dataset in toy.SETS}
        pairs = zip(*times.values(), strict=True)
        times["both"] = [tuple(map(sum, zip(*pair, strict=True))) for pair in pairs]
        for dataset, found in times.items():
            ratios = [alone / together for alone, together in found]
            print(
                f"{name:12s} {dataset:11s} {args.runs} runs one by one / together: "
                f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
                + (f", target at least {target}" if dataset == "both" else ""),
                flush=True,
            )


def measure(dataset, name, seeds, args):
    """CPU seconds of the runs one by one and together, for every pair."""
    regime = toy.REGIMES[name][dataset]
    regime = {**regime, "epochs": max(1, round(args.share * regime["epochs"]))}
    train(dataset, regime, seeds)  # warm up
    pairs = []
    for _ in range(args.pairs):
        together = train(dataset, regime, seeds)
        pairs.append((sum(train(dataset, regime, [seed]) for seed in seeds), together))
    return pairs


if __name__ == "__main__":
    main()
