"""Downloads: from mirrors, resumed where they stopped, checked, and moved into place whole."""

import hashlib
import http.client
import ssl
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from datamodules.files.storage import check_space, locked, writing
from lightning_ntk.errors import DataError
from lightning_ntk.version import __version__

BLOCK = 1 << 20  # bytes
TIMEOUT = 30  # seconds without an answer
ATTEMPTS = 3  # of each mirror; a later one goes on where the earlier stopped


class _Broken(Exception):
    """One attempt failed; the message says how."""


def download(urls: Sequence[str], target: Path, checksum: str, key: str = "data.root") -> None:
    """Fetch a file unless it is there; what has arrived of it stays in `target.part` and is gone on from.

    Args:
        urls: mirrors, asked in turn.
        checksum: "md5:..." or "sha256:...", in hexadecimal.
        key: the setting that decides where the file goes, for errors.

    Raises:
        DataError: no mirror gave the file, or the disk cannot be written.
    """
    with writing(target.parent, key):
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(target.with_name(f".{target.name}.lock")):
            if not target.exists():
                _from_mirrors(urls, target, checksum, key)


def _from_mirrors(urls: Sequence[str], target: Path, checksum: str, key: str) -> None:
    part = target.with_name(f"{target.name}.part")
    failures = []
    for url in urls:
        for _ in range(ATTEMPTS):
            resumed = part.exists()
            try:
                _fetch(url, part, key)
                found = digest(part, checksum)
                if found != checksum:
                    part.unlink()
                    raise _Broken(f"its checksum is {found}, but {checksum} was expected")
                part.replace(target)
                return
            except _Broken as error:
                failures.append(f"{url}: {error}")
                if not resumed and not part.exists():  # The next attempt would only repeat this one.
                    break
    raise DataError(
        f"{target.name} could not be fetched ({'; '.join(dict.fromkeys(failures))}). Try again: it goes on from what "
        f"has arrived. Or fetch it otherwise and put it at {target}."
    )


def _fetch(url: str, part: Path, key: str) -> None:
    """Fetch what the part file lacks."""
    start = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": f"lightning_ntk/{__version__}"} | ({"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as answer:
            if start and answer.status != 206:  # A server that cannot resume sends all of it.
                start = 0
            length = answer.headers.get("Content-Length")
            total = None if length is None else start + int(length)
            if length is not None:
                check_space(part.parent, int(length), key)
            _receive(answer, part, start, total)
    except urllib.error.HTTPError as error:
        if error.code == 416 and start:  # Nothing lacks, or the part is of another file: its checksum decides.
            return
        raise _Broken(f"{error.code} {error.reason}") from error
    except (urllib.error.URLError, TimeoutError, ConnectionError, ssl.SSLError, http.client.HTTPException) as error:
        raise _Broken(str(getattr(error, "reason", error)) or type(error).__name__) from error
    if total is not None and part.stat().st_size < total:
        raise _Broken(f"the connection ended after {part.stat().st_size} of {total} bytes")


def _receive(answer: http.client.HTTPResponse, part: Path, start: int, total: int | None) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with (
        part.open("ab" if start else "wb") as file,
        Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task(f"Fetching {part.stem}", total=total, completed=start)
        while block := answer.read(BLOCK):
            file.write(block)
            progress.advance(task, len(block))


def digest(file: Path, like: str) -> str:
    """The checksum of a file, "algorithm:hexadecimal", by the algorithm of another one."""
    algorithm = like.partition(":")[0]
    found = hashlib.new(algorithm)  # MD5 is what the publishers give; it finds damage, not forgery.
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            found.update(block)
    return f"{algorithm}:{found.hexdigest()}"
