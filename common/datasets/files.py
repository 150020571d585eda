"""Reading samples from files: recordings, and frames that are cut out, resized and perhaps kept.

Everything that is drawn at random for a sample comes from the seed in its request, so the number of
worker processes changes no result.
"""

import os
import random
import wave
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import get_worker_info

from ..errors import UserError
from ..flags import Dial, number
from .listing import frame_names

DIALS = {
    "frame_cache": Dial(0, number(int, 0, 1), "1 keeps decoded frames on disk, for speed (0)"),
    "image_size": Dial(224, number(int, 32, 4096), "height and width of frames and views", False),
}

MORE_SHARED_MEMORY = (
    "give it more (docker run --shm-size=8g), or choose fewer --num-workers: --num-workers 0 needs "
    "none."
)
MAX_PIXELS = 40_000_000  # of an image; a frame of 8K video has 33 million

# ---- One file ----


def read_wav(path, sample_rate):
    """16-bit mono WAV of `sample_rate` Hz -> float32 samples in [-1, 1]."""
    try:
        with wave.open(str(path)) as file:
            layout = file.getframerate(), file.getnchannels(), file.getsampwidth()
            size = file.getnframes() * file.getnchannels() * file.getsampwidth()
            whole = size <= Path(path).stat().st_size  # before as much memory is taken
            data = file.readframes(file.getnframes()) if whole else b""
            if len(data) != size:
                raise EOFError("it is cut off")
    except Exception as error:  # a damaged header has many ways to fail
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
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            return torch.from_numpy(np.array(image.convert("RGB")))
    except Exception as error:  # a damaged file has many ways to fail
        raise UserError(
            f"{path} is no readable image ({type(error).__name__}); fetch or prepare it anew."
        ) from error


def resize(image, height, width):
    """(H, W, 3) uint8 -> (height, width, 3), bilinear with antialiasing, as PIL does."""
    image = image.unsqueeze(0).permute(0, 3, 1, 2)  # channels last in memory: the fast kernel
    image = F.interpolate(image, (height, width), mode="bilinear", antialias=True)
    return image.permute(0, 2, 3, 1).squeeze(0)


def open_own(path):
    """Open `path` to read and write: never the file that a link there points to."""

    def opener(name, flags):
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0))

    return open(path, "r+b", buffering=0, opener=opener)


class DiskRows:
    """A file of `count` rows that are computed once, when first asked for.

    A row is an array of `shape` and a tag, a number other than 0. Several processes may fill the
    file at a time; a row counts when its tag is written, after all the rest. What is there and is
    not such a file is replaced by one. Rows are not mapped into memory: where somebody cuts the
    file meanwhile, they are computed again, and a map would kill the process.
    """

    def __init__(self, path, count, shape, dtype):
        self.path, self.shape = path, shape
        self.layout = np.dtype([("tag", "<f4"), ("values", dtype, shape)])
        self.header = f"rows, version 1: {count} of {self.layout}\n".encode()
        self.size = len(self.header) + count * self.layout.itemsize
        try:
            path.parent.mkdir(exist_ok=True)
            if not self.is_whole():
                self.begin()
        except OSError as error:
            self.refuse(error)

    def is_whole(self):
        """Whether the file has the header and the size that it should have."""
        try:
            with open_own(self.path) as file:
                found = file.seek(0, os.SEEK_END), file.seek(0), file.read(len(self.header))
            return found == (self.size, 0, self.header)
        except OSError:
            return False

    def begin(self):
        """Put a file without rows there, in place of any other."""
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        try:
            with open(beside, "xb") as file:
                file.write(self.header)
                file.truncate(self.size)
            beside.replace(self.path)
        finally:
            beside.unlink(missing_ok=True)

    def refuse(self, error):
        raise UserError(
            f"Cannot write {self.path} ({error}); make room, or link the data into a folder that "
            "can be written."
        ) from error

    def get(self, row, compute):
        """(tag, values) of `row`; `compute()` gives them if the file does not have them yet."""
        start = len(self.header) + int(row) * self.layout.itemsize
        found = np.empty(1, self.layout)
        try:
            with open_own(self.path) as file:
                file.seek(start)
                whole = file.readinto(found.view(np.uint8)) == self.layout.itemsize
                if not whole or not 0 < found["tag"] < np.inf:
                    found["tag"], found["values"] = compute()
                    for name in ("values", "tag"):
                        content = found[name].tobytes()
                        file.seek(start + self.layout.fields[name][1])
                        if file.write(content) < len(content):
                            raise OSError("the disk is full")
        except OSError as error:
            self.refuse(error)
        return float(found["tag"][0]), found["values"][0]


# ---- A batch of samples ----


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


def share(batch):
    """`batch` in shared memory; where that is full torch itself would lose it, and wait for it."""
    try:
        return {name: tensor.share_memory_() for name, tensor in batch.items()}
    except RuntimeError as error:
        raise UserError(f"Shared memory is full; {MORE_SHARED_MEMORY}") from error


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

    def num_bytes(self, count):
        """Memory that `count` samples take."""
        sound = np.prod(self.spectrograms.kept.shape) if self.spectrograms else 0
        return count * (self.num_frames * self.image_size**2 * 3 + int(sound) * 4)

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
            return share(batch) if get_worker_info() else batch
        except UserError as error:
            return error
