"""Archives of others, unpacked without leaving the folder meant for them, whole or not at all."""

import lzma
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

from datamodules.files.storage import check_space, scratch, writing
from lightning_ntk.errors import DataError

# What a truncated or otherwise damaged archive raises.
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)
BLOCK = 1 << 20  # bytes copied at once


def unpack(archive: Path, folder: Path, key: str) -> None:
    """Unpack a .zip or .tar(.gz, .bz2, .xz) into a new folder: regular files and folders, nothing else.

    Args:
        folder: must not exist; does afterwards, or nothing does.
        key: the setting that leads to another disk, for errors.

    Raises:
        DataError: the archive is damaged or unsafe, or the disk cannot be written.
    """
    try:
        archive.open("rb").close()
    except OSError as error:
        raise DataError(f"Archive {archive} cannot be read: {error.strerror or error}.") from error
    with writing(folder.parent, key), scratch(folder.parent, folder.name) as unfinished:
        try:
            if zipfile.is_zipfile(archive):
                _unpack_zip(archive, unfinished, key)
            else:
                _unpack_tar(archive, unfinished, key)
        except DataError:
            raise
        except (*DAMAGE, OSError) as error:
            # Of an OSError, only those without a number are the archive's: "Not a gzipped file", "Invalid data stream".
            if isinstance(error, OSError) and error.errno is not None:
                raise
            said = str(error).partition("\n")[0].rstrip(":") or type(error).__name__
            raise DataError(
                f"Archive {archive} is truncated or damaged ({said}). Remove it and get it again."
            ) from error
        unfinished.rename(folder)


def _unpack_zip(archive: Path, folder: Path, key: str) -> None:
    with zipfile.ZipFile(archive) as content:
        members = content.infolist()
        check_space(folder, sum(member.file_size for member in members), key)
        for member in members:
            target = _inside(archive, folder, member.filename)
            kind = member.external_attr >> 28  # Of Unix: 0o12 is a link.
            if kind == 0o12:
                raise DataError(f"Archive {archive} holds a link, {member.filename!r}: it is not unpacked.")
            if member.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                with content.open(member) as source:
                    _copy(source, target)


def _unpack_tar(archive: Path, folder: Path, key: str) -> None:
    # Member after member, as they lie: going back in a compressed archive would decompress it anew.
    with tarfile.open(archive) as content:
        for member in content:
            target = _inside(archive, folder, member.name)
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
            elif member.isfile():
                check_space(folder, member.size, key)
                _copy(content.extractfile(member), target)
            else:
                raise DataError(f"Archive {archive} holds a link or device, {member.name!r}: it is not unpacked.")
        while content.fileobj.read(BLOCK):  # What is compressed is checked at its end.
            pass


def _inside(archive: Path, folder: Path, name: str) -> Path:
    """Where a member goes; raises `DataError` for one that would leave the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive:
        raise DataError(f"Archive {archive} holds {name!r}, which lies outside of its folder: it is not unpacked.")
    return folder.joinpath(*path.parts)


def _copy(source: BinaryIO, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        while block := source.read(BLOCK):
            file.write(block)
