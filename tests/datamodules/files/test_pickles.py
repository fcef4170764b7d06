"""Pickles are read without running anything."""

import collections
import os
import pickle
import subprocess

import numpy as np
import pytest

from datamodules.files import pickles
from datamodules.files.pickles import load_pickle
from lightning_ntk.errors import DataError

DATA = {
    "image_data": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
    "floats": np.linspace(0, 1, 3),
    "class_dict": collections.OrderedDict(a=[0, 1], b=[np.int64(2)]),
    "bytes": b"\x00\xff",
    "array of arrays": np.array([np.zeros(2, np.uint8), None], dtype=object),
    "plain": [1, 2.5, None, True, "text é", (1, {2}), frozenset([3])],
}


def equal(a, b):
    if isinstance(a, np.ndarray):
        return (
            a.dtype == b.dtype and a.shape == b.shape and all(equal(x, y) for x, y in zip(a.flat, b.flat, strict=True))
        )
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_plain_values_of_every_protocol_are_read(tmp_path, protocol):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(DATA, protocol))
    assert equal(load_pickle(tmp_path / "x.pkl"), DATA)


@pytest.mark.parametrize("names", [(b"numpy.core", b"numpy._core"), (b"numpy._core", b"numpy.core")])
def test_both_names_of_numpys_modules_are_read(tmp_path, names):
    """numpy 2 renamed the module whose functions stand in pickles; protocol 0 holds names without their lengths."""
    array = np.arange(6, dtype=np.uint8)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(array, 0).replace(*names))
    assert np.array_equal(load_pickle(tmp_path / "x.pkl"), array)


def test_a_pickle_of_python_2_is_read(tmp_path):
    # As Python 2 wrote {"name": "caf\xe9", "data": np.array([1, 254], np.uint8)}: text and pixels as byte strings.
    (tmp_path / "x.pkl").write_bytes(
        b"(dp0\nS'name'\np1\nS'caf\\xe9'\np2\nsS'data'\np3\ncnumpy.core.multiarray\n_reconstruct\np4\n(cnumpy\nndarray\np5\n"
        b"(I0\ntp6\nS'b'\np7\ntp8\nRp9\n(I1\n(I2\ntp10\ncnumpy\ndtype\np11\n(S'u1'\np12\nI0\nI1\ntp13\nRp14\n"
        b"(I3\nS'|'\np15\nNNNI-1\nI-1\nI0\ntp16\nbI00\nS'\\x01\\xfe'\np17\ntp18\nbs."
    )
    content = load_pickle(tmp_path / "x.pkl")
    assert content["name"] == "café"
    assert content["data"].tolist() == [1, 254]
    assert content["data"].dtype == np.uint8


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [os.system, subprocess.getoutput, eval, exec, open, getattr, __import__])
def test_a_malicious_pickle_runs_nothing(tmp_path, function, protocol):
    harmless_looking = {"image_data": np.zeros(2), "class_dict": Evil(function, f"touch {tmp_path}/owned")}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(harmless_looking, protocol))
    with pytest.raises(DataError, match=r"Pickle .*x\.pkl cannot be read \(it asks for .*nothing in it was run"):
        load_pickle(tmp_path / "x.pkl")
    assert [path.name for path in tmp_path.iterdir()] == ["x.pkl"]


@pytest.mark.parametrize(
    "text",
    [
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nfromfile\n(S'x'\ntR.",
        b"cnumpy.testing._private.utils\nrunstring\n(S'x'\ntR.",
        b"ccodecs\nopen\n(S'x'\ntR.",
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"cbuiltins\nbytes.__class__\n.",
        b"\x80\x04\x8c\x05numpy\x8c\x07ndarray\x93\x8c\x04dump\x93.",
    ],
)
def test_what_lies_beside_the_admitted_names_is_refused(tmp_path, text):
    (tmp_path / "x.pkl").write_bytes(text)
    with pytest.raises(DataError, match=r"cannot be read"):
        load_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_pickle_is_named(tmp_path, damage):
    whole = pickle.dumps(DATA)
    (tmp_path / "x.pkl").write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello\n"}[damage])
    with pytest.raises(DataError, match=r"Pickle .*x\.pkl cannot be read \(.+\)"):
        load_pickle(tmp_path / "x.pkl")


def test_what_is_not_damaged_is_not_called_so(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        load_pickle(tmp_path / "x.pkl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        load_pickle(tmp_path / "folder")

    def too_much(self):
        raise MemoryError

    (tmp_path / "x.pkl").write_bytes(pickle.dumps(DATA))
    monkeypatch.setattr(pickles._Unpickler, "load", too_much)
    with pytest.raises(DataError, match=r"Pickle .*x\.pkl of \d+ bytes does not fit into memory"):
        load_pickle(tmp_path / "x.pkl")
