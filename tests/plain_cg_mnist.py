"""Plain two-branch training on colored-and-gray MNIST: the comparator for the benchmark.

This is the usual way of writing it with torch and torchvision: a ``Dataset`` that transforms
one PIL image at a time, a ``DataLoader``, and an ordinary training loop. It stands apart from
the project's own loaders and models on purpose and imports nothing from them.
"""

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms


class ColoredGrayMNIST(Dataset):
    """MNIST as (gray, color, label); ``colors`` is N x 3 in [0, 1], one RGB color per image."""

    def __init__(self, root, colors, train=True):
        self.mnist = datasets.MNIST(root, train=train, download=False)
        self.colors = np.asarray(colors, dtype=np.float32)
        if self.colors.shape != (len(self.mnist), 3):
            raise ValueError(f"colors must be {len(self.mnist)} x 3, got {self.colors.shape}")
        self.gray_transform = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize((0.1307,), (0.3081,)),
            ]
        )
        self.color_transform = transforms.Compose(
            [
                transforms.ToTensor(),
                transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
            ]
        )

    def __len__(self):
        return len(self.mnist)

    def __getitem__(self, index):
        image, label = self.mnist[index]
        gray = self.gray_transform(image)
        colored = np.array(image)[:, :, None] * self.colors[index]
        color = self.color_transform(Image.fromarray(colored.astype(np.uint8)))
        return gray, color, label


class Branch(nn.Module):
    """Small convolutional encoder from an image to a 512-dimensional feature."""

    def __init__(self, in_channels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, 32, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
            nn.Conv2d(32, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 64, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 512),
        )

    def forward(self, x):
        return self.layers(x)


class TwoBranchNet(nn.Module):
    """A gray and a color branch whose features are concatenated and classified."""

    def __init__(self, num_classes=10):
        super().__init__()
        self.gray_branch = Branch(1)
        self.color_branch = Branch(3)
        self.classifier = nn.Linear(1024, num_classes)

    def forward(self, gray, color):
        features = torch.cat([self.gray_branch(gray), self.color_branch(color)], dim=1)
        return self.classifier(features)


def make_loader(root, colors, batch_size=64, workers=0, train=True, limit=None):
    """Shuffling ``DataLoader`` over the first ``limit`` images (all of them if None)."""
    dataset = ColoredGrayMNIST(root, colors, train=train)
    if limit is not None:
        dataset = Subset(dataset, range(min(limit, len(dataset))))
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers)


def train_epoch(model, loader, optimizer, device):
    """Train for one epoch; return (mean loss, accuracy in percent)."""
    model.train()
    running_loss, correct, total = 0.0, 0, 0
    for gray, color, label in loader:
        gray, color, label = gray.to(device), color.to(device), label.to(device)
        optimizer.zero_grad()
        output = model(gray, color)
        loss = F.cross_entropy(output, label)
        loss.backward()
        optimizer.step()
        running_loss += loss.item() * label.size(0)
        correct += (output.argmax(dim=1) == label).sum().item()
        total += label.size(0)
    return running_loss / total, 100.0 * correct / total


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="folder that holds MNIST/raw")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--limit", type=int, default=None, help="use the first N images only")
    parser.add_argument("--workers", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    colors = np.random.default_rng(0).random((60000, 3))
    loader = make_loader(args.root, colors, workers=args.workers, limit=args.limit)
    model = TwoBranchNet().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    for epoch in range(args.epochs):
        start = time.perf_counter()
        loss, accuracy = train_epoch(model, loader, optimizer, device)
        seconds = time.perf_counter() - start
        print(
            f"epoch {epoch + 1}: loss {loss:.4f}, accuracy {accuracy:.2f}%, "
            f"{seconds:.2f} s, {1000 * seconds / len(loader):.1f} ms/step"
        )


if __name__ == "__main__":
    main()
