"""Prepares clips or views from a source, and the flags that say how."""

import argparse
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from fake import LABEL_FILE, write_fake
from folder import FORMAT, SHOWN, Folder, check_folder, locked, table, write_text
from media import SAMPLE_RATE, ClipError, PrepareError, check_input, require_ffmpeg
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

from common.flags import number


def list_rows(args: argparse.Namespace) -> Listing:
    """The rows of the source with ids, and with splits where its lists have them."""
    listing = DATASETS[args.dataset].read(args.source, args.splits)
    if not listing.rows:
        raise PrepareError(f"{args.splits or args.source} lists no clip of {args.dataset}")
    name_rows(listing)
    return listing


def split_rows(args: argparse.Namespace, listing: Listing, kept: list[Row]) -> None:
    """Fills in the splits of the listing, drawn among the rows kept, and removes its leaks."""
    if args.split == "speakers":
        assign_speakers(kept, args.validation, args.seed)
    else:
        dataset = DATASETS[args.dataset]
        assign_splits(listing.rows, kept, dataset, args.validation, args.seed)
    for row in listing.rows:
        row.split = row.split or "train"
    if args.remove_leaks:
        listing.rows = remove_leaks(listing.rows)
        removed = [
            (name, note.replace("leak: ", "leak, removed: ")) for name, note in listing.notes
        ]
        listing.notes = removed


def require_splits(args: argparse.Namespace, rows: list[Row], splits: Iterable[str]) -> None:
    """Raises PrepareError if no row is in one of the splits: training and the test need each."""
    for split in splits:
        if not any(row.split == split for row in rows):
            lists = ", or leave --splits away: then splits are drawn from what is there"
            raise PrepareError(
                f"of {len(rows):,} clips that can be used none is for {split}: add such clips to "
                f"{args.source}{lists if args.splits else ''}"
            )


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
    if args.fake or DATASETS[args.dataset].sound:
        require_ffmpeg()
    try:
        with locked(args.out):
            if args.fake:
                args.source = write_fake(args.dataset, args.fake, args.out / "source")
            return prepare_source(args)
    except ClipError as error:  # an ffmpeg that cannot make what --fake asks for
        raise PrepareError(f"the made-up clips could not be written, {error}") from error
    except KeyboardInterrupt:
        raise PrepareError(
            f"interrupted: the finished clips in {args.out} are kept, run the same command again"
        ) from None


def find_lost(rows: list[Row]) -> dict[str, str]:
    """id -> problem of the rows whose files are not there."""
    lost = {}
    for row in rows:
        try:
            for path in row.inputs:
                check_input(path)
        except ClipError as error:
            lost[row.id] = str(error)
    return lost


def prepare_source(args: argparse.Namespace) -> str:
    """Prepares `args.source`; raises PrepareError if a clip is missing and none may be."""
    sound = DATASETS[args.dataset].sound
    listing = list_rows(args)
    lost = find_lost(listing.rows)
    usable = [row for row in listing.rows if row.id not in lost]
    if not usable:
        name, problem = [*listing.missing, *lost.items()][0]
        count = len(listing.missing) + len(lost)
        raise PrepareError(
            f"none of the {count:,} clips can be read, for example {name}: {problem}"
        )
    require_splits(args, usable, [s for s in SPLITS if any(r.split == s for r in listing.rows)])

    fake = (args.source / LABEL_FILE).exists()
    media = {
        "dataset": args.dataset,
        "fake": fake,
        "fps": args.fps if sound else None,
        "short_side": args.short_side,
        "sample_rate": SAMPLE_RATE if sound else None,
    }
    folder = Folder(args.out, media)
    lost |= folder.prepare_all(usable, args.workers)

    kept = [row for row in usable if row.id not in lost]
    if kept:
        split_rows(args, listing, kept)
    rows = listing.rows  # without leaks, if these are removed
    kept = [row for row in rows if row.id not in lost]
    missing = [*listing.missing, *((row.id, lost[row.id]) for row in rows if row.id in lost)]
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
    require_splits(args, kept, SPLITS)
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
        help_text = f"short side of the frames in pixels (default: {short or 'as they come'})"
        add("--short-side", type=side, default=short, metavar="N", help=help_text)
        add("--seed", type=number(int, 0), default=0, metavar="N", help="of drawn splits (0)")
        workers = number(int, 1, 1024)
        add("--workers", type=workers, default=os.cpu_count(), metavar="N", help="%(default)s")
        add("--allow-missing", action="store_true", help="go on without what is missing")
