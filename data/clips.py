"""Prepares a folder of clips or views for the loaders, and checks one.

<out>/clips.csv and <out>/manifest.json are written last: a folder without them is unfinished.
<out>/.prepare/done.jsonl names the finished clips, so that an interrupted run can go on.
"""

import argparse
import csv
import io
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from fake import LABEL_FILE, write_fake
from media import (
    SAMPLE_RATE,
    ClipError,
    PrepareError,
    check_input,
    check_stored,
    extract_clip,
    extract_views,
    require_ffmpeg,
)
from sources import (
    DATASETS,
    SPLITS,
    Listing,
    Row,
    assign_speakers,
    assign_splits,
    name_rows,
    remove_leaks,
)
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

FORMAT = 1
HEADER = ["id", "split", "label", "frames", "seconds"]
SAMPLE_CLIPS = 8  # prepared first, to estimate the disk from
BLOCK_BYTES = 4096  # a file takes whole blocks of the disk
SHOWN = 5  # problems of a kind that the table shows


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames, so that `path` is never half a file."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def table(rows: list[list]) -> str:
    """The rows as comma-separated lines."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def list_rows(args: argparse.Namespace) -> Listing:
    """The rows of the source with ids and splits."""
    dataset = DATASETS[args.dataset]
    listing = dataset.read(args.source, args.splits)
    if not listing.rows:
        raise PrepareError(f"{args.splits or args.source} lists no clip of {args.dataset}")
    name_rows(listing)
    if args.split == "speakers":
        assign_speakers(listing.rows, args.validation, args.seed)
    else:
        assign_splits(listing.rows, dataset, args.validation, args.seed)
    if args.remove_leaks:
        listing.rows = remove_leaks(listing.rows)
        removed = [
            (name, note.replace("leak: ", "leak, removed: ")) for name, note in listing.notes
        ]
        listing.notes = removed
    return listing


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Raises PrepareError if another process is inside `locked` with the same folder."""
    (out / ".prepare").mkdir(parents=True, exist_ok=True)
    with open(out / ".prepare" / "lock", "w") as file:
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
    hidden = path.parent.name == ".prepare"
    return PrepareError(
        f"{path} is damaged: delete {path.parent if hidden else path} and run the same command "
        "again, it makes the clips anew"
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
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
                    done[record.id] = record
        except (ValueError, TypeError) as error:
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
        except ClipError:
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
            if frames_folder.exists():
                shutil.rmtree(frames_folder)
            (work / "frames").rename(frames_folder)
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
        if rows and (self.out / "cache").exists():
            shutil.rmtree(self.out / "cache")

    def prepare_all(self, rows: list[Row], workers: int) -> list[tuple[str, str]]:
        """Prepares the rows into `self.done`; returns (id, problem) of those that failed.

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
            return failed
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


def split_rule(args: argparse.Namespace) -> str:
    """Where the splits come from: speakers, public lists, the seed, or the source itself."""
    if args.split or args.splits:
        return args.split or "lists"
    return "stratified" if DATASETS[args.dataset].test else "source"


def count_rows(rows: list[Row], classes: list[str]) -> dict:
    """{split: {class: number of rows}}, zeros included."""
    counts = Counter((row.split, row.label) for row in rows)
    return {split: {name: counts[split, name] for name in classes} for split in SPLITS}


def print_report(
    rows: list[Row], done: set[str], classes: list[str], problems: list[tuple[str, str]]
) -> None:
    """The table at the end: clips by split, then the problems by kind with a few examples."""
    print(f"{'split':<8}{'listed':>9}{'prepared':>10}{'classes':>9}{'per class':>14}")
    counts = count_rows([row for row in rows if row.id in done], classes)
    for split, by_class in counts.items():
        listed = sum(row.split == split for row in rows)
        filled = [count for count in by_class.values() if count]
        spread = f"{min(by_class.values())} to {max(by_class.values())}" if by_class else "-"
        print(f"{split:<8}{listed:>9,}{sum(filled):>10,}{len(filled):>9}{spread:>14}")
    kinds: dict[str, list] = {}
    for name, problem in problems:
        kinds.setdefault(problem.split(":")[0], []).append((name, problem))
    for kind, found in kinds.items():
        print(f"{kind} ({len(found):,}):")
        for name, problem in found[:SHOWN]:
            print(f"  {name}: {problem.partition(': ')[2] or problem}")
        if len(found) > SHOWN:
            print(f"  and {len(found) - SHOWN:,} more, see problems.csv")


def prepare_clips(args: argparse.Namespace) -> str:
    """Prepares, checks or fakes `args.dataset` in `args.out`; returns what was done."""
    if args.check:
        default = args.parser.get_default
        given = {key for key, value in vars(args).items() if value != default(key)}
        if unused := given - {"check", "out"}:
            names = ", ".join(sorted(f"--{key.replace('_', '-')}" for key in unused))
            args.parser.error(f"--check reads what is prepared, it does not take {names}")
        return check_folder(args.out, args.dataset)
    require_ffmpeg()
    try:
        with locked(args.out):
            if args.fake:
                args.source = write_fake(args.dataset, args.fake, args.out / "source")
            return prepare_source(args)
    except KeyboardInterrupt:
        raise PrepareError(
            f"interrupted: the finished clips in {args.out} are kept, run the same command again"
        ) from None


def prepare_source(args: argparse.Namespace) -> str:
    """Prepares `args.source`; raises PrepareError if a clip is missing and none may be."""
    sound = DATASETS[args.dataset].sound
    listing = list_rows(args)
    rows, missing, usable = listing.rows, listing.missing, []
    for row in rows:
        try:
            for path in row.inputs:
                check_input(path)
            usable.append(row)
        except ClipError as error:
            missing.append((row.id, str(error)))
    if not usable:
        raise PrepareError(
            f"none of the {len(missing):,} clips can be read, for example {missing[0][0]}: "
            f"{missing[0][1]}"
        )

    fake = (args.source / LABEL_FILE).exists()
    media = {
        "dataset": args.dataset,
        "fake": fake,
        "fps": args.fps if sound else None,
        "short_side": args.short_side,
        "sample_rate": SAMPLE_RATE if sound else None,
    }
    folder = Folder(args.out, media)
    missing += folder.prepare_all(usable, args.workers)

    lost = {name for name, _ in missing}
    kept = [row for row in usable if row.id not in lost]
    notes = [(row.id, note) for row in kept for note in folder.done[row.id].notes]
    problems = [*missing, *listing.notes, *notes]
    problems_file = args.out / "problems.csv"
    if problems:
        write_text(problems_file, table([["id", "problem"], *sorted(problems)]))
    else:
        problems_file.unlink(missing_ok=True)
    print_report(rows, {row.id for row in kept}, listing.classes, problems)
    if not kept:
        raise PrepareError(f"no clip could be prepared, {problems_file} says why")
    if missing and not args.allow_missing:
        raise PrepareError(
            f"{len(missing):,} of {len(kept) + len(missing):,} clips are missing or damaged, "
            f"{problems_file} lists them: repair the source and run the same command again (the "
            "finished clips are kept), or add --allow-missing to go on without them"
        )
    manifest = {
        "dataset": args.dataset,
        "format": FORMAT,
        "fake": fake,
        "options": {
            "fps": media["fps"],
            "short_side": media["short_side"],
            "sample_rate": media["sample_rate"],
            "split": split_rule(args),
            "seed": args.seed,
            "validation": args.validation,
            "remove_leaks": args.remove_leaks,
            "missing": len(missing),
        },
        "classes": listing.classes,
        "counts": count_rows(kept, listing.classes),
    }
    folder.finish(manifest, kept)
    return f"{args.out}: {len(kept):,} clips of {args.dataset}{' (fake)' if fake else ''} are ready"


def check_folder(out: Path, dataset: str) -> str:
    """Verifies every file of a prepared folder; raises PrepareError if one is not as it should."""
    again = f"run `python data/prepare.py {dataset}` with its --source and --out {out} again"
    if not (out / "manifest.json").is_file() or not (out / "clips.csv").is_file():
        raise PrepareError(f"{out} is unfinished, manifest.json or clips.csv is not there: {again}")
    try:
        manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        sound = manifest["options"]["sample_rate"] is not None
        classes, counts = manifest["classes"], manifest["counts"]
        with open(out / "clips.csv", encoding="utf-8", newline="") as file:
            header, *lines = csv.reader(file)
        clips = [
            (name, split, classes[int(label)], int(frames), float(seconds) if sound else None)
            for name, split, label, frames, seconds in lines
        ]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise PrepareError(f"manifest.json or clips.csv in {out} is damaged: {again}") from error
    if (manifest.get("dataset"), manifest.get("format")) != (dataset, FORMAT) or header != HEADER:
        raise PrepareError(f"{out} holds no {dataset} of format {FORMAT}: check --out")

    problems = []
    found = {split: dict.fromkeys(classes, 0) for split in SPLITS}
    for name, split, label, frames, seconds in tqdm(clips, unit="clip", disable=None):
        try:
            check_stored(out, name, frames, seconds)
            found[split][label] += 1
        except (ClipError, KeyError) as error:
            problems.append(f"{name}: {error}")
    if len({clip[0] for clip in clips}) < len(clips):
        problems.append("clips.csv: an id is there twice")
    if not problems and found != counts:
        problems.append("manifest.json: its counts are not those of clips.csv")
    for problem in problems[: 4 * SHOWN]:
        print(problem)
    if problems:
        raise PrepareError(f"{len(problems):,} problems in {out}: {again}, it makes them anew")
    return f"{out}: all {len(clips):,} clips of {dataset} are whole"


def add_parsers(datasets) -> None:
    """Adds a sub-command for each dataset of clips or views."""
    helps = {
        "crema-d": "clips of acted emotions: AudioWAV/*.wav and VideoFlash/*.flv",
        "ave": "audio-visual events: *.mp4 and Annotations.txt",
        "vggsound": "clips of 10 s: *.mp4 and vggsound.csv",
        "modelnet40": "12 shaded views of each object: class/{train,test}/*.png",
    }
    for name, dataset in DATASETS.items():
        parser = datasets.add_parser(name, help=helps[name], allow_abbrev=False)
        add = parser.add_argument
        task = parser.add_mutually_exclusive_group(required=True)
        task.add_argument("--source", type=Path, metavar="DIR", help="the dataset's own files")
        task.add_argument("--fake", type=number(int, 24), metavar="N", help="make N clips up")
        task.add_argument("--check", action="store_true", help="verify the folder --out")
        out = Path("data", name)
        add("--out", type=Path, default=out, metavar="DIR", help="default: %(default)s")
        parser.set_defaults(
            dataset=name,
            prepare=prepare_clips,
            parser=parser,
            splits=None,
            split=None,
            remove_leaks=False,
            validation=dataset.val,
            fps=None,
        )
        if name in ("crema-d", "ave"):
            lists = parser.add_mutually_exclusive_group()
            text = "folder with the public lists (default: splits drawn by --seed)"
            lists.add_argument("--splits", type=Path, metavar="DIR", help=text)
        if name == "crema-d":
            lists.add_argument("--split", choices=["speakers"], help="no actor in two splits")
        if name in ("ave", "vggsound"):
            leaks = "drop from train (and val) what test (or val) has too"
            add("--remove-leaks", action="store_true", help=leaks)
        if name != "ave":
            share = number(float, 0.01, 0.5)
            val = "share of train (default: %(default)s)"
            add("--validation", type=share, default=dataset.val, metavar="X", help=val)
        if dataset.sound:
            fps = number(float, 0.01, 100)
            rate = "frames a second (%(default)s)"
            add("--fps", type=fps, default=dataset.fps, metavar="X", help=rate)
        short, side = dataset.short, number(int, 16, 4096)
        help_text = "short side of the frames in pixels (default: %(default)s)"
        add("--short-side", type=side, default=short, metavar="N", help=help_text)
        add("--seed", type=number(int, 0), default=0, metavar="N", help="of drawn splits (0)")
        workers = number(int, 1, 1024)
        add("--workers", type=workers, default=os.cpu_count(), metavar="N", help="%(default)s")
        add("--allow-missing", action="store_true", help="go on without what is missing")


def number(kind, low, high=10**9):
    """An argparse type: a number of `kind` (int or float) from `low` to `high`."""

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low} to {high}, not {text!r}")
        return value

    return parse
