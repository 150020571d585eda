"""Splits of a dataset that stays in files: frames and recordings, read as uint8 and float32 rows.

A prepared folder has manifest.json, clips.csv, frames/<id>/0001.jpg, ... and audio/<id>.wav; see
data/README.md. Everything that is drawn at random for a sample comes from the seed in its request,
so the number of worker processes changes no result.
"""

import csv
import hashlib
import json
import os
import random
import wave
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader

from ..errors import UserError
from ..flags import Dial, number
from ..seeding import derive_seed, make_generator
from .base import Splits, TensorSplit

DIALS = {
    "frame_cache": Dial(0, number(int, 0, 1), "1 keeps decoded frames on disk, for speed (0)"),
    "image_size": Dial(224, number(int, 32, 4096), "height and width of frames and views (224)"),
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in RGB

# ---- What lies in a folder ----


class Listing(NamedTuple):
    """The samples of a dataset: all that grows with their number.

    ids: (N,) strings; labels: (N,) int64; counts: (N,) frames of each; splits: name -> rows (n,);
    version: changes with the files, where data/prepare.py does not look after the cache.
    """

    folder: Path
    frames: str
    audio: str
    classes: list
    ids: np.ndarray
    labels: torch.Tensor
    counts: np.ndarray
    splits: dict
    version: tuple = ()

    @property
    def digest(self):
        """Changes with the samples: part of the names of what is kept of them on disk."""
        return f"{derive_seed(*self.ids, *self.counts, *self.version):016x}"


def identify(name, root):
    """Tells folders apart: how they were split, and the start of their lists' SHA-256.

    None where there is nothing, or something damaged: `load` says what is wrong.
    """
    folder = Path(root) / name
    community = is_community(folder)
    lists = ("train.csv", "test.csv") if community else ("manifest.json", "clips.csv")
    try:
        contents = [(folder / file).read_bytes() for file in lists]
        manifest = {} if community else json.loads(contents[0])
        kind = "fake" if manifest.get("fake") else manifest.get("options", {}).get("split", "lists")
    except (OSError, ValueError, AttributeError):
        return None
    return f"{kind}-{hashlib.sha256(b''.join(contents)).hexdigest()[:8]}"


def is_community(folder):
    """Whether `folder` is the tree of OGM-GE's and PMR's users, not one of data/prepare.py."""
    return (folder / "Image-01-FPS").exists() and not (folder / "manifest.json").exists()


def read_listing(folder, name):
    """The listing of a folder that `data/prepare.py` made of the dataset `name`."""
    command = f"`python data/prepare.py {name} --source DIR --out {folder}`"
    if not (folder / "manifest.json").exists():
        raise UserError(
            f"There is no prepared {name} in {folder}; run {command}, or name the folder above it "
            "by --data-root."
        )
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if (manifest["dataset"], manifest["format"]) != (name, 1):
            raise ValueError(f"it is of {manifest['dataset']}, format {manifest['format']}")
        classes = manifest["classes"]
        with open(folder / "clips.csv", newline="", encoding="utf-8") as file:
            clips = list(csv.DictReader(file))
        numbers = {str(number): number for number in range(len(classes))}
        labels = [numbers[clip["label"]] for clip in clips]
        counts = [int(clip["frames"]) for clip in clips]
        ids = [clip["id"] for clip in clips]
        split = np.array([clip["split"] for clip in clips])
        if unknown := set(split.tolist()) - {"train", "val", "test"}:
            raise ValueError(f"no split is called {unknown.pop()}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"manifest.json or clips.csv in {folder} is damaged ({reason}); run {command} again."
        ) from error
    splits = {part: np.flatnonzero(split == part) for part in ("train", "val", "test")}
    return make_listing(folder, "frames", "audio", classes, ids, labels, counts, splits)


def make_listing(folder, frames, audio, classes, ids, labels, counts, splits):
    """A `Listing`; UserError for a split without samples or a sample without frames."""
    for name, rows in splits.items():
        if len(rows) == 0:
            raise UserError(f"{folder} lists no {name} samples; prepare it anew.")
    empty = [id for id, count in zip(ids, counts, strict=True) if count < 1]
    if empty:
        raise UserError(
            f"{folder / frames} has no frames of {len(empty)} of {len(ids)} samples, such as "
            f"{empty[0]}; extract them, or take these samples out of the lists."
        )
    splits = {name: torch.as_tensor(rows) for name, rows in splits.items()}
    ids, counts = np.array(ids), np.array(counts)
    return Listing(folder, frames, audio, classes, ids, torch.tensor(labels), counts, splits)


# ---- One file ----


def read_wav(path, sample_rate):
    """16-bit mono WAV of `sample_rate` Hz -> float32 samples in [-1, 1]."""
    try:
        with wave.open(str(path)) as file:
            layout = file.getframerate(), file.getnchannels(), file.getsampwidth()
            data = file.readframes(file.getnframes())
            if len(data) != file.getnframes() * file.getnchannels() * file.getsampwidth():
                raise EOFError("it is cut off")
    except (wave.Error, EOFError, OSError) as error:
        raise UserError(
            f"{path} is no readable WAV file ({error}); fetch or prepare it anew."
        ) from error
    samples = np.frombuffer(data, dtype="<i2") if layout[2] == 2 else ()
    if layout != (sample_rate, 1, 2) or len(samples) == 0:
        raise UserError(
            f"{path} should be 16-bit mono at {sample_rate} Hz with sound; fetch or prepare it "
            "anew."
        )
    return torch.from_numpy(samples.astype(np.float32) / 32768)


def read_image(path):
    """JPEG or PNG -> (H, W, 3) uint8."""
    try:
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB")))
    except (OSError, SyntaxError) as error:  # PIL raises a SyntaxError on a broken PNG
        raise UserError(f"{path} is no readable image; fetch or prepare it anew.") from error


def resize(image, height, width):
    """(H, W, 3) uint8 -> (height, width, 3), bilinear with antialiasing, as PIL does."""
    image = image.unsqueeze(0).permute(0, 3, 1, 2)  # channels last in memory: the fast kernel
    image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return image.permute(0, 2, 3, 1).squeeze(0)


class DiskRows:
    """A file of `count` rows that are computed once, when first asked for, and memory-mapped.

    A row is an array of `shape` and a tag, a number other than 0. Several processes may fill the
    file at a time; a row counts when its tag is written, after all the rest.
    """

    def __init__(self, path, count, shape, dtype):
        self.path, self.count, self.shape = path, count, shape
        self.layout = np.dtype([("tag", "<f4"), ("values", dtype, shape)])
        try:
            path.parent.mkdir(exist_ok=True)
            with open(path, "ab") as file:
                file.truncate(count * self.layout.itemsize)
        except OSError as error:
            self.refuse(error)

    def refuse(self, error):
        raise UserError(
            f"Cannot write {self.path} ({error}); make room, or link the data into a folder that "
            "can be written."
        ) from error

    @cached_property
    def rows(self):
        return np.memmap(self.path, self.layout, mode="r+", shape=(self.count,))

    def __getstate__(self):  # for worker processes: a memmap would be copied whole
        return {name: value for name, value in self.__dict__.items() if name != "rows"}

    def get(self, row, compute):
        """(tag, values) of `row`; `compute()` gives them if the file does not have them yet."""
        if self.rows["tag"][row] == 0:
            tag, values = compute()
            start = row * self.layout.itemsize
            try:  # not through the map, where a full disk would kill the process
                with open(self.path, "r+b") as file:
                    for name, value in (("values", values), ("tag", np.float32(tag))):
                        file.seek(start + self.layout.fields[name][1])
                        file.write(np.asarray(value).tobytes())
                        file.flush()
            except OSError as error:
                self.refuse(error)
        return float(self.rows["tag"][row]), self.rows["values"][row]


# ---- Batches of files ----


def full_box(aspect, rng):
    """(top, left, height, width) as shares of the frame: all of it."""
    return 0.0, 0.0, 1.0, 1.0


def center_box(aspect, ratio=1.0, share=1.0):
    """`share` of the largest box of width / height = `ratio` in a frame of `aspect`."""
    height, width = share * min(1, aspect / ratio), share * min(1, ratio / aspect)
    return (1 - height) / 2, (1 - width) / 2, height, width


def crop_box(aspect, rng):
    """Training: torchvision's RandomResizedCrop. Evaluation: 224 of 256 pixels at the center."""
    if rng is None:
        return center_box(aspect, share=224 / 256)
    for _ in range(10):
        area, ratio = rng.uniform(0.08, 1), (4 / 3) ** rng.uniform(-1, 1)
        height, width = (area / ratio * aspect) ** 0.5, (area * ratio / aspect) ** 0.5
        if height <= 1 and width <= 1:
            return rng.uniform(0, 1 - height), rng.uniform(0, 1 - width), height, width
    return center_box(aspect, min(max(aspect, 3 / 4), 4 / 3))


def cut(frame, box):
    """The part of a frame (H, W, 3) in a box of shares, in whole pixels."""
    (height, width, _), (top, left, tall, wide) = frame.shape, box
    top, left = round(top * height), round(left * width)
    tall, wide = max(1, round(tall * height)), max(1, round(wide * width))
    return frame[top : top + tall, left : left + wide]


class Files:
    """`files[rows, seeds]` reads a batch; it is what worker processes get a copy of.

    num_frames:   N, and which: pick(frames of a sample, random generator or None) -> N positions.
    box:          box(width / height of a frame, the same generator) -> what to cut out of it.
    frame_side:   shortest side of a frame in the cache, at most that of the files.
    spectrograms: row -> (F, T) float32 array, where there is sound.
    """

    def __init__(
        self, listing, num_frames, pick, box, image_size, frame_cache, frame_side, spectrograms=None
    ):
        self.listing, self.num_frames, self.image_size = listing, num_frames, image_size
        self.pick, self.box, self.spectrograms = pick, box, spectrograms
        self.starts = np.cumsum(listing.counts) - listing.counts
        self.cache = self.open_cache(frame_side) if frame_cache else None

    def open_cache(self, frame_side):
        """Decoded frames, all in the size of the first one: (height, width, 3) uint8."""
        height, width, _ = self.decode(0, 0).shape
        scale = min(1, frame_side / min(height, width))
        shape = (round(scale * height), round(scale * width), 3)
        name = f"frames-{shape[1]}x{shape[0]}-{self.listing.digest}.rows"
        path = self.listing.folder / "cache" / name
        return DiskRows(path, self.listing.counts.sum(), shape, np.uint8)

    def decode(self, row, position):
        """Frame (H, W, 3) at `position` among those of sample `row`, in the order of names."""
        folder = self.listing.folder / self.listing.frames / str(self.listing.ids[row])
        names = frame_names(folder)
        if len(names) != self.listing.counts[row]:
            raise UserError(
                f"{folder} holds {len(names)} frames in place of {self.listing.counts[row]}; "
                "extract them anew."
            )
        return read_image(folder / names[position])

    def frame(self, row, position):
        """The frame's true width / height, and its pixels (H, W, 3) uint8, perhaps stretched."""

        def compute():
            frame = self.decode(row, position)
            aspect = frame.shape[1] / frame.shape[0]
            return aspect, resize(frame, *self.cache.shape[:2]) if self.cache else frame

        if self.cache is None:
            return compute()
        aspect, pixels = self.cache.get(self.starts[row] + position, compute)
        return aspect, torch.from_numpy(pixels)

    def read_frames(self, row, seed, out):
        """Fill `out` (N, S, S, 3) with frames of sample `row`, all cut and flipped alike."""
        rng = None if seed is None else random.Random(seed)
        flip = rng is not None and rng.random() < 0.5
        positions = self.pick(self.listing.counts[row], rng)
        box = None
        for target, position in zip(out, positions, strict=True):
            aspect, frame = self.frame(row, position)
            box = box or self.box(aspect, rng)
            part = resize(cut(frame, box), self.image_size, self.image_size)
            target.copy_(part.flip(1) if flip else part)

    def __getitem__(self, request):
        """{"frames": (B, N, S, S, 3) uint8, "audio": (B, F, T) float32 where there is sound}.

        request: B rows and B seeds; None in place of the seeds asks for evaluation. A UserError is
        returned, for one that is raised leaves a worker process as a traceback.
        """
        rows, seeds = request
        seeds = seeds or [None] * len(rows)
        size = (self.image_size, self.image_size, 3)
        frames = torch.empty(len(rows), self.num_frames, *size, dtype=torch.uint8)
        try:
            for row, seed, out in zip(rows, seeds, frames, strict=True):
                self.read_frames(row, seed, out)
            batch = {"frames": frames}
            if self.spectrograms:
                audio = np.stack([self.spectrograms(row) for row in rows])
                batch["audio"] = torch.from_numpy(audio)
            return batch
        except UserError as error:
            return error


def frame_names(folder):
    """Sorted names of the images in `folder`; none if it is not there."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png")))


class Pass:
    """The sampler of a DataLoader that is used again and again: the requests of the present pass.

    A cycle of references to the DataLoader would make its processes wait when they are to end.
    """

    requests = ()

    def __iter__(self):
        return iter(self.requests)


class Loader:
    """Reads requests from `files` in `num_workers` processes, which all splits share.

    The processes stay alive from epoch to epoch. Two passes at a time do not disturb each other:
    the second one starts its own.
    """

    def __init__(self, files):
        self.files, self.num_workers = files, 0
        self.current, self.shared, self.busy = Pass(), None, False

    def read(self, requests, pin_memory):
        """Yield `files[request]` for every one of `requests`, in order."""
        open_loader = partial(
            DataLoader,
            self.files,
            batch_size=None,  # a request is a whole batch
            num_workers=self.num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else it draws, for nothing, on torch's global one
        )
        if self.busy or self.num_workers == 0:
            yield from open_loader(sampler=requests)
            return
        if self.shared is None:
            self.shared = open_loader(sampler=self.current, persistent_workers=True)
        self.current.requests, self.busy = requests, True
        try:
            yield from self.shared
        finally:
            self.busy = False


class FileSplit(TensorSplit):
    """A split whose tensors only say which `row` of the files a sample is; see `TensorSplit`.

    render: what `Files` gives for a batch, on the device -> inputs, modality -> (B, C, ...) float.
    """

    augmented = True

    def __init__(self, loader, rows, labels, render: Callable):
        super().__init__({"row": rows}, labels, render)
        self.loader = loader

    def batches(self, batch_size, generator=None, augment=False):
        """As `TensorSplit.batches`; `augment` draws frames, crop and flip, also by `generator`."""
        order, device = self.shuffled(generator), self.index.device
        rows, seeds = self.tensors["row"][order].cpu(), None
        if augment:  # before the first batch: others may draw on the generator later
            seeds = torch.randint(2**62, (len(self),), generator=generator)
        parts = (slice(i, i + batch_size) for i in range(0, len(self), batch_size))
        requests = ((rows[p].tolist(), None if seeds is None else seeds[p].tolist()) for p in parts)
        batches = self.loader.read(requests, pin_memory=device.type == "cuda")
        for index, batch in zip(order.split(batch_size), batches, strict=True):
            if isinstance(batch, UserError):
                batches.close()
                self.loader.shared = None  # ends its processes, which a traceback would keep
                raise batch
            batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
            yield self.render(batch), self.all_labels[index], index


def normalize_frames(frames):
    """(B, N, S, S, 3) uint8 -> (B, 3, N, S, S) float32 in ImageNet's mean and standard deviation.

    In memory the channels stay last.
    """
    shape = frames.shape
    x = frames.flatten(-2).float()  # (B, N, S, 3 S): rows are long enough for vector instructions
    mean, std = (x.new_tensor(value).mul(255).repeat(shape[3]) for value in (MEAN, STD))
    return x.sub_(mean).div_(std).view(shape).permute(0, 4, 1, 2, 3)


def make_splits(listing, files, render, modalities, data_seed):
    """Splits in random order, for `head` takes the first; val is val_iid."""
    loader = Loader(files)

    def split(name):
        rows = listing.splits[name]
        rows = rows[torch.randperm(len(rows), generator=make_generator(data_seed, name))]
        return FileSplit(loader, rows, listing.labels[rows], render)

    train, val, test = (split(name) for name in ("train", "val", "test"))
    return Splits(train, val, val, test, modalities, len(listing.classes), loader)
