"""`PublishedImages`: a data set that others have published, in its original layout, with a split of its own."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datamodules.cached import CachedImages
from datamodules.files.archives import unpack
from datamodules.files.cache import Items, reading
from datamodules.files.download import digest, download
from datamodules.files.splits import ClassSplit, find_split_file, read_split
from datamodules.files.storage import data_folder, facts, visible
from lightning_ntk.errors import ConfigError, DataError


@dataclass(frozen=True)
class Part:
    """A file or folder of a data set, and how it is come by.

    Args:
        path: its name, directly below `data.root` or at the top of its archive.
        archive: the file that holds it, taken from `data.root` when there is no such path; "" for none.
        urls: where the archive (or the file itself) can be fetched without asking anybody.
        checksum: of the archive or file, "md5:..." or "sha256:..."; "" where none is published.
    """

    path: str
    archive: str = ""
    urls: tuple[str, ...] = ()
    checksum: str = ""

    @property
    def file(self) -> str:
        """The name of what is fetched."""
        return self.archive or self.path


class PublishedImages(CachedImages):
    """A subclass names its parts and splits and lists the images of each class; see `datamodules.omniglot`.

    Args:
        root: the folder with the parts, unpacked or as they were published; None means a folder of the data set's name
            below $LIGHTNING_NTK_DATA or the user's data folder.
        split_file: another split: CSV with header `split,class`, or the name of a file in conf/splits.
        image_size: side of the square that images are resized to, in pixels; None means the size they have.
        download: fetch what is missing, where it is free to fetch.
        **rest: see `CachedImages`.
    """

    name: ClassVar[str]
    native_size: ClassVar[int | None] = None  # pixels, where all images have the same
    version: ClassVar[int] = 1  # Raise when `items` changes what it returns: the cache is keyed by it.
    takes_split_file: ClassVar[bool] = True
    tree: ClassVar[str]  # what lies in data.root, for errors
    source: ClassVar[str]  # where a person gets it, for errors

    def __init__(
        self,
        *,
        root: str | None = None,
        split_file: str | None = None,
        image_size: int | None = 84,
        download: bool = False,
        **rest: Any,
    ) -> None:
        if image_size is None and self.native_size is None:
            raise ConfigError(f"data.image_size must be given: the images of {self.name} differ in size.")
        # As conf/data has them: a published split is taken as it is.
        rest = {"allow_shared_images": True, "normalize": True, **rest}
        super().__init__(image_size=self.native_size if image_size is None else image_size, **rest)
        self.root = data_folder(root, self.name)
        self.split_file = split_file
        self.download = download
        self._split: ClassSplit | None = None

    # ---- what a data set provides ----------------------------------------------------------------------------------

    def parts(self) -> list[Part]:
        """What the data set consists of."""
        raise NotImplementedError

    def default_split(self) -> str:
        """The name of its split file in conf/splits."""
        return self.name

    def items(self, split: str, paths: dict[str, Path]) -> Items:
        """The images of the classes that `self.split` names for a split; `paths` says where each part lies.

        Raises `DataError` for a class that there is none of; `self.split.check_known` helps. A `FileNotFoundError`
        becomes one that shows what is expected.
        """
        raise NotImplementedError

    def settings(self) -> list[Any]:
        """Own settings that decide the images."""
        return []

    # ---- written once ----------------------------------------------------------------------------------------------

    @property
    def split(self) -> ClassSplit:
        """The split file's content."""
        if self._split is None:
            self._split = read_split(find_split_file(self.split_file or self.default_split()))
        return self._split

    def task_settings(self) -> dict[str, Any]:
        return super().task_settings() | {"split": self.split.file.stem}

    def made_from(self) -> list[Any]:
        where = [[part.path, facts(self.locate(part))] for part in self.parts()]
        return [self.version, self.split.classes, self.settings(), where]

    @contextlib.contextmanager
    def opened(self, workspace: Path) -> Iterator[Callable[[str], Items]]:
        paths = {part.path: self._unpacked(part, workspace) for part in self.parts()}

        def open_split(split: str) -> Items:
            if not self.split.classes.get(split):
                return {}
            try:
                items = self.items(split, paths)
            except FileNotFoundError as error:
                raise self.missing(error.filename) from error
            count = sum(map(len, items.values()))
            self.split.check_images(split, count, self.root, may_be_own=self.takes_split_file)
            return items

        yield open_split

    def missing(self, file: str | Path) -> DataError:
        """An error about a file of a part that is not there."""
        return DataError(f"{file} is missing, which {self.name} needs. {self.source}. Expected:\n{self.tree}")

    def has(self, *names: str) -> bool:
        """Whether files or folders of these names lie in the root: for data sets that come in several forms."""
        return all((self.root / name).exists() for name in names)

    def locate(self, part: Part) -> Path:
        """Where a part, or its archive, lies; fetched first if it may be.

        Raises:
            DataError: it is not there; the message shows what is expected and where to get it.
        """
        for candidate in filter(None, (part.path, part.archive)):
            if (self.root / candidate).exists():
                return self.root / candidate
        target = self.root / part.file
        # The root may be the part itself; not where it is empty or holds the beginning of a download alone.
        may_be = self.root.name == part.path and self.root.is_dir()
        if may_be and any(path.name != f"{part.file}.part" for path in visible(self.root)):
            return self.root
        if part.urls and self.download:
            download(part.urls, target, part.checksum)
            return target
        wanted = f"{part.path} or {part.archive}" if part.archive else part.path
        way = f"data.download=true fetches {part.file} from {part.urls[0]}" if part.urls else self.source
        folder = "" if self.root.is_dir() else " (there is no such folder)"
        raise DataError(
            f"data.root={self.root}{folder} has no {wanted}, which {self.name} needs. {way}. Expected:\n{self.tree}"
        )

    def _unpacked(self, part: Part, workspace: Path) -> Path:
        """Where a part lies as files; an archive is unpacked into the workspace."""
        found = self.locate(part)
        if found.name == part.path:
            return found
        if not (workspace / part.archive).exists():  # Several parts may share an archive.
            self._check(found, part)
            unpack(found, workspace / part.archive, "data.cache_dir")
        path = workspace / part.archive / part.path
        if not path.exists():
            raise DataError(f"Archive {found} holds no {part.path}. Expected:\n{self.tree}")
        return path

    @staticmethod
    def _check(archive: Path, part: Part) -> None:
        """Raise `DataError` unless an archive is the published one, where its checksum is known."""
        if part.checksum and (checksum := reading(digest, archive, part.checksum)) != part.checksum:
            raise DataError(
                f"{archive} has the checksum {checksum}, but the published file has {part.checksum}: it is damaged or "
                "another version. Get it again, or unpack it yourself if it is what you want."
            )
