"""What measuring and guiding cost: a step of guided training against a plain joint step.

    python benchmarks/bench_greedy.py [--pairs 20] [--device cpu] [--json FILE]

On the cg-mnist network at batch 128 in float32, on one thread. Guided steps are those of `train`: a
regular one adds to the speeds and to the gate means and asks whether to re-balance. A joint step is
forward, loss, backward and SGD, and counts what is right. Printed are medians of the ratios of
interleaved pairs with their range, in CPU time (on a GPU in wall time, the device waited for). The
data are random: no data set is needed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import greedy_balance as greedy
from common.datasets import TensorSplit
from common.device import pick_device
from common.evaluation import Totals, count_correct
from common.optimizer import build_optimizer
from common.parser import parse_flags
from common.storage import write_json

SHAPES = {"gray": (1, 28, 28), "color": (3, 28, 28)}
STEPS = 5


class Epoch:
    """In place of a run: one epoch of 1 + STEPS steps, all but the first of which are timed."""

    def __init__(self, data, device):
        self.data, self.device = data, device

    def epochs(self, state):
        yield 1  # past the warm-up

    def batches(self, split, optimizer):
        batch = next(self.data.batches(128))
        for step in range(1 + STEPS):
            if step == 1:
                self.start = self.clock()
            yield batch
        self.seconds = self.clock() - self.start

    def end_epoch(self, entry):
        self.entry = entry

    def clock(self):
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def train_plainly(run, model, config):
    """Joint training that measures nothing."""
    optimizer = build_optimizer(model.parameters(), config)
    totals = Totals(("loss", "accuracy", "gray accuracy", "color accuracy"), config.device)
    model.train()
    for inputs, labels, _ in run.batches(None, optimizer):
        logits, *_ = greedy.forward(model, inputs, config)
        loss = sum(F.cross_entropy(x, labels) for x in logits.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        correct = [count_correct(x, labels) for x in (greedy.fuse(logits), *logits.values())]
        totals.add(len(labels), loss, *correct)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = pick_device(args.device)
    words = ["--dataset", "cg-mnist", "--method", "guided", "--window", str(STEPS)]
    config = SimpleNamespace(**vars(parse_flags(greedy.SCRIPT, words)))
    vars(config).update(greedy.RECIPES["cg-mnist"], method="guided", seed=0, window=STEPS)
    vars(config).update(device=device, modalities=tuple(SHAPES), num_classes=10, pretrained=False)
    inputs = {m: torch.rand(128, *shape, device=device) for m, shape in SHAPES.items()}
    data = TensorSplit(inputs, torch.randint(10, (128,), device=device), dict)
    splits = SimpleNamespace(train=data, val=data.head(2), shapes=SHAPES)
    model = greedy.build_model(config, splits)
    rows = []
    for name, tolerance in {"guided regular": float("inf"), "re-balancing": 0.0}.items():
        config.tolerance, ratios = tolerance, []
        for _ in range(1 + args.pairs):
            guided, joint = Epoch(data, device), Epoch(data, device)
            greedy.train(guided, model, splits, config)
            train_plainly(joint, model, config)
            ratios.append(guided.seconds / joint.seconds)
        curated = guided.entry["steps"]["curated"]
        assert [bool(m) for m in curated] == [False] + [tolerance == 0] * STEPS
        del ratios[0]  # the first pair warms up
        row = {"measure": f"{name} step / joint step", "value": f"{statistics.median(ratios):.3f}"}
        row["range"] = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append(row | {"target": "<= 1.05" if name == "guided regular" else "-"})
        print("{measure}: {value} ({range}), target {target}".format(**rows[-1]), flush=True)
    if args.json:
        write_json(args.json, {"device": str(device), "pairs": args.pairs, "rows": rows})


if __name__ == "__main__":
    main()
