"""What distillation costs: an epoch of UMT against an epoch of joint training.

    python benchmarks/bench_umt.py [--pairs 20] [--device cpu] [--json FILE]

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
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

import umt_ume
from common.datasets import TensorSplit
from common.device import forward, pick_device
from common.networks.multimodal import build_model
from common.optimizer import build_optimizer
from common.storage import write_json

SHAPES = {"gray": (1, 28, 28), "color": (3, 28, 28)}
SAMPLES, WEIGHT = 640, 10.0
SETTINGS = {"dataset": "cg-mnist", "fusion": "concat", "pretrained": False, "precision": "fp32"}
SETTINGS |= {"optimizer": "sgd", "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}


def build_epochs(device):
    """Kind of epoch -> a function that trains one and gives its seconds."""
    config = SimpleNamespace(**SETTINGS, modalities=tuple(SHAPES), seed=0, device=device)
    splits = SimpleNamespace(shapes=SHAPES, num_classes=10)
    model = build_model(config, splits)
    optimizer = build_optimizer(model.parameters(), config)
    data = {m: torch.rand(SAMPLES, *shape, device=device) for m, shape in SHAPES.items()}
    labels = torch.randint(10, (SAMPLES,), device=device)
    plain = TensorSplit(data, labels, dict)
    augmented = TensorSplit(data, labels, dict, augment=lambda inputs, generator: inputs)
    config.seed = 1
    teachers = umt_ume.Teachers(build_model(config, splits).encoders)
    clock = time.process_time if device.type == "cpu" else time.perf_counter

    def seconds(targets):
        start = clock()
        model.train()
        for inputs, truth, index in plain.batches(64, torch.Generator().manual_seed(0)):
            logits, features = forward(model, inputs, config)
            loss = F.cross_entropy(logits, truth)
            if targets:
                loss = loss + WEIGHT * umt_ume.distillation(features, targets(inputs, index))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        loss.item()  # waits for the device
        return clock() - start

    looked_up = umt_ume.find_targets(teachers, plain, config)
    computed = umt_ume.find_targets(teachers, augmented, config)
    targets = {"joint": None, "cached": looked_up, "computed": computed}
    return {kind: lambda t=found: seconds(t) for kind, found in targets.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write the table to this file too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, rows = pick_device(args.device), []
    epochs = build_epochs(device)
    epochs["joint"]()  # warm up
    for kind, target in {"cached": 1.05, "computed": 1.5}.items():
        ratios = [epochs[kind]() / epochs["joint"]() for _ in range(args.pairs)]
        row = {"measure": f"UMT epoch, teacher features {kind} / joint epoch"}
        row["value"] = f"{statistics.median(ratios):.3f}"
        row["range"] = f"{min(ratios):.3f} to {max(ratios):.3f}"
        rows.append({**row, "target": f"<= {target}"})
        print("{measure}: {value} ({range}), target {target}".format(**rows[-1]), flush=True)
    if args.json:
        write_json(args.json, {"device": str(device), "pairs": args.pairs, "rows": rows})


if __name__ == "__main__":
    main()
