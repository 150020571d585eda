"""Benchmark of pmr.py on cg-mnist (concat, batch 64, fp32): what PMR costs, and our data path.

    python benchmarks/bench_pmr.py --data-root DIR            # about six minutes
    python benchmarks/bench_pmr.py --data-root DIR --only a --device cuda

(a) PMR step / joint step. A step is forward, loss, backward and optimizer step on batches that are
    already drawn, so that nothing dilutes the difference. PCE and PER are both active: in every
    step beta or gamma is checked to be above 0. The joint step is the cross-entropy and nothing
    else; pmr.py's `joint` also watches rho, which would flatter the ratio.
(b) The usual way / ours: joint training with loading. plain_cg_mnist.py, a DataLoader over PIL
    images, against the steps of pmr.py's `train`, which watches rho as in real runs. Both draw
    from 50,000 shuffled images; layers and optimizer are the same. With two workers in wall time,
    as CPU time is spread over processes; a turn starts when they idle with their queue full.
(c) Prototypes from a tenth of the training data, computed once / an epoch of PMR training, which is
    its number of steps times the time of a step with loading. (b) leaves the prototypes out.
(d) Peak resident memory of `python pmr.py --dataset cg-mnist --method pmr --epochs 1` on the CPU, a
    process that trains on the first 50 batches only but loads and evaluates all data. The largest
    of three runs, as the allocator makes them differ.

(a) to (c) are medians over `--pairs` of the ratio of two times that are taken in turn, in one
process with one thread; who begins alternates. The clock is CPU time where no other is named.
`--device cuda` adds to (a): times on the GPU, that no step waits for the GPU, and that the losses
of 20 steps are those of the CPU.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from itertools import cycle, islice
from operator import ge, le
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0"}

import plain_cg_mnist as plain
import torch
import torch.nn as nn
import torch.nn.functional as F

import pmr
from common.command_line import Command
from common.device import forward
from common.evaluation import Totals, count_correct
from common.networks.multimodal import build_model
from common.optimizer import build_optimizer
from common.seeding import make_generator

CHUNK = 10  # batches of a turn in (b) and (c)
MEMORY_RUNS = 3
IDLE_SECONDS = 0.5  # in which two workers fill their queue of four batches

# ---- Measuring ----


def interleave(first, second, pairs, turns=1, clock=time.process_time, before=lambda: None):
    """Seconds of (`first`, `second`) in each pair, summed over its `turns`; one warm-up each."""
    first(), second()
    times = []
    for _ in range(pairs):
        seconds = {first: 0.0, second: 0.0}
        for turn in range(len(times), len(times) + turns):
            for function in (first, second) if turn % 2 == 0 else (second, first):
                before()
                start = clock()
                function()
                seconds[function] += clock() - start
        times.append((seconds[first], seconds[second]))
    return times


def ratios(times):
    return [first / second for first, second in times]


ROWS = []  # what was reported, for --json


def report(name, values, target=None, unit="", summary=statistics.median):
    """Print a line of the table. target: ("<=" or ">=", bound) for the `summary` of `values`."""
    value, bound, verdict = summary(values), "", ""
    if target:
        bound = f"{target[0]} {target[1]}{unit}"
        verdict = "ok" if {"<=": le, ">=": ge}[target[0]](value, target[1]) else "MISSED"
    spread = f"{min(values):.4g} to {max(values):.4g}"
    print(f"{name:47}{value:8.4g}{unit:4} {spread:20}{bound:11}{verdict}".rstrip(), flush=True)
    row = {"measure": name, "value": f"{value:.4g}{unit}", "range": spread, "target": bound or "-"}
    ROWS.append(row)


# ---- Our side ----


class Ours:
    """A run of pmr.py before its first step, made by pmr.py's own functions."""

    def __init__(self, data_root, method, device="cpu"):
        argv = ["--dataset", "cg-mnist", "--data-root", data_root, "--fusion", "concat"]
        command = Command(pmr.SCRIPT, [*argv, "--method", method, "--device", device])
        self.splits, self.config = command.splits, next(command.configs())
        self.model = build_model(self.config, self.splits)
        self.optimizer = build_optimizer(self.model.parameters(), self.config)
        self.subset, self.prototypes = (
            pmr.draw_subset(self.splits.train, self.config),
            nn.ModuleDict(),
        )
        for m, means in self.subset_means().items():
            centers = pmr.Prototypes(10, self.model.encoders[m].dim).to(self.config.device)
            centers.update(*means, self.config.momentum_epsilon)
            self.prototypes[m] = centers
        self.model.train()

    def subset_means(self):
        return pmr.subset_means(self.model, self.subset, self.config)

    def batches(self):
        """One epoch of batches, the same on every device."""
        generator = make_generator("benchmark")
        return self.splits.train.batches(self.config.batch_size, generator, augment=True)

    def train(self, batches):
        """A chunk of `batches` as in pmr.py's `train`."""
        self.model.train()
        totals = Totals(("loss", "accuracy", "rho"), self.config.device)
        for batch in islice(batches, CHUNK):
            logits, loss, rho = self.step(batch)
            totals.add(len(batch[1]), loss, count_correct(logits, batch[1]), rho)
        return totals.means()

    def step(self, batch, plain=False):
        """One step: logits, loss, rho. plain: the cross-entropy and nothing else."""
        inputs, labels, _ = batch
        logits, features = forward(self.model, inputs, self.config)
        loss, rho = F.cross_entropy(logits, labels), None
        if not plain:
            loss, rho = pmr.rebalance(loss, features, labels, self.prototypes, self.config, True)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return logits, loss.detach(), rho


def endless(epoch):
    """Batches of epoch after epoch; `epoch` returns an iterable over one."""
    while True:
        yield from epoch()


# ---- (a) to (d) ----


def compare_steps(name, target, ours, pairs, turns, steps=1, clock=time.process_time):
    """Report PMR step / joint step and the milliseconds of both, over the same batches."""
    drawn = list(islice(ours.batches(), 50))
    batches, rhos = {"pmr": cycle(drawn), "joint": cycle(drawn)}, []

    def pmr_steps():
        rhos.extend(ours.step(batch)[2] for batch in islice(batches["pmr"], steps))

    def joint_steps():
        for batch in islice(batches["joint"], steps):
            ours.step(batch, plain=True)

    times = interleave(pmr_steps, joint_steps, pairs, turns, clock)
    beta, gamma = pmr.coefficients(torch.stack(rhos), ours.config.coefficients)
    assert ours.config.alpha > 0 and ours.config.mu > 0
    assert (torch.maximum(beta, gamma) > 0).all(), "PMR was not active in every step"
    report(f"(a) PMR step / joint step{name}", ratios(times), target)
    for side, seconds in zip(("PMR", "joint"), zip(*times, strict=True), strict=True):
        report(f"    {side} step", [1000 * s / turns / steps for s in seconds], unit=" ms")


def measure_steps(options):
    """(a) on the CPU."""
    compare_steps("", ("<=", 1.03), Ours(options.data_root, "pmr"), options.pairs, turns=10)


def measure_steps_on_gpu(options):
    """(a) on the GPU."""
    cpu, gpu = (Ours(options.data_root, "pmr", device) for device in ("cpu", "cuda"))
    losses = [[run.step(b)[1].item() for b in islice(run.batches(), 20)] for run in (cpu, gpu)]
    differences = [abs(on_cpu - on_gpu) for on_cpu, on_gpu in zip(*losses, strict=True)]
    report("(a) |loss on cuda - on CPU|, largest of 20", differences, ("<=", 1e-3), summary=max)

    batches = gpu.batches()
    next(batches)  # the order of the epoch is copied to the GPU here, once, and that waits
    torch.cuda.set_sync_debug_mode("error")
    for batch in islice(batches, 5):
        gpu.step(batch)
    torch.cuda.set_sync_debug_mode("default")
    print("(a) cuda: no step waited for the GPU, drawing its batch included")

    def clock():
        torch.cuda.synchronize()
        return time.perf_counter()

    compare_steps(", cuda, wall time", None, gpu, options.pairs, turns=1, steps=50, clock=clock)


def measure_usual_way(options, workers, clock):
    """(b)"""
    ours, model = Ours(options.data_root, "joint"), plain.TwoBranchNet()
    sizes = [sum(p.numel() for p in network.parameters()) for network in (model, ours.model)]
    assert sizes[0] == sizes[1], f"not the same network: {sizes} parameters"
    optimizer = build_optimizer(model.parameters(), ours.config)
    colors = torch.rand(60_000, 3, generator=make_generator("benchmark")).numpy()
    size = ours.config.batch_size, workers, len(ours.splits.train)
    loader = plain.make_loader(options.data_root, colors, *size)
    usual, batches = endless(partial(iter, loader)), endless(ours.batches)

    def train_usual():
        plain.train_epoch(model, islice(usual, CHUNK), optimizer)

    wait = partial(time.sleep, IDLE_SECONDS if workers else 0)
    train_ours = partial(ours.train, batches)
    times = interleave(train_usual, train_ours, options.pairs, clock=clock, before=wait)
    name = f"(b) usual way / ours, {workers} workers" + (", wall time" if workers else "")
    report(name, ratios(times), None if workers else (">=", 1.3))


def measure_prototypes(options):
    """(c)"""
    ours = Ours(options.data_root, "pmr")
    train = partial(ours.train, endless(ours.batches))
    times = interleave(ours.subset_means, train, options.pairs)
    chunks = len(ours.splits.train) / ours.config.batch_size / CHUNK  # in an epoch
    shares = [ratio / chunks for ratio in ratios(times)]
    report("(c) prototypes / training epoch", shares, ("<=", 0.05))


SHORT_RUN = """
import resource, sys
from itertools import islice
import pmr
batches = pmr.Run.batches
pmr.Run.batches = lambda *arguments: islice(batches(*arguments), 50)
pmr.main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def measure_memory(options):
    """(d) To be first: Linux starts a child's ru_maxrss at the peak that its parent had so far."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    flags = ["--dataset", "cg-mnist", "--method", "pmr", "--epochs", "1", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(Path(pmr.__file__).parent)}
    peaks = []
    for _ in range(MEMORY_RUNS):
        with tempfile.TemporaryDirectory() as out:
            command = [sys.executable, "-c", SHORT_RUN, *flags, "--out", out]
            command += ["--data-root", options.data_root]
            output = subprocess.check_output(command, env=environment, text=True)
        kibibytes = int(output.split()[-1])
        assert kibibytes > before, "this process has had more memory than the run it measures"
        peaks.append(1024 * kibibytes / 1e9)
    name = f"(d) peak resident memory, largest of {MEMORY_RUNS} runs"
    report(name, peaks, ("<=", 1.5), " GB", summary=max)


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--data-root", default="data", metavar="DIR", help="folder above MNIST")
    parser.add_argument("--pairs", type=int, default=20, metavar="N", help="%(default)s")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="%(default)s")
    parser.add_argument("--only", choices=["a", "b", "c", "d"], help="default: all four")
    parser.add_argument("--json", metavar="FILE", help="write the table there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = [
        ("d", measure_memory),  # first, see there
        ("a", measure_steps),
        ("b", partial(measure_usual_way, workers=0, clock=time.process_time)),
        ("b", partial(measure_usual_way, workers=2, clock=time.perf_counter)),
        ("c", measure_prototypes),
    ]
    if options.device == "cuda":
        parts.insert(2, ("a", measure_steps_on_gpu))
    print(f"torch {torch.__version__}, one thread, {options.pairs} pairs\n")
    print(f"{'':47}{'median':>8}     {'range':20}target")
    for name, part in parts:
        if options.only in (None, name):
            part(options)
    if options.json:
        Path(options.json).write_text(json.dumps({"rows": ROWS}, indent=2) + "\n")


if __name__ == "__main__":
    main()
