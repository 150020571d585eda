"""Frames and sound of one clip, through the `ffmpeg` program, and whether stored ones are whole.

A clip is stored as <out>/frames/<id>/0001.jpg, 0002.jpg, ... and <out>/audio/<id>.wav (16 kHz,
mono, 16 bit); views of an object as 0001.png, ..., with no sound.
"""

import json
import math
import re
import shutil
import struct
import subprocess
import wave
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

SAMPLE_RATE = 16_000  # Hz
LONGEST = 10.0  # seconds used of a file without a segment: no clip of the datasets is longer
SILENT_PEAK = 32  # of 32,767: a clip that stays at or below it, -60 dB, is silent
FULL_BYTES = 1 << 16  # a disk with less room is full
UNKNOWN_BYTES = 0x7FFF0000  # a WAV header written through a pipe has 0, or this and more
GUESSED = ("aac", "ac3", "mp3")  # ffprobe guesses the length of these formats from the bit rate
LFS_START = b"version https://git-lfs"
NO_PROGRAM = (
    "there is no program {}; ffmpeg and ffprobe together read the clips (imageio-ffmpeg has no "
    "ffprobe): install both with `apt-get install ffmpeg` (Debian, Ubuntu) or `brew install "
    "ffmpeg` (macOS)"
)
# What is asked of ffprobe: where each stream starts, what length it declares, where it ends.
ENTRIES = (
    "format=format_name,start_time,duration:stream=index,codec_type,start_time,duration:"
    "stream_disposition=attached_pic:packet=stream_index,pts_time,dts_time,duration_time"
)


class PrepareError(Exception):
    """A failure that its message explains to the user: what, where and what to do."""


class ClipError(Exception):
    """One clip cannot be prepared; the message is "kind: details", as in problems.csv."""


def require_ffmpeg() -> None:
    for program in ("ffmpeg", "ffprobe"):
        if shutil.which(program) is None:
            raise PrepareError(NO_PROGRAM.format(program))


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


def run_program(command: list[str], folder: Path, file: Path) -> tuple[str, str]:
    """Runs ffmpeg or ffprobe on `file` in `folder`; returns its output and its messages.

    Raises ClipError with the program's own words, PrepareError if the disk is full. The program
    gets a session of its own, so that Ctrl-C lets the clip at hand be finished.
    """
    result = subprocess.run(
        [command[0], "-hide_banner", "-loglevel", "level+error", *command[1:]],
        cwd=folder,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        check=False,
    )
    if shutil.disk_usage(folder).free < FULL_BYTES:
        raise PrepareError(
            f"the disk of {folder} is full: make room and run the same command again, the "
            "finished clips are kept"
        )
    output, messages = (x.decode("utf-8", "replace") for x in (result.stdout, result.stderr))
    if result.returncode != 0:
        words = (
            " ".join(error_lines(messages)[-1:])
            or f"{command[0]} failed with status {result.returncode}"
        )
        words = words.removeprefix(f"file:{file.resolve()}: ")
        raise ClipError(f"unreadable: {file}: {words}")
    return output, messages


def run_ffmpeg(arguments: list[str], folder: Path, file: Path) -> str:
    """Runs ffmpeg in `folder` and returns its messages; `file` is what errors are about."""
    return run_program(["ffmpeg", "-nostdin", "-nostats", "-y", *arguments], folder, file)[1]


def error_lines(messages: str) -> list[str]:
    """What ffmpeg calls an error, without the addresses of its objects."""
    return re.findall(r"^(?:\[[^]]* @ \w+\] )*\[(?:error|fatal)\] (.*)", messages, re.MULTILINE)


@dataclass(frozen=True)
class Stream:
    """The pictures or the sound in a file; times in seconds from the file's start.

    origin:   the time stamp of the file's start.
    end:      where its last packet ends, which lasts `hold`.
    declared: how far it should reach if it is cut off, else 0.
    """

    what: str
    path: Path
    index: int
    origin: float
    start: float
    end: float
    hold: float
    declared: float

    def check(self, start: float, end: float) -> None:
        """Raises ClipError if the stream is cut off before `end` or has nothing from `start` on."""
        if self.end < end and self.declared:
            have = f"{self.end:.1f} of {self.declared:.1f} s of {self.what}"
            raise ClipError(f"truncated: {self.path} has {have}")
        if self.end <= start and start > 0:
            ends = f"{self.what} up to {self.end:.1f} s, the segment from {start:g} s on"
            raise ClipError(f"no {self.what}: {self.path} ends before the segment: {ends}")
        if self.end <= start or self.start >= end:
            raise ClipError(f"no {self.what}: {self.path} has none from {start:g} to {end:g} s")


def falls_short(found: float, whole: float) -> bool:
    """Whether `found` seconds lack more of `whole` than containers and codecs are imprecise."""
    return found < 0.95 * whole - 0.25


def wav_seconds(path: Path) -> float:
    """What the header of a WAV file declares, 0 if nothing: ffprobe goes by the file's size."""
    with open(path, "rb") as file:
        start, bytes_per_second = file.read(12), 0
        while start[:4] == b"RIFF" and len(head := file.read(8)) == 8:
            name, size = struct.unpack("<4sI", head)
            if name == b"data":
                return size / bytes_per_second if bytes_per_second and size < UNKNOWN_BYTES else 0
            following = file.tell() + size + size % 2
            if name == b"fmt ":
                bytes_per_second = int.from_bytes(file.read(12)[8:], "little")
            file.seek(following)
    return 0


def probe(path: Path) -> dict[str, Stream]:
    """The first pictures and the first sound of a file, those that it has.

    The index of an MP4 or MOV file declares the length of each stream. Other containers declare one
    for all of them: what is cut off reaches it with none.
    """
    command = ["ffprobe", "-of", "json", "-show_entries", ENTRIES, f"file:{path.resolve()}"]
    found = json.loads(run_program(command, path.parent, path)[0])
    form = found["format"]
    origin, packets = float(form.get("start_time", 0)), defaultdict(list)
    for packet in found.get("packets", []):
        if begin := packet.get("pts_time", packet.get("dts_time")):
            span = (float(begin) - origin, float(packet.get("duration_time", 0)))
            packets[packet["stream_index"]].append(span)
    last = {}
    for index, spans in packets.items():
        *_, (before, _), (begin, hold) = sorted([spans[0], *spans])
        last[index] = (begin, hold or begin - before)  # FLV does not always say how long
    farthest = max((begin + hold for begin, hold in last.values()), default=0.0)
    names, streams = form["format_name"].split(","), {}
    whole = 0.0 if names[0] in GUESSED else float(form.get("duration", 0))
    if names[0] == "wav":
        whole = wav_seconds(path)
    for entry in found["streams"]:
        what = {"video": "pictures", "audio": "sound"}.get(entry.get("codec_type"))
        if what is None or what in streams or entry.get("disposition", {}).get("attached_pic"):
            continue
        start = float(entry.get("start_time", origin)) - origin
        begin, hold = last.get(entry["index"], (0.0, 0.0))
        reach, declared = farthest, whole
        if "mp4" in names and "duration" in entry:
            reach, declared = begin + hold, start + float(entry["duration"])
        times = (origin, start, begin + hold, hold)
        declared = declared if falls_short(reach, declared) else 0.0
        streams[what] = Stream(what, path, entry["index"], *times, declared)
    return streams


def choose(streams: dict[str, Stream], what: str, path: Path) -> Stream:
    """The stream of that kind; raises ClipError if the file has none."""
    if what not in streams:
        raise ClipError(f"no {what}: {path} has none")
    return streams[what]


def scale(short_side: int) -> str:
    """The ffmpeg filter that brings the short side to `short_side` pixels, the other in ratio."""
    return f"scale='if(gt(iw,ih),-2,{short_side})':'if(gt(iw,ih),{short_side},-2)'"


def extract_clip(
    inputs: list[Path], segment: tuple[float, float] | None, folder: Path, fps: float, short: int
) -> tuple[int, float, list[str]]:
    """Writes `folder`/frames/0001.jpg, ... and `folder`/audio.wav.

    inputs: the file with the pictures and the file with the sound, or one with both.
    segment: from and to in seconds, None for all of it up to `LONGEST`.
    Returns the number of frames, the seconds of sound and notes ("kind: details").

    Pictures and sound have one window in time. It is cut out while decoding: ffmpeg's seeking is
    not exact in every container. Before sound that starts late there is silence, before pictures
    that start late the first of them.
    """
    (folder / "frames").mkdir(parents=True)
    start, end = segment or (0.0, LONGEST)
    probed = [probe(path) for path in inputs]
    pictures = choose(probed[0], "pictures", inputs[0])
    sound = choose(probed[-1], "sound", inputs[-1])
    for stream in (pictures, sound):
        stream.check(start, end)

    def decode(stream: Stream, *output: str) -> list[str]:
        source = ["-copyts", "-threads", "1", "-i", f"file:{stream.path.resolve()}"]
        messages = run_ffmpeg([*source, "-map", f"0:{stream.index}", *output], folder, stream.path)
        errors = error_lines(messages)
        problem = f"damaged: {stream.path}: {len(errors)} errors while decoding, the last one: "
        return [problem + errors[-1]] if errors else []

    # Rounding up takes the picture shown at 0, 1/fps, ...; the last one may be held for long.
    seconds = min(end, pictures.end) - start
    filters = f"setpts=PTS-({pictures.origin + start})/TB,fps={fps}:start_time=0:round=up,"
    filters += f"tpad=stop_mode=clone:stop_duration={pictures.hold:.6f},{scale(short)}"
    most = max(1, math.ceil(seconds * fps - 0.05))  # not for a picture at the very end
    output = ["-vf", filters, "-frames:v", str(most), "-pix_fmt", "yuvj420p", "-q:v", "3"]
    output += ["-threads", "1", "-flags:v", "+bitexact", "frames/%04d.jpg"]
    notes = decode(pictures, *output)
    frames = len(list((folder / "frames").iterdir()))
    if frames == 0:
        raise ClipError(f"no pictures: none of {pictures.path} could be decoded")
    shown = min(frames / fps, seconds)

    filters = f"asetpts=PTS-({sound.origin + start})/TB,"
    filters += f"aresample={SAMPLE_RATE}:async=1:first_pts=0"
    output = ["-af", filters, "-t", f"{end - start:.6f}", "-ac", "1", "-c:a", "pcm_s16le"]
    output += ["-fflags", "+bitexact", "-flags:a", "+bitexact", "audio.wav"]
    notes += decode(sound, *output)
    samples = read_samples(folder / "audio.wav")
    heard = round(len(samples) / SAMPLE_RATE, 4)
    if heard == 0:
        raise ClipError(f"no sound: none of {sound.path} could be decoded")

    span = end - start if segment else max(shown, heard)
    for stream, found in ((pictures, shown), (sound, heard)):
        text = f"s of {stream.what} in {stream.path}"
        if falls_short(found, whole := min(end, stream.end) - start):
            raise ClipError(f"truncated: {found:.1f} of {whole:.1f} {text} could be decoded")
        covered = found - max(0.0, stream.start - start)
        if covered < span / 2:
            notes.append(f"short: {covered:.1f} of {span:.1f} {text}")
    longest = max(pictures, sound, key=lambda stream: stream.end)
    if segment is None and falls_short(end, longest.end):
        text = f"has {longest.end:.1f} s, the first {end:g} are used"
        notes.append(f"long: {longest.path} {text}")
    if np.abs(samples.astype(int)).max() <= SILENT_PEAK:
        notes.append(f"silent: there is nothing to hear in {sound.path}")
    return frames, heard, notes


def check_picture(path: Path) -> tuple[int, int]:
    """The width and height of a whole JPEG or PNG file; raises ClipError for any other file."""
    try:
        with Image.open(path, formats=["JPEG", "PNG"]) as image:
            image.load()
            return image.size
    except Exception as error:  # a damaged image can raise nearly anything in its decoder
        raise ClipError(f"damaged: {path} is not a whole JPEG or PNG file ({error})") from error


def extract_views(inputs: list[Path], folder: Path, short: int | None) -> int:
    """Writes the images `inputs` to `folder`/frames/0001.png, ...; returns how many they are.

    short: the short side in pixels, None keeps the files as they come.
    """
    (folder / "frames").mkdir(parents=True)
    for number, path in enumerate(inputs, 1):
        size, stored = check_picture(path), folder / "frames" / f"{number:04d}.png"
        if short in (None, min(size)):
            shutil.copyfile(path, stored)
        else:
            with Image.open(path) as image:
                ratio = short / min(size)
                image.resize([round(ratio * side) for side in size]).save(stored)
    return len(inputs)


def read_samples(path: Path) -> np.ndarray:
    """The samples of a 16-bit mono WAV file at 16 kHz; raises ClipError for any other file."""
    try:
        with wave.open(str(path), "rb") as file:
            form = (file.getframerate(), file.getnchannels(), 8 * file.getsampwidth())
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype="<i2")
            declared = file.getnframes()
    except FileNotFoundError:
        raise ClipError(f"missing: no file {path}") from None
    except Exception as error:  # a damaged header can raise nearly anything in its reader
        raise ClipError(f"damaged: {path} is no WAV file ({error})") from error
    if form != (SAMPLE_RATE, 1, 16):
        raise ClipError(f"damaged: {path} has {form[0]} Hz, {form[1]} channels, {form[2]} bits")
    if len(samples) < declared:
        raise ClipError(f"damaged: {path} has {len(samples):,} of {declared:,} samples")
    return samples


def check_stored(out: Path, clip_id: str, frames: int, seconds: float | None) -> None:
    """Raises ClipError unless the stored clip has that many whole frames and seconds of sound."""
    folder, ending = out / "frames" / clip_id, "png" if seconds is None else "jpg"
    found = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    names = sorted(name for name in found if not name.startswith("."))  # a Mac adds ._0001.jpg
    whole = len(names) == frames  # first of all: a damaged list may say any number
    if not whole or names != [f"{number:04d}.{ending}" for number in range(1, frames + 1)]:
        expected = f"0001.{ending} to {frames:04d}"
        raise ClipError(f"damaged: {folder} has {len(names)} files, not {expected}")
    for name in names:
        check_picture(folder / name)
    if seconds is not None:
        path = out / "audio" / f"{clip_id}.wav"
        found = len(read_samples(path)) / SAMPLE_RATE
        if not abs(found - seconds) <= 1e-3:  # NaN is damage, too
            raise ClipError(f"damaged: {path} has {found:.3f} s, not {seconds:.3f}")
