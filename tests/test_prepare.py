"""data/prepare.py against a web server on this machine: no test leaves 127.0.0.1."""

import errno
import importlib.util
import io
import os
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "data" / "prepare.py"
spec = importlib.util.spec_from_file_location("prepare", SCRIPT)
prepare = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)
REAL_SHA256 = prepare.FSDD_SHA256

TOP = "free-spoken-digit-dataset-1.0.10"
RECORDINGS = {f"{digit}_{speaker}_7.wav": os.urandom(500) for digit in "03" for speaker in "ab"}
GOOD = {f"{TOP}/recordings/{name}": content for name, content in RECORDINGS.items()}
GOOD |= {f"{TOP}/README.md": b"no recording", f"{TOP}/recordings/notes.txt": b"no recording"}


def make_tar(entries: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def make_zip(entries: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """Answers with `server.bodies[path]`, or breaks off in the way that the path names."""

    def do_GET(self):
        self.server.requests.append(self.path)
        body = self.server.bodies.get(self.path)
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
    server.bodies = {"/good": make_tar(GOOD), "/cut": make_tar(GOOD)}
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
    expected = tmp_path / "expected"
    write_recordings(expected)
    monkeypatch.setattr(prepare, "FSDD_SHA256", prepare.recordings_sha256(expected))
    (tmp_path / "work").mkdir()
    return tmp_path / "work" / "data" / "fsdd"


def write_recordings(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, content in RECORDINGS.items():
        (folder / name).write_bytes(content)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_success(out: Path, capsys) -> None:
    """The recordings and nothing else are in place, and one line says so."""
    output = capsys.readouterr()
    assert output.err == "" and output.out.count("\n") == 1
    assert f"{out / 'recordings'}: 4 recordings, 0.0 MB" in output.out
    assert f"next: python pmr.py --dataset av-digits --data-root {out.parent}\n" in output.out
    assert [path.name for path in out.iterdir()] == ["recordings"]
    assert [path.name for path in out.parent.iterdir()] == ["fsdd"]
    assert read_folder(out / "recordings") == RECORDINGS


def check_failure(code: int, capsys, *words: str) -> None:
    """The exit code is 1 and one line on stderr has all of the words."""
    output = capsys.readouterr()
    assert code == 1 and output.out == ""
    assert output.err.startswith("prepare.py: ") and output.err.count("\n") == 1
    for word in words:
        assert word in output.err


def check_nothing_left(out: Path) -> None:
    assert list(out.parent.parent.iterdir()) == []


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_download(server, out, capsys, make):
    server.bodies["/good"] = make(GOOD)
    assert prepare.main(["fsdd", "--out", str(out), "--url", server.url + "/good"]) == 0
    check_success(out, capsys)
    assert server.requests == ["/good"]


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_source_is_used_instead_of_a_download(out, tmp_path, capsys, monkeypatch, make):
    monkeypatch.setattr(prepare, "download", lambda *args: pytest.fail("it downloads"))
    source = tmp_path / "mine"
    source.write_bytes(make(GOOD))
    assert prepare.main(["fsdd", "--out", str(out), "--source", str(source)]) == 0
    check_success(out, capsys)
    assert source.exists()


def test_out_that_exists_and_is_empty(out, tmp_path, capsys):
    out.mkdir(parents=True)
    source = tmp_path / "mine"
    source.write_bytes(make_tar(GOOD))
    assert prepare.main(["fsdd", "--out", str(out), "--source", str(source)]) == 0
    check_success(out, capsys)


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_entries_that_point_outside_are_not_written(out, tmp_path, capsys, make):
    evil = {
        "../evil.wav": b"",
        "../../recordings/../evil.wav": b"",
        f"{tmp_path}/absolute.wav": b"",
        f"{TOP}/recordings/../0_evil_0.wav": b"",
        f"{TOP}/recordings/..\\0_evil_0.wav": b"",
        f"{TOP}/recordings/sub/0_evil_0.wav": b"",
        f"{TOP}/not-recordings/0_evil_0.wav": b"",
        f"{TOP}/recordings/0_evil_0.wav\n": b"",
    }
    # this one has a good name: it must end up inside, whatever its folders say
    first = next(iter(RECORDINGS))
    moved = {f"../../../recordings/{first}": RECORDINGS[first]}
    source = tmp_path / "mine"
    source.write_bytes(make(evil | {k: v for k, v in GOOD.items() if first not in k} | moved))
    assert prepare.main(["fsdd", "--out", str(out), "--source", str(source)]) == 0
    check_success(out, capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "mine", "work"]
    assert [path.name for path in out.parent.parent.iterdir()] == ["data"]
    assert not list(tmp_path.rglob("*evil*"))


def test_links_in_a_tar_are_not_followed(out, tmp_path, capsys):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        link = tarfile.TarInfo(f"{TOP}/recordings/0_a_7.wav")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    source = tmp_path / "mine"
    source.write_bytes(file.getvalue())
    code = prepare.main(["fsdd", "--out", str(out), "--source", str(source)])
    check_failure(code, capsys, "has no recordings/*.wav")
    check_nothing_left(out)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/missing", "HTTP Error 404"),
        ("/cut", " bytes came"),
        ("/cut-chunk", "IncompleteRead"),
        ("/reset", "Connection reset"),
        ("/silent", "timed out"),
    ],
)
def test_failed_download(server, out, capsys, monkeypatch, path, words):
    monkeypatch.setattr(prepare, "TIMEOUT_S", 0.2)
    code = prepare.main(["fsdd", "--out", str(out), "--url", server.url + path])
    check_failure(code, capsys, server.url + path, words, "try again later", "--source FILE")
    check_nothing_left(out)


def test_nothing_listens(server, out, capsys):
    with socket.socket() as unused:  # bound but not listening: nobody else can take the port
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/good"
        code = prepare.main(["fsdd", "--out", str(out), "--url", url])
    check_failure(code, capsys, url, "refused", "--source FILE")
    check_nothing_left(out)


def test_url_that_is_none(out, capsys):
    check_failure(prepare.main(["fsdd", "--out", str(out), "--url", "nowhere"]), capsys, "--url")
    check_nothing_left(out)


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>please log in</html>", make_tar(GOOD)[:-100], make_zip(GOOD)[:-100]],
    ids=["empty", "html", "half a tar.gz", "half a zip"],
)
def test_damaged_archive(server, out, capsys, body):
    server.bodies["/bad"] = body
    code = prepare.main(["fsdd", "--out", str(out), "--url", server.url + "/bad"])
    check_failure(code, capsys, server.url + "/bad", "damaged or not", "download it again")
    check_nothing_left(out)


def test_wrong_hash(server, out, capsys):
    server.bodies["/good"] = make_tar(GOOD | {f"{TOP}/recordings/0_a_7.wav": b"other"})
    code = prepare.main(["fsdd", "--out", str(out), "--url", server.url + "/good"])
    check_failure(code, capsys, "4 recordings", "SHA-256", prepare.FSDD_SHA256, "try again")
    check_nothing_left(out)


def test_archive_without_recordings(server, out, capsys):
    server.bodies["/good"] = make_tar({f"{TOP}/README.md": b"text"})
    code = prepare.main(["fsdd", "--out", str(out), "--url", server.url + "/good"])
    check_failure(code, capsys, "has no recordings/*.wav", prepare.FSDD_URL)
    check_nothing_left(out)


def test_missing_source(out, capsys):
    code = prepare.main(["fsdd", "--out", str(out), "--source", "no-such-file.zip"])
    check_failure(code, capsys, "no-such-file.zip", "--source")
    check_nothing_left(out)


def test_complete_folder_is_kept_without_a_download(server, out, capsys):
    write_recordings(out / "recordings")
    assert prepare.main(["fsdd", "--out", str(out), "--url", server.url + "/good"]) == 0
    assert "already holds all 4 recordings" in capsys.readouterr().out
    assert server.requests == []


@pytest.mark.parametrize("change", ["missing", "changed", "extra", "empty", "file"])
def test_other_folder_is_neither_used_nor_touched(server, out, capsys, change):
    recordings = out / "recordings"
    write_recordings(recordings)
    if change == "missing":
        (recordings / "0_a_7.wav").unlink()
    elif change == "changed":
        (recordings / "0_a_7.wav").write_bytes(b"other")
    elif change == "extra":
        (recordings / "9_z_9.wav").write_bytes(b"")
    else:
        shutil.rmtree(recordings)
        recordings.mkdir() if change == "empty" else recordings.write_bytes(b"")
    before = sorted(out.rglob("*"))
    code = prepare.main(["fsdd", "--out", str(out), "--url", server.url + "/good"])
    check_failure(code, capsys, str(recordings), "incomplete or changed", "move it away")
    assert sorted(out.rglob("*")) == before and server.requests == []


def test_out_that_cannot_be_written(out, tmp_path, capsys):
    source = tmp_path / "mine"
    source.write_bytes(make_tar(GOOD))
    (tmp_path / "file").write_bytes(b"")  # a file where a folder has to be: root fails here too
    target = tmp_path / "file" / "fsdd"
    before = sorted(tmp_path.rglob("*"))
    code = prepare.main(["fsdd", "--out", str(target), "--source", str(source)])
    check_failure(code, capsys, str(target), "Not a directory", "check that you may write")
    assert sorted(tmp_path.rglob("*")) == before


def test_out_with_a_name_too_long(server, out, capsys):
    too_long = out / ("a" * 300)
    code = prepare.main(["fsdd", "--out", str(too_long), "--url", server.url + "/good"])
    check_failure(code, capsys, str(too_long), "File name too long")
    check_nothing_left(out)


@pytest.mark.parametrize("text", ["data/fsdd", "./data/fsdd/", "gone/../data/fsdd"])
def test_relative_out(out, tmp_path, monkeypatch, capsys, text):
    monkeypatch.chdir(out.parent.parent)
    source = tmp_path / "mine"
    source.write_bytes(make_tar(GOOD))
    assert prepare.main(["fsdd", "--out", text, "--source", str(source)]) == 0
    line = capsys.readouterr().out
    assert f"{Path(text)}/recordings: 4 recordings" in line
    assert ("--data-root" in line) == text.startswith("gone")  # not needed for pmr.py's own default
    assert read_folder(out / "recordings") == RECORDINGS
    assert [path.name for path in Path().iterdir()] == ["data"]


def test_full_disk(server, out, capsys, monkeypatch):
    def write_bytes(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(prepare.Path, "write_bytes", write_bytes)
    code = prepare.main(["fsdd", "--out", str(out), "--url", server.url + "/good"])
    check_failure(code, capsys, str(out), "No space left", "the disk has room")
    check_nothing_left(out)


def test_interrupt(out, capsys, monkeypatch):
    def interrupt(url, path):
        path.write_bytes(b"the first part")
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "download", interrupt)
    check_failure(prepare.main(["fsdd", "--out", str(out)]), capsys, "interrupted")
    check_nothing_left(out)


def test_command_line_ends_in_a_sentence_not_a_traceback(server, tmp_path):
    arguments = ["fsdd", "--out", str(tmp_path / "data" / "fsdd"), "--url", server.url + "/missing"]
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("prepare.py: ") and result.stderr.count("\n") == 1
    assert "HTTP Error 404" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["fsdd", "--url", "http://127.0.0.1/x", "--source", "x"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        prepare.main(arguments)
    assert error.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_hash_is_over_sorted_names_and_bytes(tmp_path):
    (tmp_path / "1_b_0.wav").write_bytes(b"second")
    (tmp_path / "0_a_0.wav").write_bytes(b"first")
    (tmp_path / "notes.txt").write_bytes(b"not counted")
    expected = prepare.hashlib.sha256(b"0_a_0.wavfirst1_b_0.wavsecond").hexdigest()
    assert prepare.recordings_sha256(tmp_path) == expected
    assert prepare.recordings_sha256(str(tmp_path)) == expected


def test_hash_of_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*gone.*python data/prepare.py fsdd"):
        prepare.recordings_sha256(tmp_path / "gone")


def test_real_data():
    folder = Path(os.environ.get("DATA_ROOT", "data"), "fsdd", "recordings")
    if not folder.exists():
        pytest.skip(f"real data: no {folder}, run `python data/prepare.py fsdd` or set DATA_ROOT")
    assert prepare.recordings_sha256(folder) == REAL_SHA256
