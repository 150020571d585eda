"""Where and how precisely a network computes, and what else its numbers may depend on."""

import platform
import subprocess
from pathlib import Path

import torch

from .errors import UserError


def pick_device(name):
    """`auto`, `cpu`, `cuda` or `mps` -> torch.device; UserError if this machine lacks it.

    `auto` is CUDA where there is one, else the CPU; mps is there to try, nothing was tested on it.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if available["cuda"] else "cpu"
    if not available.get(name, True):
        raise UserError(f"PyTorch finds no {name} device on this machine; use --device cpu.")
    return torch.device(name)


def autocast(config):
    """Context for the network's forward pass: bfloat16 where safe, or nothing for fp32.

    Losses, distances and running means stand outside of it and work on `.float()` values.
    """
    return torch.autocast(config.device.type, torch.bfloat16, enabled=config.precision == "bf16")


def forward(model, inputs, config):
    """Logits (B, C) and features, modality -> (B, D), of a batch, in float32."""
    with autocast(config):
        logits, features = model(inputs)
    return logits.float(), {m: z.float() for m, z in features.items()}


def environment(device):
    """What the numbers may depend on besides the arguments: recorded, never compared."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or a copy without history
        commit = None
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "git_commit": commit,
    }
