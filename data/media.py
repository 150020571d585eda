"""Frames and sound of one clip, through the `ffmpeg` program, and whether stored ones are whole.

A clip is stored as <out>/frames/<id>/0001.jpg, 0002.jpg, ... and <out>/audio/<id>.wav (16 kHz,
mono, 16 bit); views of an object have no sound.
"""

import math
import re
import shutil
import subprocess
import wave
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLE_RATE = 16_000  # Hz
COMPLETE = 0.8  # a clip with less than this share of the length that its file declares is truncated
SILENT_PEAK = 32  # of 32,767: a clip that stays at or below it, -60 dB, is silent
LFS_START = b"version https://git-lfs"
NO_FFMPEG = (
    "there is no program ffmpeg, which reads the clips: install it with `apt-get install ffmpeg` "
    "(Debian, Ubuntu) or `brew install ffmpeg` (macOS)"
)


class PrepareError(Exception):
    """A failure that its message explains to the user: what, where and what to do."""


class ClipError(Exception):
    """One clip cannot be prepared; the message is "kind: details", as in problems.csv."""


def require_ffmpeg() -> None:
    if shutil.which("ffmpeg") is None:
        raise PrepareError(NO_FFMPEG)


def check_input(path: Path) -> None:
    """Raises ClipError if `path` is no media file, without decoding it."""
    try:
        if not path.is_file():
            raise ClipError(f"missing: no file {path}")
        with open(path, "rb") as file:
            start = file.read(len(LFS_START))
    except OSError as error:
        raise ClipError(f"unreadable: {error}") from error
    if start == LFS_START:
        raise ClipError(f"Git LFS pointer: {path} is not the file itself, run `git lfs pull` there")
    if not start:
        raise ClipError(f"empty: {path} has 0 bytes")


def run_ffmpeg(arguments: list[str], folder: Path) -> str:
    """Runs ffmpeg in `folder`; returns its messages, each line with its level in brackets.

    Raises ClipError with ffmpeg's own words, PrepareError if the disk is full. ffmpeg gets a
    session of its own, so that Ctrl-C lets the clip at hand be finished.
    """
    command = ["ffmpeg", "-nostdin", "-hide_banner", "-nostats", "-loglevel", "level+info"]
    result = subprocess.run(
        [*command, "-y", *arguments],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        check=False,
    )
    messages = result.stderr.decode("utf-8", "replace")
    if "No space left on device" in messages:
        raise PrepareError(
            f"the disk of {folder} is full: make room and run the same command again, the "
            "finished clips are kept"
        )
    if result.returncode != 0:
        if "matches no streams" in messages:
            stream = re.search(r"Stream map '\d:(\w)", messages)
            raise ClipError("no sound" if stream and stream[1] == "a" else "no pictures")
        raise ClipError(f"unreadable: {' '.join(error_lines(messages)[-1:]) or 'ffmpeg failed'}")
    return messages


def error_lines(messages: str) -> list[str]:
    """What ffmpeg calls an error, without the addresses of its objects."""
    return re.findall(r"^(?:\[\w+ @ \w+\] )?\[(?:error|fatal)\] (.*)", messages, re.MULTILINE)


def scale(short_side: int) -> str:
    """The ffmpeg filter that brings the short side to `short_side` pixels, the other in ratio."""
    return f"scale='if(gt(iw,ih),-2,{short_side})':'if(gt(iw,ih),{short_side},-2)'"


def extract_clip(
    inputs: list[Path], segment: tuple[float, float] | None, folder: Path, fps: float, short: int
) -> tuple[int, float, list[str]]:
    """Writes `folder`/frames/0001.jpg, ... and `folder`/audio.wav.

    inputs: the file with the pictures and the file with the sound, or one with both.
    segment: from and to in seconds, None for all of it.
    Returns the number of frames, the seconds of sound and notes ("kind: details").
    """
    (folder / "frames").mkdir(parents=True)
    cut = [] if segment is None else ["-ss", f"{segment[0]}", "-t", f"{segment[1] - segment[0]}"]
    arguments = []
    for path in inputs:
        arguments += [*cut, "-threads", "1", "-i", f"file:{path.resolve()}"]
    # Rounding up takes the picture shown at 0, 1/fps, ... and at least one of the shortest clip.
    pictures = f"setpts=PTS-STARTPTS,fps={fps}:round=up,{scale(short)}"
    arguments += ["-map", "0:V:0", "-vf", pictures, "-pix_fmt", "yuvj420p", "-q:v", "3"]
    arguments += ["-threads", "1", "-flags:v", "+bitexact", "frames/%04d.jpg"]
    arguments += ["-map", f"{len(inputs) - 1}:a:0", "-ac", "1", "-ar", f"{SAMPLE_RATE}"]
    arguments += ["-c:a", "pcm_s16le", "-fflags", "+bitexact", "-flags:a", "+bitexact", "audio.wav"]
    messages = run_ffmpeg(arguments, folder)

    frames = len(list((folder / "frames").iterdir()))
    samples = read_samples(folder / "audio.wav")
    seconds = round(len(samples) / SAMPLE_RATE, 4)
    if frames == 0:
        raise ClipError("no frames: no picture could be read")
    if seconds == 0:
        raise ClipError("no sound: the sound has 0 seconds")
    declared = [
        3600 * int(hours) + 60 * int(minutes) + float(rest)
        for hours, minutes, rest in re.findall(r"Duration: (\d+):(\d+):([\d.]+),", messages)
    ]
    start, end = segment or (0, math.inf)
    for what, found, whole in [
        ("pictures", frames / fps, min(declared[:1], default=0)),
        ("sound", seconds, min(declared[-1:], default=0)),
    ]:
        if found < COMPLETE * (min(whole, end) - start):
            raise ClipError(f"truncated: {found:.1f} of {min(whole, end) - start:.1f} s of {what}")
    if "corrupt input packet" in messages or "partial file" in messages:
        raise ClipError("truncated: the file ends in the middle of its data")

    notes = []
    if np.abs(samples.astype(int)).max() <= SILENT_PEAK:
        notes.append("silent: there is nothing to hear")
    if segment and seconds < COMPLETE * (end - start):
        notes.append(f"short: the file has {seconds:.1f} s of the list's {end - start:.1f} s")
    if errors := error_lines(messages):
        notes.append(f"damaged: {len(errors)} errors while decoding, the last one: {errors[-1]}")
    return frames, seconds, notes


def extract_views(inputs: list[Path], folder: Path, short: int) -> int:
    """Writes the images `inputs` to `folder`/frames/0001.jpg, ...; returns how many they are."""
    (folder / "frames").mkdir(parents=True)
    arguments = []
    for path in inputs:
        arguments += ["-i", f"file:{path.resolve()}"]
    for view in range(len(inputs)):
        arguments += ["-map", f"{view}:v:0", "-vf", scale(short), "-pix_fmt", "yuvj420p"]
        arguments += ["-q:v", "3", "-flags:v", "+bitexact", "-frames:v", "1", "-update", "1"]
        arguments += [f"frames/{view + 1:04d}.jpg"]
    messages = run_ffmpeg(arguments, folder)
    frames = len(list((folder / "frames").iterdir()))
    if errors := error_lines(messages):
        raise ClipError(f"unreadable: {errors[-1]}")
    if frames < len(inputs):
        raise ClipError(f"unreadable: {frames} of {len(inputs)} views could be read")
    return frames


def read_samples(path: Path) -> np.ndarray:
    """The samples of a 16-bit mono WAV file at 16 kHz; raises ClipError for any other file."""
    try:
        with wave.open(str(path), "rb") as file:
            form = (file.getframerate(), file.getnchannels(), 8 * file.getsampwidth())
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
            declared = file.getnframes()
    except FileNotFoundError:
        raise ClipError(f"missing: no file {path}") from None
    except (wave.Error, EOFError, ValueError) as error:
        raise ClipError(f"damaged: {path} is no WAV file ({error})") from error
    if form != (SAMPLE_RATE, 1, 16):
        raise ClipError(f"damaged: {path} has {form[0]} Hz, {form[1]} channels, {form[2]} bits")
    if len(samples) < declared:
        raise ClipError(f"damaged: {path} has {len(samples):,} of {declared:,} samples")
    return samples


def check_stored(out: Path, clip_id: str, frames: int, seconds: float | None) -> None:
    """Raises ClipError unless the stored clip has that many whole frames and seconds of sound."""
    folder = out / "frames" / clip_id
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if names != [f"{number:04d}.jpg" for number in range(1, frames + 1)]:
        raise ClipError(f"damaged: {folder} has {len(names)} files, not 0001.jpg to {frames:04d}")
    for name in names:
        try:
            with Image.open(folder / name, formats=["JPEG"]) as image:
                image.load()
        except OSError as error:
            raise ClipError(f"damaged: {folder / name} is not a whole JPEG file") from error
    if seconds is not None:
        path = out / "audio" / f"{clip_id}.wav"
        found = len(read_samples(path)) / SAMPLE_RATE
        if abs(found - seconds) > 1e-3:
            raise ClipError(f"damaged: {path} has {found:.3f} s, not {seconds:.3f}")
