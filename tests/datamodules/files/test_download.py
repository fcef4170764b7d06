"""Downloads from a server on this machine that cuts, lies, refuses and resumes."""

import errno
import hashlib
import http.server
import threading
from pathlib import Path

import numpy as np
import pytest

from datamodules.files import download as module
from datamodules.files import storage
from datamodules.files.download import download
from lightning_ntk.errors import DataError

CONTENT = np.random.default_rng(0).bytes(300_000)
MD5 = f"md5:{hashlib.md5(CONTENT).hexdigest()}"
SHA256 = f"sha256:{hashlib.sha256(CONTENT).hexdigest()}"


class Handler(http.server.BaseHTTPRequestHandler):
    """/whole can resume, /plain cannot, /wrong is another file, /cut stops after 100 kB, /gone is 404."""

    asked: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.asked.append((self.path, wanted))
        if self.path == "/gone":
            self.send_error(404)
            return
        body = CONTENT[::-1] if self.path == "/wrong" else CONTENT
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.path != "/plain" else 0
        if start >= len(body):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if self.path != "/unknown":
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start : start + 100_000] if self.path == "/cut" else body[start:])

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def _nothing_asked():
    Handler.asked.clear()


def names(folder):
    return {path.name for path in folder.iterdir()} - {".x.zip.lock"}


@pytest.mark.parametrize("checksum", [MD5, SHA256])
@pytest.mark.parametrize("path", ["/whole", "/plain", "/unknown"])
def test_a_file_is_fetched_checked_and_moved_into_place(address, tmp_path, path, checksum):
    target = tmp_path / "new" / "x.zip"
    download([address + path], target, checksum)
    assert target.read_bytes() == CONTENT
    assert names(target.parent) == {"x.zip"}
    download([address + path], target, checksum)
    assert len(Handler.asked) == 1, "what is there must not be fetched again"


def test_a_download_that_stops_is_gone_on_from(address, tmp_path):
    download([f"{address}/cut"], tmp_path / "x.zip", MD5)
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert [wanted for _, wanted in Handler.asked] == [None, "bytes=100000-", "bytes=200000-"]


def test_what_an_earlier_process_fetched_is_gone_on_from(address, tmp_path):
    (tmp_path / "x.zip.part").write_bytes(CONTENT[:123])
    download([f"{address}/whole"], tmp_path / "x.zip", MD5)
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert Handler.asked == [("/whole", "bytes=123-")]


@pytest.mark.parametrize("start", [CONTENT, CONTENT[::-1], CONTENT + b"more", b"of another file"])
def test_a_part_file_that_is_whole_or_of_another_file_does_no_harm(address, tmp_path, start):
    (tmp_path / "x.zip.part").write_bytes(start)
    download([f"{address}/whole"], tmp_path / "x.zip", MD5)
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert names(tmp_path) == {"x.zip"}


def test_a_server_that_cannot_resume_sends_all_of_it(address, tmp_path):
    (tmp_path / "x.zip.part").write_bytes(CONTENT[:123])
    download([f"{address}/plain"], tmp_path / "x.zip", MD5)
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert Handler.asked == [("/plain", "bytes=123-")]


def test_a_truncated_download_is_named_and_kept_for_the_next_time(address, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "ATTEMPTS", 1)
    with pytest.raises(
        DataError, match=r"x\.zip could not be fetched .*/cut: the connection ended after 100000 of 300000"
    ):
        download([f"{address}/cut"], tmp_path / "x.zip", MD5)
    assert names(tmp_path) == {"x.zip.part"}
    download([f"{address}/whole"], tmp_path / "x.zip", MD5)
    assert (tmp_path / "x.zip").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing(address, tmp_path):
    wrong = hashlib.md5(CONTENT[::-1]).hexdigest()
    with pytest.raises(DataError, match=rf"its checksum is md5:{wrong}, but {MD5} was expected.*put it at .*x\.zip"):
        download([f"{address}/wrong"], tmp_path / "x.zip", MD5)
    assert names(tmp_path) == set()
    assert len(Handler.asked) == 1


def test_the_next_mirror_is_asked(address, tmp_path):
    mirrors = ["http://127.0.0.1:9/closed", f"{address}/gone", f"{address}/wrong", f"{address}/whole"]
    download(mirrors, tmp_path / "x.zip", MD5)
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    with pytest.raises(DataError, match=r"closed: .*refused.*; .*/gone: 404"):
        download(mirrors[:2], tmp_path / "y.zip", MD5)


def test_a_full_or_read_only_disk_is_named_with_its_setting(address, tmp_path, monkeypatch):
    plain = Path.open

    def full(path, mode="r", *rest, **more):
        return open("/dev/full", mode) if path.suffix == ".part" and "b" in mode else plain(path, mode, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(DataError, match=r"cannot be written: No space left on device.*data\.root"):
            download([f"{address}/whole"], tmp_path / "x.zip", MD5)
    with monkeypatch.context() as patch:
        patch.setattr(storage.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
        with pytest.raises(DataError, match=r"1 kB free, but 300 kB are needed"):
            download([f"{address}/whole"], tmp_path / "y.zip", MD5)

    def read_only(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(DataError, match=r"cannot be written: Read-only file system.*data\.root"):
        download([f"{address}/whole"], tmp_path / "z.zip", MD5)


def test_two_that_ask_at_once_fetch_it_once(address, tmp_path):
    threads = [
        threading.Thread(target=download, args=([f"{address}/whole"], tmp_path / "x.zip", MD5)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "x.zip").read_bytes() == CONTENT
    assert len(Handler.asked) == 1
