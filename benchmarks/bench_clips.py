"""Benchmark of loading clips for training: samples per second against the usual per-item way.

    python benchmarks/bench_clips.py            # about five minutes

Clips of CREMA-D's dimensions with made-up, photograph-like frames: 480 x 360 pixels, three frames
each, 2.5 seconds of sound at 16 kHz; OGM-GE's spectrogram, three frames cropped to 224, batch 64.
The usual way, plain_clips.py beside it, decodes the stored frames and resamples and transforms the
sound at each access. Ours reads what data/prepare.py leaves: JPEGs with a short side of 256 pixels.
Both have the same number of workers; ours ends with floats of the whole batch on the CPU.

(a) ours / usual way, with frames decoded from the prepared JPEGs.
(b) The same with --frame-cache 1.
(c) What the first epoch costs, which also computes the spectrograms and fills the cache: the
    first epoch of (b) / an epoch of the usual way.
(d) Private memory of a process after as many batches from four times as many clips, less that
    from the fewer: what grows with the clips.
(e) With a GPU: the share of an epoch of ResNet-18 training, from the cache, that is spent waiting
    for data: 1 - time of as many steps on one batch that stays on the GPU / time of the epoch.

An epoch is timed in wall time from its start with idle workers to its last batch. (a) and (b) are
medians of interleaved pairs.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
import common  # noqa: F401  first, as in the scripts: it sets how torch takes memory, for both sides

# isort: split
import fake_clips
import plain_clips
from bench_pmr import ROWS, interleave, ratios, report
from PIL import Image

from common.datasets import load_dataset
from common.networks.multimodal import build_model
from common.optimizer import build_optimizer
from common.seeding import make_generator
from common.storage import write_json

BATCH = 64
ROOMS = sys.path[:3]  # of the project, for another process
FEW, MANY = 256, 1024  # clips of (d)


def write_both(root, clips):
    """The same clips in `root`/usual/crema-d at their stored size, and in `root`/ours prepared."""
    usual = fake_clips.write_community(
        root / "usual", (clips, 2), counts=(3,), shape=(360, 480), seconds=2.5
    )
    ours = fake_clips.write_prepared(
        root / "ours", "crema-d", (clips, 1, 1), counts=(3,), shape=(256, 341), seconds=2.5
    )
    sources = sorted((usual / "Image-01-FPS").glob("train*/*.jpg"))
    for source, target in zip(sources, sorted(ours.glob("frames/train*/*.jpg")), strict=True):
        Image.open(source).resize((341, 256), Image.Resampling.BICUBIC).save(target, quality=90)
    return usual


def our_splits(root, workers, frame_cache, size=224, device="cpu"):
    dials = {"spectrogram": "ogm-ge", "num_frames": 3, "frame_cache": frame_cache}
    dials["image_size"] = size
    return load_dataset("crema-d", root / "ours", device=device, num_workers=workers, **dials)


def our_epochs(root, workers, frame_cache, size=224):
    """A function that runs through an epoch of training batches."""
    splits = our_splits(root, workers, frame_cache, size)
    generator = make_generator("benchmark")

    def epoch():
        for inputs, _, _ in splits.train.batches(BATCH, generator, augment=True):
            assert inputs["visual"].shape[1:] == (3, 3, size, size)
            assert inputs["audio"].shape[1:] == (1, 257, 188)

    return epoch


def usual_epochs(folder, workers):
    loader = plain_clips.make_loader(folder, BATCH, workers)

    def epoch():
        for audio, frames, _ in loader:
            assert frames.shape[1:] == (3, 3, 224, 224)
            assert audio.shape[1:] == (1, 257, 188)

    return epoch


def seconds(epoch):
    start = time.perf_counter()
    epoch()
    return time.perf_counter() - start


def waiting_share(root, workers, device, epochs=5):
    """(e), in percent, of each of `epochs` epochs after a first one."""
    splits = our_splits(root, workers, frame_cache=1, device=device)
    config = SimpleNamespace(
        dataset="crema-d", modalities=splits.modalities, fusion="concat", seed=0
    )
    vars(config).update(device=device, pretrained=False, optimizer="sgd", lr=1e-3, momentum=0.9)
    config.weight_decay = 1e-4
    model = build_model(config, splits)
    optimizer = build_optimizer(model.parameters(), config)
    generator = make_generator("benchmark")

    def train(batches):
        start = time.perf_counter()
        for inputs, labels, _ in batches:
            logits, _ = model(inputs)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(logits, labels).backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    shares = []
    kept = list(splits.train.batches(BATCH, generator, augment=True))
    for _ in range(1 + epochs):
        loaded = train(splits.train.batches(BATCH, generator, augment=True))
        shares.append(100 * (1 - train(kept) / loaded))
    return shares[1:]


PRIVATE_MEMORY = """
import sys
sys.path[:0] = sys.argv[1:4]
from pathlib import Path
import torch
torch.set_num_threads(1)
import bench_clips
epoch = bench_clips.our_epochs(Path(sys.argv[4]), 0, 1, size=32)
for _ in range(int(sys.argv[5])):
    epoch()
status = Path("/proc/self/status").read_text()
print(status.split("RssAnon:")[1].split()[0])
"""


def private_memory(clips):
    """MB of a process that has read so many small clips again and again from a full frame cache."""
    with tempfile.TemporaryDirectory() as root:
        root = Path(root)
        fake_clips.write_prepared(root / "ours", "crema-d", (clips, 1, 1), shape=(120, 160))
        arguments = [*ROOMS, str(root), str(2 * MANY // clips)]
        command = [sys.executable, "-c", PRIVATE_MEMORY, *arguments]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed is given back
        for _ in range(2):  # the first one fills the cache
            kibibytes = int(subprocess.check_output(command, text=True, env=environment))
    return kibibytes * 1024 / 1e6


def main():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--clips", type=int, default=256, metavar="N", help="%(default)s")
    parser.add_argument("--pairs", type=int, default=20, metavar="N", help="%(default)s")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="%(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {options.workers} workers, {options.pairs} pairs\n")
    print(f"{'':47}{'median':>8}     {'range':20}target")
    with tempfile.TemporaryDirectory() as root:
        usual = usual_epochs(write_both(Path(root), options.clips), options.workers)
        usual()
        open_ours = partial(our_epochs, Path(root), options.workers)
        cached = open_ours(frame_cache=1)
        first = seconds(cached) / seconds(usual)
        ways = {"(a) from JPEGs": (open_ours(frame_cache=0), 2), "(b) from the cache": (cached, 4)}
        for name, (ours, target) in ways.items():
            times = interleave(usual, ours, options.pairs, clock=time.perf_counter)
            report(f"{name}: ours / usual way", ratios(times), (">=", target))
            for side, column in zip(("usual way", "ours"), zip(*times, strict=True), strict=True):
                report(f"    {side}", [options.clips / s for s in column], unit=" /s")
        report("(c) first epoch / epoch of the usual way", [first])
        if torch.cuda.is_available():
            shares = waiting_share(Path(root), options.workers, "cuda")
            report("(e) GPU: waiting for data", shares, ("<=", 5), " %")
    growth = private_memory(MANY) - private_memory(FEW)
    report(f"(d) {MANY} clips less {FEW}", [growth], ("<=", 5), " MB")
    if options.json:
        write_json(options.json, {"pairs": options.pairs, "rows": ROWS})


if __name__ == "__main__":
    main()
