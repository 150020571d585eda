"""What distillation costs: an epoch of UMT against an epoch of joint training.

    python tests/bench_umt.py [--pairs 20] [--device cpu] [--json FILE]

On cg-mnist's shapes at batch 64 in float32, on one thread, with the network of umt_ume.py. Teacher
features are looked up, or, as where data are augmented, computed in every step. Printed are medians
of the ratios of interleaved pairs with their range, in CPU time (on a GPU in wall time, the device
waited for). The data are random: no data set is needed.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import umt_ume
from common.datasets import TensorSplit
from common.rebalance import build_rival
from common.training import build_optimizer, pick_device, write_json

SAMPLES = 640


class Bench:
    """A network, data, teachers, and the three kinds of epoch on them."""

    def __init__(self, device):
        self.config = SimpleNamespace(
            dataset="cg-mnist",
            method="umt",
            fusion="concat",
            seed=0,
            device=device,
            pretrained=False,
        )
        self.config.precision, self.config.distill_weight = "fp32", 10.0
        shapes = {"gray": (1, 28, 28), "color": (3, 28, 28)}
        splits = SimpleNamespace(modalities=tuple(shapes), shapes=shapes, num_classes=10)
        self.model = umt_ume.build_model(self.config, splits)
        data = {m: torch.rand(SAMPLES, *shape, device=device) for m, shape in shapes.items()}
        labels = torch.randint(10, (SAMPLES,), device=device)
        self.data = TensorSplit(data, labels, dict)
        augmented = TensorSplit(data, labels, dict, augment=lambda inputs, generator: inputs)
        self.rival = build_rival(self.model, self.data, 10, self.config)
        self.optimizer = build_optimizer("sgd", self.model.parameters(), 1e-3, 1e-4)
        self.config.seed = 1
        teachers = umt_ume.Teachers(umt_ume.build_model(self.config, splits).encoders)
        self.targets = {
            "joint": None,
            "cached": umt_ume.find_targets(teachers, self.data, self.config),
            "computed": umt_ume.find_targets(teachers, augmented, self.config),
        }

    def seconds(self, kind):
        """Time of an epoch."""
        on_cpu = self.config.device.type == "cpu"
        clock = time.process_time if on_cpu else time.perf_counter
        start = clock()
        batches = self.data.batches(64, torch.Generator().manual_seed(0))
        umt_ume.train_epoch(
            self.model, self.rival, self.targets[kind], self.optimizer, batches, self.config
        )  # waits for the device at its end
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
    bench.seconds("joint")  # warm up
    rows = []
    for kind, target in {"cached": 1.05, "computed": 1.5}.items():
        pairs = [(bench.seconds(kind), bench.seconds("joint")) for _ in range(args.pairs)]
        ratios = [umt / joint for umt, joint in pairs]
        rows.append(
            {
                "measure": f"UMT epoch, teacher features {kind} / joint epoch",
                "value": f"{statistics.median(ratios):.3f}",
                "range": f"{min(ratios):.3f} to {max(ratios):.3f}",
                "target": f"<= {target}",
            }
        )
        print("{measure}: {value} ({range}), target {target}".format(**rows[-1]), flush=True)
    if args.json:
        write_json(args.json, {"device": str(device), "pairs": args.pairs, "rows": rows})


if __name__ == "__main__":
    main()
