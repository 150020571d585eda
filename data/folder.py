"""A prepared folder of clips or views: what is finished in it, how one more gets there, its check.

<out>/clips.csv and <out>/manifest.json are written last: a folder without them is unfinished.
<out>/.prepare/done.jsonl names the finished clips, so that an interrupted run can go on.
"""

import csv
import io
import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from media import ClipError, PrepareError, check_stored, extract_clip, extract_views
from sources import SPLITS, Row
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1
HEADER = ["id", "split", "label", "frames", "seconds"]
SAMPLE_CLIPS = 8  # prepared first, to estimate the disk from
FRAME_NAME = re.compile(r"\d{4,}\.(jpg|png)")
BLOCK_BYTES = 4096  # a file takes whole blocks of the disk
# What reading a damaged file of JSON or CSV may raise.
DAMAGE = (ValueError, TypeError, LookupError, AttributeError, RecursionError, csv.Error)
SHOWN = 5  # problems of a kind that the table shows
NAMES = ("frames", "audio", "cache", "clips.csv", "manifest.json", "problems.csv")  # what is made


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames, so that `path` is never half a file."""
    beside = path.with_name(path.name + ".part")
    beside.unlink(missing_ok=True)  # it could be a link to a file of the user's
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def table(rows: list[list]) -> str:
    """The rows as comma-separated lines."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def require_own(out: Path) -> None:
    """Raises PrepareError if `out` holds files of the user's where a preparation puts its own."""
    if (out / ".prepare").exists():
        return
    with suppress(OSError, *DAMAGE):
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        if {"dataset", "format", "options"} <= dict(manifest).keys():
            return
    for name in NAMES:
        if (out / name).exists():
            raise PrepareError(
                f"{out / name} is there and was not made by this command: choose another --out, or "
                "move it away"
            )


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Raises PrepareError if another process is inside `locked` with the same folder.

    Or if the folder is the user's own.
    """
    require_own(out)
    (out / ".prepare").mkdir(parents=True, exist_ok=True)
    with open(out / ".prepare" / "lock", "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PrepareError(
                f"another preparation is running in {out}: let it end, or choose another --out"
            ) from None
        yield


def describe_origin(row: Row) -> list:
    """What the clip depends on: its segment, then [size, time of change] of each source file."""
    stats = [path.stat() for path in row.inputs]
    return [*(row.segment or ()), *([stat.st_size, stat.st_mtime_ns] for stat in stats)]


@dataclass(frozen=True)
class Record:
    """A finished clip: a line of the journal. seconds is None for views."""

    id: str
    origin: list
    frames: int
    seconds: float | None
    notes: list[str]


def damaged(path: Path) -> PrepareError:
    """What to raise if a file that says what is finished cannot be understood."""
    return PrepareError(
        f"{path} is damaged: delete it and run the same command again, it makes the clips anew"
    )


class Folder:
    """A prepared folder: what is finished in it, and how one more clip gets there.

    media: the options that the stored files depend on; a folder has only one set of them.
    done:  id -> Record of each finished clip.
    """

    def __init__(self, out: Path, media: dict):
        self.out, self.media, self.sound = out, media, media["sample_rate"] is not None
        self.hidden, self.work = out / ".prepare", out / ".prepare" / "work"
        self.journal, self.journal_lock = self.hidden / "done.jsonl", Lock()
        self.check_media(media)
        self.done = self.read_journal()
        if self.work.exists():
            shutil.rmtree(self.work)
        self.work.mkdir()
        write_text(self.hidden / "media.json", json.dumps(media))
        (out / "manifest.json").unlink(missing_ok=True)
        for name in ("frames", "audio") if self.sound else ("frames",):
            (out / name).mkdir(exist_ok=True)

    def check_media(self, media: dict) -> None:
        """Raises PrepareError if the folder was begun with other options."""
        for path in (self.hidden / "media.json", self.out / "manifest.json"):
            if path.exists():
                break
        else:
            return
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            before |= before.get("options", {})  # that is where the manifest has them
            changed = [f"{key} {before[key]}" for key in media if before[key] != media[key]]
        except DAMAGE as error:
            raise damaged(path) from error
        if changed:
            raise PrepareError(
                f"{self.out} was begun with {', '.join(changed)}: give the same options or another "
                "--out, or delete it"
            )

    def read_journal(self) -> dict[str, Record]:
        done = {}
        try:
            for line in self.journal.read_text().splitlines() if self.journal.exists() else []:
                with suppress(json.JSONDecodeError):  # the line at which a run was killed
                    record = Record(**json.loads(line))
                    "".join(record.notes)  # TypeError unless they are words
                    done[record.id] = record
        except DAMAGE as error:
            raise damaged(self.journal) from error
        return done

    def keeps(self, row: Row) -> bool:
        """Whether the row's clip is finished, whole and made from what the row names now."""
        record = self.done.get(row.id)
        if record is None or record.origin != describe_origin(row):
            return False
        try:
            check_stored(self.out, row.id, record.frames, record.seconds)
            return True
        except (ClipError, ValueError, TypeError):  # a damaged journal has words for numbers
            return False

    def extract(self, row: Row) -> Record:
        """Makes the files of the row's clip, in place of those that are there."""
        work, frames_folder = self.work / row.id, self.out / "frames" / row.id
        origin, seconds, notes = describe_origin(row), None, []
        short = self.media["short_side"]
        try:
            if self.sound:
                fps = self.media["fps"]
                frames, seconds, notes = extract_clip(row.inputs, row.segment, work, fps, short)
                (work / "audio.wav").replace(self.out / "audio" / f"{row.id}.wav")
            else:
                frames = extract_views(row.inputs, work, short)
            if frames_folder.is_symlink():  # what it leads to is the user's
                frames_folder.unlink()
            frames_folder.mkdir(exist_ok=True)
            for path in frames_folder.iterdir():
                if FRAME_NAME.fullmatch(path.name):  # nothing else was made here
                    path.unlink()
            for path in (work / "frames").iterdir():
                path.rename(frames_folder / path.name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        return Record(row.id, origin, frames, seconds, notes)

    def prepare(self, row: Row) -> tuple[str, str] | None:
        """Makes the row's clip and adds it to what is done; returns (id, problem) if it fails."""
        try:
            record = self.extract(row)
        except ClipError as error:
            return row.id, str(error)
        with self.journal_lock, open(self.journal, "a") as journal:
            journal.write(json.dumps(vars(record)) + "\n")
        self.done[row.id] = record
        return None

    def forget(self, rows: list[Row]) -> None:
        """Takes the rows out of what is done, and away what the loaders keep of any clip."""
        for row in rows:
            self.done.pop(row.id, None)
        lines = [json.dumps(vars(record)) + "\n" for record in self.done.values()]
        write_text(self.journal, "".join(lines))
        cache = self.out / "cache"
        if rows and not cache.is_symlink():  # elsewhere there may be other files of that name
            for path in cache.glob("*.rows"):
                path.unlink()

    def prepare_all(self, rows: list[Row], workers: int) -> dict[str, str]:
        """Prepares the rows into `self.done`; returns id -> problem of those that failed.

        The first few new ones tell how much disk the rest takes; PrepareError if it is not there.
        """
        failed, pool = [], ThreadPoolExecutor(workers)
        bar = tqdm(total=len(rows), unit="clip", disable=None)
        try:
            new = []
            for row, keep in zip(rows, pool.map(self.keeps, rows), strict=True):
                bar.update(keep)
                new += [] if keep else [row]
            self.forget(new)
            sample = new[:: max(1, len(new) // SAMPLE_CLIPS)][:SAMPLE_CLIPS]
            sampled = {row.id for row in sample}
            for part in (sample, [row for row in new if row.id not in sampled]):
                for problem in pool.map(self.prepare, part):
                    bar.update()
                    failed += [problem] if problem else []
                if part is sample:
                    self.estimate(sample, len(new))
            return dict(failed)
        finally:
            pool.shutdown(cancel_futures=True)
            bar.close()

    def estimate(self, sample: list[Row], count: int) -> None:
        """Prints the disk that `count` clips take, going by the sample that is stored already."""
        sizes = []
        for row in sample:
            if row.id in self.done:
                files = [*(self.out / "frames" / row.id).iterdir()]
                files += [self.out / "audio" / f"{row.id}.wav"] if self.sound else []
                sizes.append(sum(-(-path.stat().st_size // BLOCK_BYTES) for path in files))
        if sizes:
            share = sum(sizes) / len(sizes) * BLOCK_BYTES
            free = shutil.disk_usage(self.out).free
            text = f"{count:,} clips to prepare take about {share * count / 1e6:,.1f} MB"
            tqdm.write(f"{text} (from {len(sizes)} of them); {free / 1e6:,.1f} MB are free")
            if share * (count - len(sizes)) > free:
                raise PrepareError(
                    f"{text}, and {self.out} has {free / 1e6:,.1f} MB free: make room, choose "
                    "another --out, or a smaller --short-side"
                )

    def finish(self, manifest: dict, rows: list[Row]) -> None:
        """Writes clips.csv and manifest.json, the marks of a finished folder."""
        labels = {name: label for label, name in enumerate(manifest["classes"])}
        lines = [HEADER]
        for row in sorted(rows, key=lambda row: (SPLITS.index(row.split), row.id)):
            record = self.done[row.id]
            seconds = "" if record.seconds is None else record.seconds
            lines.append([row.id, row.split, labels[row.label], record.frames, seconds])
        write_text(self.out / "clips.csv", table(lines))
        write_text(self.out / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False))


def check_folder(out: Path, dataset: str) -> str:
    """Verifies every file of a prepared folder; raises PrepareError if one is not as it should."""
    again = f"run `python data/prepare.py {dataset}` with its --source and --out {out} again"
    if not (out / "manifest.json").is_file() or not (out / "clips.csv").is_file():
        raise PrepareError(f"{out} is unfinished, manifest.json or clips.csv is not there: {again}")
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        sound = manifest["options"]["sample_rate"] is not None
        classes, counts = manifest["classes"], manifest["counts"]
        numbers = {str(number): name for number, name in enumerate(classes)}
        found = {split: dict.fromkeys(classes, 0) for split in SPLITS}
        with open(out / "clips.csv", encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
        clips = [
            (name, split, numbers[label], int(frames), float(seconds) if sound else None)
            for name, split, label, frames, seconds in lines
        ]
    except DAMAGE as error:
        raise PrepareError(f"manifest.json or clips.csv in {out} is damaged: {again}") from error
    if (manifest.get("dataset"), manifest.get("format")) != (dataset, FORMAT) or header != HEADER:
        raise PrepareError(f"{out} holds no {dataset} of format {FORMAT}: check --out")

    problems = []
    for name, split, label, frames, seconds in tqdm(clips, unit="clip", disable=None):
        try:
            check_stored(out, name, frames, seconds)
            found[split][label] += 1
        except (ClipError, KeyError) as error:
            problems.append(f"{name}: {error}")
    if len({clip[0] for clip in clips}) < len(clips):
        problems.append("clips.csv: an id is there twice")
    for split, labels in found.items():
        if not problems and not any(labels.values()):
            problems.append(f"clips.csv: no clip is for {split}, and training needs some")
    if not problems and found != counts:
        problems.append("manifest.json: its counts are not those of clips.csv")
    for problem in problems[: 4 * SHOWN]:
        print(problem)
    if problems:
        raise PrepareError(f"{len(problems):,} problems in {out}: {again}, it makes them anew")
    return f"{out}: all {len(clips):,} clips of {dataset} are whole"
