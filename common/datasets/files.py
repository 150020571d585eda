"""Reading samples from files: recordings, and frames that are cut out, resized and perhaps kept.

Everything that is drawn at random for a sample comes from the seed in its request, so the number of
worker processes changes no result.
"""

import random
import wave
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..errors import UserError
from ..flags import Dial, number
from .listing import frame_names

DIALS = {
    "frame_cache": Dial(0, number(int, 0, 1), "1 keeps decoded frames on disk, for speed (0)"),
    "image_size": Dial(224, number(int, 32, 4096), "height and width of frames and views", False),
}

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
