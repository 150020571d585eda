"""ModelNet40 as rendered views of its shapes; each view is a modality."""

import argparse
import re
from functools import partial
from pathlib import Path

from ..errors import UserError
from ..flags import Dial
from .file_splits import make_splits, normalize_frames
from .files import DIALS as FILE_DIALS
from .files import Files, full_box
from .listing import read_listing

VIEWS = 12  # around the shape, one every 30 degrees
NAMES = {0: "front", 6: "rear"}


def view_numbers(text):
    """An argparse type: numbers with commas, such as 0,6."""
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"must be numbers with commas such as 0,6, not {text!r}")
    return text


DIALS = {
    "views": Dial("0,6", view_numbers, "of the 12, each a modality; 0 is front, 6 rear (0,6)"),
    **FILE_DIALS,
}


def pick_views(views, count, rng):
    """The chosen views of a shape, in training and in evaluation."""
    return views


def load(root, data_seed, views, frame_cache, image_size):
    """The shapes in `root`/modelnet40, flipped at random in training, all views of one alike.

    views: numbers from 0 to 11, such as "0,6": the modalities front and rear; others are view-<k>.
    """
    listing = read_listing(Path(root) / "modelnet40", "modelnet40", audio=None)
    chosen = [int(view) for view in views.split(",")]
    if len(set(chosen)) != len(chosen) or len(chosen) < 2 or max(chosen) >= VIEWS:
        raise UserError(f"--views takes two or more different numbers below {VIEWS}, not {views}.")
    if listing.counts.min() < VIEWS:
        shape = listing.ids[listing.counts.argmin()]
        raise UserError(f"{shape} in {listing.folder} lacks some of its {VIEWS} views; fetch it.")
    modalities = tuple(NAMES.get(view, f"view-{view}") for view in chosen)

    def render(batch):
        images = normalize_frames(batch["frames"]).unbind(dim=2)
        return dict(zip(modalities, images, strict=True))

    pick = partial(pick_views, chosen)
    files = Files(listing, len(chosen), pick, full_box, image_size, frame_cache, image_size)
    return make_splits(listing, files, render, modalities, data_seed)
