"""Plain loading of audio-visual clips: the comparator for the benchmark.

This is the usual way of writing it with torch, torchvision and torchaudio: a ``Dataset`` whose
``__getitem__`` opens the WAV and three JPEGs of one clip and transforms them one by one, and a
``DataLoader``. It stands apart from the project's own loaders and imports nothing from them.
"""

import csv
import random
from pathlib import Path

import torch
from PIL import Image
from scipy.io import wavfile
from torch.utils.data import DataLoader, Dataset
from torchaudio.transforms import Resample, Spectrogram
from torchvision import transforms


class Clips(Dataset):
    """Clips as (spectrogram 1 x 257 x 188, frames 3 x T x 224 x 224, label).

    ``root`` holds train.csv (rows ``name,label``), AudioWAV/<name>.wav at 16 kHz and
    Image-01-FPS/<name>/*.jpg.
    """

    def __init__(self, root, num_frames=3):
        self.root = Path(root)
        self.num_frames = num_frames
        with open(self.root / "train.csv", newline="") as file:
            rows = list(csv.reader(file))
        classes = sorted({label for _, label in rows})
        self.items = [(name, classes.index(label)) for name, label in rows]
        self.resample = Resample(16000, 22050)
        self.spectrogram = Spectrogram(n_fft=512, hop_length=353, power=1)
        normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        crop, flip = transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()
        self.transform = transforms.Compose([crop, flip, transforms.ToTensor(), normalize])

    def __len__(self):
        return len(self.items)

    def load_audio(self, name):
        _, samples = wavfile.read(self.root / "AudioWAV" / f"{name}.wav")
        waveform = self.resample(torch.from_numpy(samples / 32768.0).float())
        waveform = waveform.repeat(3)[: 3 * 22050].clamp(-1, 1)
        return torch.log(self.spectrogram(waveform) + 1e-7).unsqueeze(0)

    def load_frames(self, name):
        paths = sorted((self.root / "Image-01-FPS" / name).glob("*.jpg"))
        chosen = sorted(random.choices(paths, k=self.num_frames))
        frames = [self.transform(Image.open(path).convert("RGB")) for path in chosen]
        return torch.stack(frames, dim=1)

    def __getitem__(self, index):
        name, label = self.items[index]
        return self.load_audio(name), self.load_frames(name), label


def make_loader(root, batch_size=64, workers=2, num_frames=3):
    """Shuffling ``DataLoader`` over the training clips."""
    dataset = Clips(root, num_frames)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
