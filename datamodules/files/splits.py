"""Split files: which classes are trained, validated and tested on.

CSV with the header `split,class`; further columns are allowed, and lines that begin with `#` before the header. The
committed ones (conf/splits/) say there what the split is, its source, how many classes and images each split must have,
and the SHA-256 of the lines that follow: a list that was changed by accident is refused.
"""

import csv
import hashlib
import posixpath
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from datamodules.base import SPLITS
from lightning_ntk.errors import ConfigError, DataError, nearest_name
from lightning_ntk.settings.config import conf_folder
from lightning_ntk.settings.paths import as_path


@dataclass(frozen=True)
class ClassSplit:
    """A split file's content.

    Attributes:
        file: where it was read.
        classes: `{"train": names, "val": names, "test": names}`, in the file's order, as normal paths; one may lack.
        images: the number of images that a split must have, where the file says so.
    """

    file: Path
    classes: dict[str, list[str]]
    images: dict[str, int]

    def check_known(self, known: Iterable[str], where: str) -> None:
        """Raise `DataError` for the first class that is not among the known ones."""
        known = set(known)
        for name in (name for names in self.classes.values() for name in names):
            if name not in known:
                if self.file.parent == conf_folder() / "splits":
                    raise DataError(
                        f"Class {name!r} of the published split {self.file.stem} is no {where}: something is missing "
                        "there, or it was unpacked into another folder."
                    )
                near = nearest_name(name, known)
                if _composed(name) in map(_composed, known):
                    near = " One of the same look is there, with its accents in other code points: copy its name."
                raise DataError(f"data.split_file={self.file} names class {name!r}, which is no {where}.{near}")

    def check_images(self, split: str, count: int, where: object, *, may_be_own: bool = True) -> None:
        """Raise `DataError` unless a split has the number of images that the file says, if it does.

        `may_be_own`: whether the data set takes other split files.
        """
        own = ", or give a split file of your own (data.split_file=FILE.csv with the header split,class)"
        if count != self.images.get(split, count):
            raise DataError(
                f"{where} has {count} images of the classes that {self.file.stem} names for {split}, but "
                f"{self.images[split]} are published: something is missing or too much. Get it "
                f"again{own if may_be_own else ''}."
            )


def find_split_file(name: str) -> Path:
    """The file of that path, or the committed one of that name."""
    committed = conf_folder() / "splits" / f"{name}.csv"
    return committed if committed.is_file() else as_path(name, "data.split_file")


def read_split(file: Path) -> ClassSplit:
    """Read and check a split file.

    Raises:
        ConfigError: it cannot be read, is no such file, or is not what its own header says.
    """
    try:
        # Spreadsheets put a mark before the header.
        lines = file.read_bytes().decode("utf-8-sig").splitlines(keepends=True)
        length = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
        header, body = "".join(lines[:length]), lines[length:]
        rows = list(csv.DictReader(body))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        committed = [path.stem for path in (conf_folder() / "splits").glob("*.csv")]
        near = nearest_name(file.name, committed) if isinstance(error, FileNotFoundError) else ""
        near = " Save it as UTF-8." if isinstance(error, UnicodeDecodeError) else near
        raise ConfigError(f"data.split_file={file} cannot be read: {error}.{near}") from error
    if not rows or not {"split", "class"} <= rows[0].keys():
        raise ConfigError(f'data.split_file={file} must be a CSV file with the header "split,class" and rows.')
    classes: dict[str, list[str]] = {}
    seen: dict[str, str] = {}
    for row in rows:
        split, name = row["split"], row["class"]
        if split not in SPLITS:
            raise ConfigError(f"data.split_file={file} names the split {split!r}; expected train, val or test.")
        if not name:
            raise ConfigError(f"data.split_file={file} has a row for {split} without a class.")
        name = posixpath.normpath(name)  # "./a" and "a/" are the folder "a".
        if name in seen:
            raise ConfigError(f"data.split_file={file} names class {name!r} twice, for {seen[name]} and {split}.")
        seen[name] = split
        classes.setdefault(split, []).append(name)
    _check_header(file, header, "".join(body), classes)
    return ClassSplit(file, classes, _counts(header, "images"))


def _composed(name: str) -> str:
    """Letters and accents as one: file systems and editors keep them so or apart (Unicode's NFC and NFD)."""
    return unicodedata.normalize("NFC", name)


def _check_header(file: Path, header: str, body: str, classes: dict[str, list[str]]) -> None:
    stated = re.search(r"sha256[^:]*: ([0-9a-f]{64})", header)
    if stated and hashlib.sha256(body.replace("\r\n", "\n").encode()).hexdigest() != stated.group(1):
        raise ConfigError(
            f"data.split_file={file} does not have the SHA-256 that it states: it was changed or damaged. Restore it, "
            "or keep a changed split under another name without the sha256 line."
        )
    for split, count in _counts(header, "classes").items():
        if len(classes.get(split, [])) != count:
            raise ConfigError(f"data.split_file={file} has {len(classes.get(split, []))} {split} classes, not {count}.")


def _counts(header: str, what: str) -> dict[str, int]:
    """`# images: train 10, test 5` as a dict."""
    line = re.search(rf"^# {what}: (.*)$", header, re.MULTILINE)
    return {split: int(count) for split, count in re.findall(r"(\w+) (\d+)", line.group(1))} if line else {}
