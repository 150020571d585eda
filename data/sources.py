"""What each public dataset consists of: its lists, its files, its classes and its splits.

A reader turns a source folder, and the public lists where they are given, into rows; a row without
a split gets one here. Nothing is decoded.
"""

import csv
import math
import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from media import PrepareError

SPLITS = ("train", "val", "test")
EMOTIONS = ["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"]  # the order of the public labels
VIEWS = 12
SPEAKER_SHARE = 0.1  # of the actors that are in the test split of `--split speakers`
# Files that ffmpeg reads sound and pictures from, in upper or lower case.
SOUND = (".wav", ".aac", ".aif", ".aiff", ".au", ".flac", ".m4a", ".mka", ".mp3", ".oga", ".ogg")
SOUND += (".opus", ".wma")
VIDEO = (".mp4", ".3gp", ".asf", ".avi", ".f4v", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mpeg")
VIDEO += (".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv")
VIEW_NAME = re.compile(
    r"(\w+?_\d{4})\D.*?(\d+)\.(?i:png)"
)  # airplane_0627.obj_whiteshaded_v0000.png


@dataclass
class Row:
    """A clip or an object of a list: one label, one split, one place in the prepared folder.

    key:     what its id is made from; rows that share it get .2, .3, ... behind it.
    group:   rows of one group show the same thing and must not be in two splits.
    inputs:  the file with pictures and the one with sound, one with both, or the views in order.
    segment: from and to in seconds, None for all of the file.
    """

    key: str
    group: str
    label: str
    inputs: list[Path]
    split: str | None = None
    segment: tuple[float, float] | None = None
    id: str = ""


@dataclass
class Listing:
    """The rows of a dataset and what was noticed in its lists.

    notes:    (id, "kind: details"), the rows that they are about are kept.
    missing:  (id, "kind: details"), what they are about cannot be prepared.
    """

    rows: list[Row]
    classes: list[str]
    notes: list[tuple[str, str]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)


def read_lines(path: Path, columns: int, form: str, delimiter: str) -> Iterable[list[str]]:
    """Yields the fields of each line; raises PrepareError where a line has another number."""
    if not path.is_file():
        raise PrepareError(f"no file {path}: it should hold lines of the form {form}")
    with open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        quoting = csv.QUOTE_MINIMAL if delimiter == "," else csv.QUOTE_NONE
        reader = csv.reader(file, delimiter=delimiter, quoting=quoting)
        try:
            for fields in reader:
                if fields and len(fields) != columns:
                    raise csv.Error
                if fields:
                    yield fields
        except csv.Error:  # its own is of a field that is longer than any
            raise PrepareError(f"{path}, line {reader.line_num}: not of the form {form}") from None


def read_crema_d(source: Path, lists: Path | None) -> Listing:
    """AudioWAV/<clip>.wav and VideoFlash/<clip>.flv, clips named actor_sentence_emotion_level.

    Other containers of that name do as well.
    """
    sound, pictures = source / "AudioWAV", source / "VideoFlash"
    if not sound.is_dir() or not pictures.is_dir():
        raise PrepareError(
            f"{source} has no folders AudioWAV and VideoFlash: give --source the folder of a "
            "CREMA-D clone"
        )
    sounds, films = index_files(sound, SOUND), index_files(pictures, VIDEO)
    if lists:
        listed = [
            (clip, label, split)
            for split in ("train", "test")
            for clip, label in read_lines(lists / f"{split}.csv", 2, "CLIP,LABEL", ",")
        ]
    else:
        clips = sorted({*sounds, *films})
        listed = [(clip, "".join(clip.split("_")[2:3]), None) for clip in clips]
    rows, missing, notes = [], [], []
    for clip, label, split in listed:
        if label in EMOTIONS:
            film = find(films, pictures / f"{clip}.flv", notes)
            inputs = [film, find(sounds, sound / f"{clip}.wav", notes)]
            rows.append(Row(clip, clip, label, inputs, split))
        else:
            missing.append((clip, f"unknown label: {label!r} is none of {', '.join(EMOTIONS)}"))
    return Listing(rows, EMOTIONS, notes, missing)


def read_ave(source: Path, lists: Path | None) -> Listing:
    """<video>.mp4, or .mkv and so on, anywhere below, cut to the seconds of its event."""
    form = "Category&VideoID&quality&start&end"
    files = index_files(source)
    if lists:
        paths = {lists / f"{split}Set.txt": split for split in SPLITS}
    else:
        paths = {source / "Annotations.txt": None}
    rows, notes = [], []
    for path, split in paths.items():
        for number, (label, video, _, *ends) in enumerate(read_lines(path, 5, form, "&"), 1):
            if label == "Category":  # the header of Annotations.txt
                continue
            try:
                start, end = map(float, ends)
                if not 0 <= start < math.inf or not math.isfinite(end):
                    raise ValueError
            except ValueError:
                raise PrepareError(f"{path}, line {number}: not of the form {form}") from None
            segment = (start, end) if end > start else None
            path_of_clip = find(files, source / f"{video}.mp4", notes)
            row = Row(video, video, label, [path_of_clip], split, segment)
            if segment is None:
                problem = f"empty segment: from {start:g} to {end:g} s, so all of it is used"
                notes.append((video, problem))
            rows.append(row)
    # The public labels are in the order in which the test list names them.
    ordered = sorted(rows, key=lambda row: row.split != "test")
    return Listing(rows, list(dict.fromkeys(row.label for row in ordered)), notes)


def read_vggsound(source: Path, lists: Path | None) -> Listing:
    """<video>_<start, 6 digits>.mp4, or .mkv and so on, anywhere below; vggsound.csv has splits."""
    form = "video,start,label,split with split train or test"
    path, files, rows, notes = source / "vggsound.csv", index_files(source), [], []
    for number, (video, start, label, split) in enumerate(read_lines(path, 4, form, ","), 1):
        if not start.isdecimal() or len(start) > 6 or split not in SPLITS:
            raise PrepareError(f"{path}, line {number}: not of the form {form}")
        key = f"{video}_{int(start):06d}"
        film = find(files, source / f"{key}.mp4", notes)
        rows.append(Row(key, video, label, [film], split))
    ordered = sorted(rows, key=lambda row: row.split != "train")
    return Listing(rows, list(dict.fromkeys(row.label for row in ordered)), notes)


def read_modelnet40(source: Path, lists: Path | None) -> Listing:
    """<class>/{train,test}/<object>...<view>.png with 12 views of each object."""
    listing = Listing([], [])
    for split in ("train", "test"):
        for folder in sorted(source.glob(f"[!.]*/{split}")):
            views = defaultdict(list)
            for path in folder.glob("[!.]*.[pP][nN][gG]"):
                if match := VIEW_NAME.fullmatch(path.name):
                    views[match[1]].append((int(match[2]), path))
                else:
                    problem = f"unknown name: {path} does not end in an object and a view"
                    listing.missing.append((path.stem, problem))
            for name, found in sorted(views.items()):
                inputs = [path for _, path in sorted(found)]
                if len(inputs) == VIEWS:
                    listing.rows.append(Row(name, name, folder.parent.name, inputs, split))
                else:
                    problem = f"missing: {len(inputs)} of {VIEWS} views in {folder}"
                    listing.missing.append((name, problem))
    listing.classes = sorted({row.label for row in listing.rows})
    if not listing.rows:
        raise PrepareError(
            f"{source} has no <class>/train and <class>/test with {VIEWS} PNG views of an object"
        )
    return listing


def index_files(source: Path, endings: tuple[str, ...] = VIDEO) -> dict[str, list[Path]]:
    """The paths of the files below `source` with one of the endings, by name without it.

    Names that begin with a dot are not data: a Mac leaves ._x.mp4 beside x.mp4 on foreign disks.
    """
    if not source.is_dir():
        raise PrepareError(f"no folder {source}: give --source the folder with the dataset")
    files = defaultdict(list)
    for folder, below, names in os.walk(source):
        below[:] = sorted(name for name in below if not name.startswith("."))
        for name in sorted(names):
            stem, ending = os.path.splitext(name)
            if ending.lower() in endings and not name.startswith("."):
                files[stem].append(Path(folder, name))
    return files


def find(files: dict[str, list[Path]], expected: Path, notes: list) -> Path:
    """The file of the name of `expected`, or that path itself: its absence is reported later.

    Of several the first one, with a note.
    """
    paths = sorted(files.get(expected.stem, [expected]))
    unused = " and ".join(map(str, paths[1:]))
    note = (expected.stem, f"duplicate: {len(paths)} files: {paths[0]} is used, not {unused}")
    if unused and note not in notes:
        notes.append(note)
    return paths[0]


@dataclass(frozen=True)
class Dataset:
    """How one dataset is read and split.

    test, val: the share of all and the share of the rest that a drawn split gets.
    short:     the default short side in pixels, None for that of the files.
    sound:     whether it has any.
    fps:       the default frames a second: ten of a typical clip, from which training draws.
    """

    read: Callable[[Path, Path | None], Listing]
    sound: bool = True
    short: int | None = 256
    test: float = 0.0
    val: float = 0.1
    fps: float = 1.0


DATASETS = {
    "crema-d": Dataset(read_crema_d, test=744 / 7442, fps=4.0),  # clips of about 2.5 s
    "ave": Dataset(read_ave, test=402 / 4143, val=402 / 3741),
    "vggsound": Dataset(read_vggsound),
    "modelnet40": Dataset(read_modelnet40, sound=False, short=None, val=0.2),
}


def name_rows(listing: Listing) -> None:
    """Gives every row its id; rows listed twice go, other repetitions and leaks are noted.

    A row whose key is not the name of a file, so that it could lead elsewhere, becomes missing.
    Repetitions are numbered in the order of their segment and label, whatever the lists' order.
    """
    by_key, by_group, kept = defaultdict(list), defaultdict(list), {}
    for row in listing.rows:
        same = (row.key, row.label, row.split, row.segment)
        if row.key in ("", "..") or Path(row.key).name != row.key:
            listing.missing.append((row.key, f"unknown name: {row.key!r} cannot name a file"))
        elif same in kept:
            listing.notes.append((row.key, "duplicate: the same row is listed twice, used once"))
        else:
            kept[same] = row
            by_key[row.key].append(row)
            by_group[row.group].append(row)
    listing.rows = list(kept.values())
    for key, rows in by_key.items():
        rows.sort(key=lambda row: (row.segment or (0, 0), row.label, row.split or ""))
        for number, row in enumerate(rows, 1):
            row.id = key if number == 1 else f"{key}.{number}"
        if len(rows) > 1:
            where = "; ".join(f"{row.label} ({row.split or 'no split'})" for row in rows)
            listing.notes.append((key, f"duplicate: {len(rows)} rows, each kept: {where}"))
    for group, rows in by_group.items():
        splits = [split for split in SPLITS if split in {row.split for row in rows}]
        if len(splits) > 1:
            listing.notes.append((group, f"leak: in {' and '.join(splits)}"))


def remove_leaks(rows: list[Row]) -> list[Row]:
    """The rows without those of train and val whose group test has, and of train that val has."""
    groups = {split: {row.group for row in rows if row.split == split} for split in SPLITS}
    taken = {"train": groups["val"] | groups["test"], "val": groups["test"], "test": set()}
    return [row for row in rows if row.group not in taken[row.split]]


def draw_groups(rows: list[Row], share: float, generator: random.Random) -> set[str]:
    """Draws about that share of the groups, each label in proportion (largest remainders)."""
    labels = {}
    for row in rows:
        labels.setdefault(row.group, row.label)
    counts = Counter(labels.values())
    quota = {label: count * share for label, count in counts.items()}
    size = max(1, int(len(labels) * share + 1e-6))  # rounded down, as in the published sizes
    take = {label: int(value) for label, value in quota.items()}
    by_remainder = sorted(quota, key=lambda label: (take[label] - quota[label], label))
    for label in by_remainder[: size - sum(take.values())]:
        take[label] += 1
    drawn = set()
    for label in sorted(counts):
        groups = sorted(group for group in labels if labels[group] == label)
        generator.shuffle(groups)
        drawn |= set(groups[: take[label]])
    return drawn


def assign_splits(
    rows: list[Row], kept: list[Row], dataset: Dataset, val: float, seed: int
) -> None:
    """Fills in the splits that the lists leave open: test if no row has one, then validation.

    They are drawn among the rows kept, so that what is missing leaves none of them empty.
    """
    generator = random.Random(seed)
    for split, share in (("test", dataset.test), ("val", val)):
        if share and not any(row.split == split for row in rows):
            open_rows = [row for row in kept if row.split in (None, "train")]
            drawn = draw_groups(open_rows, share, generator)
            for row in open_rows:
                row.split = split if row.group in drawn else row.split


def assign_speakers(rows: list[Row], val: float, seed: int) -> None:
    """Splits so that no actor, the number that CREMA-D's clips begin with, is in two splits."""
    actors = sorted({row.key.split("_")[0] for row in rows})
    if len(actors) < 3:
        raise PrepareError(f"--split speakers needs 3 actors or more, the source has {len(actors)}")
    random.Random(seed).shuffle(actors)
    tests = max(1, round(SPEAKER_SHARE * len(actors)))
    vals = max(1, round(val * (len(actors) - tests)))
    of = dict.fromkeys(actors[:tests], "test")
    of |= dict.fromkeys(actors[tests : tests + vals], "val")
    for row in rows:
        row.split = of.get(row.key.split("_")[0], "train")
