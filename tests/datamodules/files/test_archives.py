"""Archives: unpacked whole or not at all, and never outside of their folder."""

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from datamodules.files import archives, storage
from datamodules.files.archives import unpack
from lightning_ntk.errors import DataError

CONTENT = {"data/a.txt": b"first" * 5000, "data/deep/b.bin": bytes(range(256)) * 50}


def make_archive(file, members=CONTENT):
    if file.suffix == ".zip":
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
            for name, content in members.items():
                target.writestr(name, content)
    else:
        with tarfile.open(file, "w:" + {".tar": "", ".gz": "gz", ".bz2": "bz2", ".xz": "xz"}[file.suffix]) as target:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                target.addfile(member, io.BytesIO(content))
    return file


@pytest.fixture(params=["x.zip", "x.tar", "x.tar.gz", "x.tar.bz2", "x.tar.xz"])
def archive(request, tmp_path):
    return make_archive(tmp_path / request.param)


def test_an_archive_is_unpacked_whole(archive, tmp_path):
    unpack(archive, tmp_path / "out", "data.root")
    found = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == CONTENT
    assert {path.name for path in tmp_path.iterdir()} == {archive.name, "out"}


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped"])
def test_a_damaged_archive_is_named_and_leaves_nothing(archive, tmp_path, damage):
    whole = archive.read_bytes()
    middle = len(whole) // 2
    spoilt = {
        "cut": whole[:middle],
        "empty": b"",
        "text": b"not an archive" * 100,
        "flipped": whole[:middle] + bytes(255 - x for x in whole[middle : middle + 40]) + whole[middle + 40 :],
    }[damage]
    if (archive.suffix, damage) == (".tar", "flipped"):
        pytest.skip("a plain .tar has no checksum of its content")
    archive.write_bytes(spoilt)
    with pytest.raises(DataError, match=rf"Archive .*{archive.name} is truncated or damaged \(.+\)\. Remove it"):
        unpack(archive, tmp_path / "out", "data.root")
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


@pytest.mark.parametrize(
    "name", ["../evil.txt", "/tmp/lightning_ntk_evil.txt", "data/../../evil.txt", "..\\evil.txt", "C:\\x"]
)
@pytest.mark.parametrize("kind", ["x.zip", "x.tar"])
def test_nothing_is_written_outside_of_the_folder(tmp_path, name, kind):
    archive = make_archive(tmp_path / kind, {"fine.txt": b"x", name: b"evil"})
    (tmp_path / "inner").mkdir()
    with pytest.raises(DataError, match="lies outside of its folder"):
        unpack(archive, tmp_path / "inner" / "out", "data.root")
    assert not Path("/tmp/lightning_ntk_evil.txt").exists()
    assert {path.name for path in tmp_path.rglob("*")} == {kind, "inner"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_of_a_tar_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "x.tar", "w") as target:
        member = tarfile.TarInfo("entry")
        member.type, member.linkname = kind, "/etc/passwd"
        target.addfile(member)
    with pytest.raises(DataError, match="holds a link or device, 'entry'"):
        unpack(tmp_path / "x.tar", tmp_path / "out", "data.root")
    assert not (tmp_path / "out").exists()


def test_links_of_a_zip_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as target:
        member = zipfile.ZipInfo("entry")
        member.create_system, member.external_attr = 3, 0o120777 << 16
        target.writestr(member, "/etc/passwd")
    with pytest.raises(DataError, match="holds a link, 'entry'"):
        unpack(tmp_path / "x.zip", tmp_path / "out", "data.root")
    assert not (tmp_path / "out").exists()


def test_a_full_disk_is_not_taken_for_a_damaged_archive(archive, tmp_path, monkeypatch):
    def onto_a_full_disk(source, target):
        with open("/dev/full", "wb") as file:
            file.write(source.read())

    with monkeypatch.context() as patch:
        patch.setattr(archives, "_copy", onto_a_full_disk)
        with pytest.raises(DataError, match=r"cannot be written: No space left on device.*data\.root"):
            unpack(archive, tmp_path / "out", "data.root")
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 100}))
    with pytest.raises(DataError, match=r"100 bytes free, but \d+ kB are needed"):
        unpack(archive, tmp_path / "out", "data.root")
    assert [path.name for path in tmp_path.iterdir()] == [archive.name]


def test_a_missing_archive_is_named(tmp_path):
    with pytest.raises(DataError, match=r"missing\.zip cannot be read: No such file"):
        unpack(tmp_path / "missing.zip", tmp_path / "out", "data.root")
