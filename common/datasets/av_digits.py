"""Spoken and written digits: a recording and an image of the same digit, both degraded.

Recordings are the Free Spoken Digit Dataset, images MNIST. The AV-MNIST of the literature
(Vielzeuf et al., CentralNet, 2018) keeps a quarter of the images' PCA energy and adds noise to the
sound, because clean digits are nearly solved by either modality alone; both dials are here.
"""

from collections import Counter
from itertools import product
from pathlib import Path

import torch
import torchaudio

from ..errors import UserError
from ..flags import Dial, number
from ..seeding import make_generator
from .base import Splits, TensorSplit
from .colored_digits import load_mnist
from .files import read_wav

MODALITIES = ("audio", "visual")
SAMPLE_RATE = 8000  # Hz
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
TAKES = range(50)  # of each digit by each speaker
DIALS = {
    "visual_energy": Dial(
        0.25,
        number(float, 0, 1, open_low=True),
        "share of the images' PCA energy kept, 1 is clean (0.25)",
    ),
    "audio_snr": Dial(
        -9.0,
        number(float, -100, infinite=True),
        "signal-to-noise ratio in dB, inf is clean (-9)",
    ),
}


def render(rows):
    """Log-mel spectrograms and images, both stored as float32: (B, 1, 32, 32), (B, 1, 28, 28)."""
    return {"audio": rows["audio"].unsqueeze(1), "visual": rows["visual"].unsqueeze(1)}


def split_of_take(take):
    """FSDD's own rule: takes 0 to 4 of a speaker's digit are test. Here 5 to 9 are validation."""
    return "test" if take < 5 else "val" if take < 10 else "train"


def add_noise(waveform, snr, generator):
    """One second, zero-padded or cut, with white noise `snr` dB below the recording's power."""
    waveform = waveform[:SAMPLE_RATE]
    power = waveform.square().mean()
    second = torch.zeros(SAMPLE_RATE)
    second[: len(waveform)] = waveform
    if snr > 300:  # also inf; float32 could not hold such noise
        return second
    noise = torch.randn(SAMPLE_RATE, generator=generator)
    return second + noise * (power / 10 ** (snr / 10)).sqrt()


def log_mel(waveforms):
    """(N, 8000) -> (N, 32, 32): 32 mel bands, 32 frames of 64 ms, one every 32 ms."""
    spectrogram = torchaudio.transforms.MelSpectrogram(
        SAMPLE_RATE, n_fft=512, hop_length=256, n_mels=32
    )
    return (spectrogram(waveforms) + 1e-6).log()


def keep_energy(images, train_images, energy):
    """Project on the fewest principal components of `train_images` that hold `energy` of theirs.

    images: (N, 28, 28) in [0, 1]; energy: share of the variance, 1 keeps the images as they are.
    """
    if energy >= 1:
        return images
    mean = train_images.flatten(1).double().mean(0)
    centered = train_images.flatten(1).double() - mean
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    share = values.flip(0).cumsum(0) / values.sum()
    components = vectors.flip(1)[:, : int((share < energy).sum()) + 1]
    flat = images.flatten(1).double() - mean
    return (flat @ components @ components.T + mean).float().view_as(images)


def find_recordings(root):
    """split -> sorted paths of FSDD's 3,000 recordings under `root`/fsdd/recordings."""
    folder = Path(root) / "fsdd" / "recordings"
    paths = {"train": [], "val": [], "test": []}
    for digit, speaker, take in product(range(10), SPEAKERS, TAKES):
        paths[split_of_take(take)].append(folder / f"{digit}_{speaker}_{take}.wav")
    present = {path.name for path in folder.glob("*.wav")}
    missing = [p.name for part in paths.values() for p in part if p.name not in present]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the 3000 recordings of the Free Spoken Digit "
            f"Dataset, such as {missing[0]}; delete it if it is there, then run `python "
            f"data/prepare.py fsdd --out {folder.parent}`, or name the folder above fsdd by "
            "--data-root."
        )
    return {name: sorted(part) for name, part in paths.items()}


def pair_images(digits, pool, generator):
    """For each digit an image of it that no other recording has: (N,) positions in `pool`.

    digits: (N,) labels of the recordings; pool: (M,) labels of the images.
    """
    order = torch.randperm(len(pool), generator=generator)
    chosen = torch.empty_like(digits)
    for digit, count in Counter(digits.tolist()).items():
        chosen[digits == digit] = order[pool[order] == digit][:count]
    return chosen


def load(root, data_seed, visual_energy, audio_snr):
    """2,400 train, 300 val and 300 test pairs, shuffled.

    visual_energy: share of the images' PCA energy that is kept, 1 for clean images.
    audio_snr:     signal-to-noise ratio in dB, inf for clean sound.
    """
    paths = find_recordings(root)
    audio, labels = {}, {}
    for name in paths:
        shuffle = torch.randperm(len(paths[name]), generator=make_generator(data_seed, name))
        paths[name] = [paths[name][i] for i in shuffle]
        noise = make_generator(data_seed, "noise", name)
        audio[name] = log_mel(
            torch.stack(
                [add_noise(read_wav(path, SAMPLE_RATE), audio_snr, noise) for path in paths[name]]
            )
        )
        labels[name] = torch.tensor([int(path.name[0]) for path in paths[name]])

    # One draw for train and val together, since both take from MNIST's training images.
    pairing = make_generator(data_seed, "pairing")
    images, digits = load_mnist(root, train=True)
    chosen = pair_images(torch.cat([labels["train"], labels["val"]]), digits, pairing)
    test_images, test_digits = load_mnist(root, train=False)
    visual = dict(
        zip(("train", "val"), (images[chosen] / 255).split([2400, 300]), strict=True),
        test=test_images[pair_images(labels["test"], test_digits, pairing)] / 255,
    )
    splits = {
        name: TensorSplit(
            {
                "audio": audio[name],
                "visual": keep_energy(visual[name], visual["train"], visual_energy),
            },
            labels[name],
            render,
        )
        for name in paths
    }
    return Splits(**splits, val_iid=splits["val"], modalities=MODALITIES, num_classes=10)
