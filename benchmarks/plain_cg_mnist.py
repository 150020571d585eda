"""Two-branch training on colored-and-gray MNIST as it is usually written: what bench_pmr.py
compares with. A `Dataset` that transforms one PIL image at a time, a `DataLoader`, a loop; it
imports nothing of the project on purpose.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets, transforms


class ColoredGrayMNIST(Dataset):
    """MNIST as (gray, color, label); colors: (N, 3) in [0, 1], an RGB color for each image."""

    def __init__(self, root, colors):
        self.mnist = datasets.MNIST(root, train=True, download=False)
        self.colors = np.asarray(colors, dtype=np.float32)
        means, deviations = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
        to_tensor = transforms.ToTensor()
        self.gray_transform = transforms.Compose(
            [to_tensor, transforms.Normalize((0.1307,), (0.3081,))]
        )
        self.color_transform = transforms.Compose(
            [to_tensor, transforms.Normalize(means, deviations)]
        )

    def __len__(self):
        return len(self.mnist)

    def __getitem__(self, index):
        image, label = self.mnist[index]
        colored = np.array(image)[:, :, None] * self.colors[index]
        color = self.color_transform(Image.fromarray(colored.astype(np.uint8)))
        return self.gray_transform(image), color, label


def branch(in_channels):
    """The layers of common/networks' CNN: an image -> 512 features."""
    return nn.Sequential(
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


class TwoBranchNet(nn.Module):
    """The features of a gray and a color branch are concatenated and classified."""

    def __init__(self):
        super().__init__()
        self.gray_branch, self.color_branch = branch(1), branch(3)
        self.classifier = nn.Linear(1024, 10)

    def forward(self, gray, color):
        features = torch.cat([self.gray_branch(gray), self.color_branch(color)], dim=1)
        return self.classifier(features)


def make_loader(root, colors, batch_size, workers, limit):
    """Shuffled batches of the first `limit` images."""
    dataset = Subset(ColoredGrayMNIST(root, colors), range(limit))
    return DataLoader(dataset, batch_size=batch_size, shuffle=True, num_workers=workers)


def train_epoch(model, batches, optimizer):
    """Train on (gray, color, label); returns the mean loss and the accuracy in percent."""
    model.train()
    running_loss, correct, total = 0.0, 0, 0
    for gray, color, label in batches:
        optimizer.zero_grad()
        output = model(gray, color)
        loss = F.cross_entropy(output, label)
        loss.backward()
        optimizer.step()
        running_loss += loss.item() * label.size(0)
        correct += (output.argmax(dim=1) == label).sum().item()
        total += label.size(0)
    return running_loss / total, 100.0 * correct / total
