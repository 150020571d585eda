"""Clips with sound: CREMA-D, AVE and VGGSound, as frames and a spectrogram.

From a folder that `data/prepare.py` made, or for CREMA-D from the tree that users of OGM-GE's and
PMR's code have: train.csv, test.csv, Image-01-FPS/<clip>/*.jpg and AudioWAV/<clip>.wav.
"""

import argparse
import csv
import math
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torchaudio

from ..errors import UserError
from ..flags import Dial, number
from ..seeding import make_generator
from .file_splits import make_splits, normalize_frames
from .files import DIALS, DiskRows, Files, crop_box, read_wav
from .listing import is_community, make_listing, read_listing

MODALITIES = ("audio", "visual")
SAMPLE_RATE = 16_000  # Hz
EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")  # in the order of the released codes

# ---- Spectrograms ----


def repeated(waveform, samples):
    """The waveform over and over, cut to `samples`."""
    return waveform.repeat(math.ceil(samples / len(waveform)))[:samples].clamp(-1, 1)


def pmr_spectrogram(waveform, seconds):
    """PMR's released preprocessing of 10 s, scipy.signal.spectrogram with its defaults: (257, T);
    that CREMA-D's 3 s are made so is inferred from the size that the paper names.

    Power density of windows of 512 samples every 159, each less its mean, under a Tukey window of
    0.25; then the logarithm, standardised over the recording.
    """
    windows = repeated(waveform.double(), seconds * SAMPLE_RATE).unfold(0, 512, 159)
    windows = windows - windows.mean(dim=1, keepdim=True)
    position = torch.arange(512, dtype=torch.float64)
    to_edge = torch.minimum(position, 512 - position).clamp_max(64)
    taper = (1 - (math.pi * to_edge / 64).cos()) / 2
    power = torch.fft.rfft(windows * taper).abs().square() / (SAMPLE_RATE * taper.square().sum())
    power[:, 1:-1] *= 2  # the negative frequencies
    log_power = (power.T + 1e-7).log()
    return (log_power - log_power.mean()) / (log_power.std(correction=0) + 1e-9)


@cache
def resampler():
    """16 to 22.05 kHz by the filter `kaiser_best` of librosa before 0.10.

    In double precision: float32 leaves noise above 8 kHz, where there is nothing to hear, and the
    logarithm shows it. torchaudio's default filter leaves images of the sound there.
    """
    kaiser_best = {"lowpass_filter_width": 64, "rolloff": 0.9475937167399596}
    kaiser_best |= {"beta": 14.769656459379492, "resampling_method": "sinc_interp_kaiser"}
    resample = torchaudio.transforms.Resample
    return resample(SAMPLE_RATE, 22_050, dtype=torch.float64, **kaiser_best)


def ogm_ge_spectrogram(waveform):
    """OGM-GE's released code: three seconds at 22.05 kHz, log magnitude, not standardised.

    Hann windows of 512 samples centered every 353, zeros beyond both ends, as librosa has it since
    0.9: (257, 188).
    """
    waveform = repeated(resampler()(waveform.double()).float(), 3 * 22_050)
    hann = {"window": torch.hann_window(512), "hop_length": 353, "pad_mode": "constant"}
    return (torch.stft(waveform, 512, return_complex=True, **hann).abs() + 1e-7).log()


SPECTROGRAMS = {
    "pmr-3s": (partial(pmr_spectrogram, seconds=3), (257, 299)),
    "pmr-10s": (partial(pmr_spectrogram, seconds=10), (257, 1004)),
    "ogm-ge": (ogm_ge_spectrogram, (257, 188)),
}


def spectrogram(text):
    """An argparse type: the name of a recipe."""
    if text not in SPECTROGRAMS:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(SPECTROGRAMS)}, not {text!r}")
    return text


def dials(num_frames, recipe):
    """The dials of a dataset of clips, with its defaults."""
    return {
        "num_frames": Dial(num_frames, number(int, 1, 1000), f"of a clip ({num_frames})"),
        "spectrogram": Dial(recipe, spectrogram, f"{', '.join(SPECTROGRAMS)} ({recipe})"),
        **DIALS,
    }


# What the released codes of OGM-GE and PMR train with: dataset -> protocol -> flags, in place of a
# recipe's defaults. data/README.md says where each number stands, and what is not copied.
RELEASED = {"batch_size": 64, "lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}
RELEASED |= {"schedule": "step-70"}
PROTOCOLS = {
    "crema-d": {
        "ogm-ge": {**RELEASED, "epochs": 100, "num_frames": 1, "spectrogram": "ogm-ge"},
        "pmr": {**RELEASED, "epochs": 130, "num_frames": 3, "spectrogram": "pmr-3s"},
    },
    "ave": {
        "ogm-ge": {**RELEASED, "epochs": 100, "num_frames": 3, "spectrogram": "pmr-10s"},
        "pmr": {**RELEASED, "epochs": 130, "num_frames": 4, "spectrogram": "pmr-10s"},
    },
}


class Spectrograms:
    """Row of the listing -> spectrogram (257, T) float32, computed once and kept on disk."""

    def __init__(self, listing, recipe):
        self.listing, self.recipe = listing, recipe
        version = {"ogm-ge": "-2"}.get(recipe, "")  # of a recipe whose values were others before
        path = listing.folder / "cache" / f"{recipe}{version}-{listing.digest}.rows"
        self.kept = DiskRows(path, len(listing.ids), SPECTROGRAMS[recipe][1], np.float32)

    def __call__(self, row):
        def compute():
            path = self.listing.folder / self.listing.audio / f"{self.listing.ids[row]}.wav"
            return 1, SPECTROGRAMS[self.recipe][0](read_wav(path, SAMPLE_RATE)).float()

        return self.kept.get(row, compute)[1]


# ---- Frames ----


def pick_frames(num_frames, count, rng):
    """Positions of `num_frames` of `count` frames, in time: evenly in evaluation (no `rng`).

    In training at random, with replacement where the clip has too few.
    """
    if rng is None:
        return [(2 * i + 1) * count // (2 * num_frames) for i in range(num_frames)]
    draw = rng.sample if count >= num_frames else rng.choices
    return sorted(draw(range(count), k=num_frames))


def render(batch):
    """Spectrograms (B, 1, 257, T) and frames (B, 3, N, S, S)."""
    return {"audio": batch["audio"].unsqueeze(1), "visual": normalize_frames(batch["frames"])}


# ---- Folders ----


def read_community(folder, data_seed):
    """The listing of CREMA-D's tree; it has no validation split: a tenth of its training clips of
    every class."""
    rows = []
    for name in ("train", "test"):
        path = folder / f"{name}.csv"
        try:
            with open(path, newline="", encoding="utf-8-sig") as file:
                rows += [(clip, EMOTIONS.index(label), name) for clip, label in csv.reader(file)]
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(
                f"{path} cannot be read ({error}); it should have lines such as "
                "1001_DFA_ANG_XX,ANG."
            ) from error
    ids, labels = [clip for clip, _, _ in rows], [label for _, label, _ in rows]
    train, test = (
        np.flatnonzero([part == name for _, _, part in rows]) for name in ("train", "test")
    )
    generator, val = make_generator(data_seed, "split"), []
    for label in range(len(EMOTIONS)):
        own = train[np.array(labels)[train] == label]
        order = torch.randperm(len(own), generator=generator).numpy()
        val += own[order[: max(1, round(len(own) / 10)) if len(own) > 1 else 0]].tolist()
    splits = {"train": np.setdiff1d(train, val), "val": np.array(sorted(val)), "test": test}
    layout, lists = ("Image-01-FPS", "AudioWAV"), ("train.csv", "test.csv")
    return make_listing(folder, layout, lists, EMOTIONS, ids, labels, splits)


def load(name, root, data_seed, num_frames, spectrogram, frame_cache, image_size):
    """The clips of dataset `name` in `root`/`name`.

    num_frames:  of each clip; with one and with several, visual is (B, 3, N, S, S).
    spectrogram: a name in `SPECTROGRAMS`.
    frame_cache: 1 keeps decoded frames on disk, 256 pixels high for 224: fast, and large.
    image_size:  S.
    """
    folder = Path(root) / name
    community = name == "crema-d" and is_community(folder)
    listing = read_community(folder, data_seed) if community else read_listing(folder, name)
    files = Files(
        listing,
        num_frames,
        partial(pick_frames, num_frames),
        crop_box,
        image_size,
        frame_cache,
        frame_side=round(image_size * 256 / 224),
        spectrograms=Spectrograms(listing, spectrogram),
    )
    return make_splits(listing, files, render, MODALITIES, data_seed)
