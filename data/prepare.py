"""Gets the datasets that do not come with a Python package, one sub-command for each.

    python data/prepare.py fsdd                       # the spoken digits of --dataset av-digits
    python data/prepare.py fsdd --source FILE.tar.gz  # the same from an archive you already have
    python data/prepare.py crema-d --source DIR       # frames and sound of clips, by ffmpeg
    python data/prepare.py crema-d --fake 60 --out DIR  # the same from clips made up for a try
    python data/prepare.py crema-d --check            # is what was prepared still whole?

The recordings of fsdd are put in place only when they are complete and their SHA-256 is right; a
failure leaves nothing behind. Clips (crema-d, ave, vggsound, modelnet40) come from files that you
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
from http.client import HTTPException
from pathlib import Path
from ssl import SSLError
from urllib.error import URLError

from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))  # for `common`

from clips import add_parsers
from media import PrepareError

# Free Spoken Digit Dataset (Zohar Jackson and others, CC BY-SA 4.0), the release with 6 speakers.
# The address only says where to look: the SHA-256 decides whether what came is the dataset.
FSDD_REPOSITORY = "https://github.com/Jakobovski/free-spoken-digit-dataset"
FSDD_URL = FSDD_REPOSITORY + "/archive/refs/tags/v1.0.10.tar.gz"
FSDD_SHA256 = "45a9b976ba3397a2fd5c70a9f2e43c34f442a3a6be47392ecfc41174b678f37e"
# {digit}_{speaker}_{index}.wav in any recordings/ folder of the archive. Only the base name, group
# 1, is ever written, so no entry can land outside of the folder that is extracted into.
FSDD_ENTRY = re.compile(r"(?:.*/)?recordings/([0-9]_[a-z]+_[0-9]+\.wav)")
FSDD_LARGEST = 1_000_000  # bytes; a recording has at most a fifth of it
FSDD_OUT = Path("data/fsdd")

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


def read_recordings(archive: Path) -> dict[str, bytes]:
    """Returns the recordings in a zip or tar.gz archive, by base name (21 MB in all).

    Raises ValueError for one that is larger than any, before it is unpacked.
    """

    def wanted(name: str, size: int) -> re.Match | None:
        if (match := FSDD_ENTRY.fullmatch(name)) and size > FSDD_LARGEST:
            raise ValueError(f"{name} has {size:,} bytes")
        return match

    recordings = {}
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for entry in opened.infolist():
                if match := wanted(entry.filename, entry.file_size):
                    recordings[match[1]] = opened.read(entry)
    else:
        with tarfile.open(archive, "r:gz") as opened:
            for member in opened:
                if member.isfile() and (match := wanted(member.name, member.size)):
                    recordings[match[1]] = opened.extractfile(member).read()
    return recordings


def prepare_fsdd(args: argparse.Namespace) -> str:
    """Puts the recordings into `args.out`/recordings; returns a line that says what was done."""
    recordings = args.out / "recordings"
    following = "next: python pmr.py --dataset av-digits"
    if args.out != FSDD_OUT:
        following += f" --data-root {args.out.parent}"
    if recordings.exists():
        count = len(list(recordings.glob("[!.]*.wav")))
        if recordings.is_dir() and recordings_sha256(recordings) == FSDD_SHA256:
            return f"{recordings} already holds all {count:,} recordings; {following}"
        raise PrepareError(
            f"{recordings} ({count:,} WAV files) is incomplete or changed, its SHA-256 is not the "
            "expected one: delete it or move it away, then run this command again"
        )
    if args.source and not args.source.is_file():
        raise PrepareError(f"no file {args.source}: give --source the archive you downloaded")

    # Build the missing folders inside a hidden one beside them, on the same disk: the last step is
    # then one rename, and until it nothing is to be seen; the hidden folder goes away in any case.
    target = recordings.resolve()
    beside = next(folder for folder in target.parents if folder.exists())
    missing = target.relative_to(beside)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".prepare-") as work:
        archive = args.source or Path(work, ".archive")
        if not args.source:
            download(args.url, archive)
        origin = args.source or args.url
        try:
            files = read_recordings(archive)
        except Exception as error:  # a damaged archive can raise nearly anything in its reader
            raise PrepareError(
                f"{origin} is damaged or not a zip or tar.gz archive ({error}): download it again"
            ) from error
        if not files:
            raise PrepareError(
                f"{origin} has no recordings/*.wav: use the source archive at {FSDD_URL}"
            )
        extracted = Path(work, missing)
        extracted.mkdir(parents=True)
        for name, content in files.items():
            (extracted / name).write_bytes(content)
        if (found := recordings_sha256(extracted)) != FSDD_SHA256:
            raise PrepareError(
                f"the {len(files):,} recordings in {origin} have SHA-256 {found}, not the expected "
                f"{FSDD_SHA256}: try again, or use another copy of {FSDD_URL}"
            )
        Path(work, missing.parts[0]).rename(beside / missing.parts[0])
    megabytes = sum(map(len, files.values())) / 1e6
    return f"{recordings}: {len(files):,} recordings, {megabytes:.1f} MB; {following}"


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns its exit code."""
    parser = argparse.ArgumentParser(description="Prepare a dataset and check that it is complete.")
    datasets = parser.add_subparsers(metavar="DATASET", required=True)
    fsdd_help = "Free Spoken Digit Dataset, for --dataset av-digits"
    fsdd = datasets.add_parser("fsdd", help=fsdd_help, allow_abbrev=False)
    out_help = "a folder called fsdd, the recordings go into it (default: %(default)s)"
    fsdd.add_argument("--out", type=Path, default=FSDD_OUT, metavar="DIR", help=out_help)
    origin = fsdd.add_mutually_exclusive_group()
    origin.add_argument("--url", default=FSDD_URL, help="download from here (default: %(default)s)")
    origin.add_argument(
        "--source", type=Path, metavar="FILE", help="use this zip or tar.gz, do not download"
    )
    fsdd.set_defaults(prepare=prepare_fsdd)
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
