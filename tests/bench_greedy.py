"""What measuring and guiding cost: a guided regular step against a plain joint step.

    python tests/bench_greedy.py [--pairs 20] [--device cpu] [--json FILE]

On the cg-mnist network at batch 128 in float32, on one thread. A joint step is forward, loss,
backward and SGD; a guided regular step also adds to the speeds and to the gate means and asks
whether to re-balance. A re-balancing step is timed beside them. Printed are medians of the ratios
of interleaved pairs with their range, in CPU time (on a GPU in wall time, the device waited for).
The data are random: no data set is needed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import greedy_balance as greedy
from common.training import build_optimizer, pick_device, write_json

TARGET = 1.05


class Bench:
    """A network, a batch, and the three kinds of step on them."""

    def __init__(self, device):
        self.config = SimpleNamespace(
            dataset="cg-mnist",
            method="guided",
            seed=0,
            device=device,
            gate_factor=1.0,
            l1=0.0,
            pretrained=False,
        )
        self.config.gate_mean = "after"
        shapes = {"gray": (1, 28, 28), "color": (3, 28, 28)}
        splits = SimpleNamespace(modalities=tuple(shapes), shapes=shapes, num_classes=10)
        self.model = greedy.build_model(self.config, splits).train()
        self.balance = greedy.Balance(self.model, self.config).to(device)
        self.policy = greedy.Guided(list(shapes), tolerance=float("inf"), window=5)
        self.groups = self.model.parameter_groups()
        self.optimizer = build_optimizer("sgd", self.model.parameters(), 0.01, 0.0)
        self.inputs = {m: torch.rand(128, *shape, device=device) for m, shape in shapes.items()}
        self.labels = torch.randint(10, (128,), device=device)

    def joint(self):
        self.step(None)

    def regular(self):
        self.step(None, guided=True)

    def rebalancing(self):
        self.step("gray")

    def step(self, curated, guided=False):
        gates = self.balance.gate_means.gates(self.model.blocks, curated) if curated else None
        output = self.model(self.inputs, gates=gates)
        loss = greedy.training_loss(
            self.model, output.logits, output.features, self.labels, None, self.config
        )
        self.optimizer.zero_grad()
        loss.backward()
        if guided:
            self.balance.speed.update(self.groups)
            self.balance.gate_means.update(self.model.blocks, output.activations)
        self.optimizer.step()
        if guided:
            self.policy.after_step(self.balance.speed, warm_up=False)


def seconds(step, device, repeats=5):
    """Time of `repeats` steps."""
    on_cpu = device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    if not on_cpu:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(repeats):
        step()
    if not on_cpu:
        torch.cuda.synchronize()
    return clock() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = pick_device(args.device)
    bench = Bench(device)
    bench.regular()  # warm up; the gate means need a regular step
    rows = []
    for name, step in {"guided regular": bench.regular, "re-balancing": bench.rebalancing}.items():
        pairs = [(seconds(step, device), seconds(bench.joint, device)) for _ in range(args.pairs)]
        ratios = [ours / joint for ours, joint in pairs]
        target = f"<= {TARGET}" if name == "guided regular" else "-"
        rows.append(
            {
                "measure": f"{name} step / joint step",
                "value": f"{statistics.median(ratios):.3f}",
                "range": f"{min(ratios):.3f} to {max(ratios):.3f}",
                "target": target,
            }
        )
        print("{measure}: {value} ({range}), target {target}".format(**rows[-1]), flush=True)
    if args.json:
        write_json(args.json, {"device": str(device), "pairs": args.pairs, "rows": rows})


if __name__ == "__main__":
    main()
