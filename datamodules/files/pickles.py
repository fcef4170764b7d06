"""Pickles of others, read without running anything: numpy arrays, text, bytes, numbers and plain containers only."""

import collections
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.files.storage import in_units
from lightning_ntk.errors import DataError


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of Python 3 in an old protocol, and of arrays in it, write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


# numpy's own functions, taken from what it writes: their modules have been renamed more than once.
_RECONSTRUCT = np.zeros(1).__reduce__()[0]
_FROM_BUFFER = np.zeros(1).__reduce_ex__(5)[0]
_SCALAR = np.float64(1).__reduce__()[0]
ADMITTED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "scalar"): _SCALAR,
    ("numpy._core.multiarray", "scalar"): _SCALAR,
    ("numpy.core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("numpy._core.numeric", "_frombuffer"): _FROM_BUFFER,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): collections.OrderedDict,
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (bytes, bytearray, set, frozenset, complex)
    },
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ADMITTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which data has no use for") from None


def load_pickle(file: Path) -> Any:
    """The content of a pickle, of Python 2 or 3; text of Python 2 is read as latin-1, as arrays in it need.

    Raises:
        DataError: it is damaged, asks for anything but arrays and plain values (nothing of it has then been run), or
            does not fit into memory.
        OSError: the file is not there, or may not be read.
    """
    try:
        with file.open("rb") as stream:
            return _Unpickler(stream, encoding="latin1").load()
    except OSError:  # The file's: what is admitted opens none.
        raise
    except MemoryError as error:
        raise DataError(
            f"Pickle {file} of {in_units(file.stat().st_size)} does not fit into memory. Make room there; if it is "
            "damaged, get it again."
        ) from error
    except Exception as error:  # A damaged pickle can raise anything.
        raise DataError(
            f"Pickle {file} cannot be read ({str(error) or type(error).__name__}). Only arrays and plain values are "
            "admitted: nothing in it was run. Get it again."
        ) from error
