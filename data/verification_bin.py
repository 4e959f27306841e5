"""Verification sets (`lfw.bin` and its like): pickled pairs of encoded images, read without trusting the pickle.

The format is a pickle of (2P encoded images, P booleans): images 2i and 2i + 1 are pair i, the boolean says whether
they show one person. Images are bytes or 1-d uint8 arrays; Python 2 wrote the old sets.

An unpickler calls what the file names. Ours knows the few names that arrays and Python 2 put there, and resolves none
to the real thing: numpy's own functions crash the process on crafted arguments (raw bytes as an array of objects).
Nor does it make dicts and sets, as hashing what is nested deeply crashes the process. It is Python's unpickler written
in Python: the other one takes 16 bytes of memory for each of any number of memo places that five bytes claim.
"""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from data.errors import DataError, said
from data.files import appearing

_HASHING = pickle.SETITEM + pickle.SETITEMS + pickle.DICT + pickle.ADDITEMS + pickle.FROZENSET
_MOST_DIMENSIONS = 32
_PROTOCOL = 4
"""Plain bytes and booleans at protocol 4 are read by every Python 3 and need no name to be resolved."""


class VerificationSet(NamedTuple):
    """images: 2P encoded images. same: bool (P,), whether images 2i and 2i + 1 show one person."""

    images: list[bytes]
    same: npt.NDArray[np.bool_]


def read_bin(path: Path) -> VerificationSet:
    """Read a set; python code in it is refused by name and never run. Raises DataError."""
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}): expected a verification set (.bin)") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path}: expected a pickle of encoded images and booleans: {said(error):.200}") from None
    if not isinstance(content, tuple | list) or len(content) != 2:
        raise DataError(f"{path}: expected a pair (images, same), found {type(content).__name__}")
    images = [_encoded(path, number, image) for number, image in enumerate(_items(path, "images", content[0]))]
    same = list(_items(path, "same", content[1]))
    if not all(isinstance(value, int) and value in (0, 1) for value in same):
        raise DataError(f"{path}: expected booleans that say which pairs show one person, found something else")
    _check_counts(str(path), len(images), len(same))
    return VerificationSet(images, np.array(same, np.bool_))


def write_bin(path: Path, images: Sequence[bytes], same: Sequence[bool] | npt.NDArray[np.bool_]) -> None:
    """Write a set that this reader and the peers' read; the file appears whole or not at all. Raises DataError."""
    _check_counts(str(path), len(images), len(same))
    with appearing([path]) as (partial,), partial.open("wb") as file:
        pickle.dump(([bytes(image) for image in images], [bool(value) for value in same]), file, protocol=_PROTOCOL)


def _check_counts(path: str, images: int, same: int) -> None:
    if images != 2 * same or not same:
        raise DataError(f"{path}: expected two images a pair, found {images} images and {same} pairs")


def _items(path: Path, name: str, value: Any) -> Sequence[Any]:
    if isinstance(value, _Array):
        return value.data
    if isinstance(value, tuple | list):
        return value
    raise DataError(f"{path}: expected a list of {name}, found {type(value).__name__}")


def _encoded(path: Path, number: int, image: Any) -> bytes:
    data = image.data if isinstance(image, _Array) and len(image.shape) == 1 else image
    if not isinstance(data, bytes) or not data:
        raise DataError(f"{path}: image {number}: expected encoded bytes, found {type(image).__name__} or nothing")
    return data


def _refuse(unpickler: Any) -> None:
    raise pickle.UnpicklingError("it holds a dict or a set, expected lists")


def _read_bytearray(unpickler: Any) -> None:
    """As bytes, of what there is: Python's own fills as much memory as is claimed."""
    (length,) = struct.unpack("<Q", unpickler.read(8))
    unpickler.append(unpickler.read(length))


class _Unpickler(pickle._Unpickler):
    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,
        **dict.fromkeys(_HASHING, _refuse),
        pickle.BYTEARRAY8[0]: _read_bytearray,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[f"{module.replace('numpy.core.', 'numpy._core.')}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is refused") from None


class _StandIn:
    """Something to call in place of what a pickle names; a pickle cannot set its attributes."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it changes a function, which is refused")


class _Dtype:
    """uint8 or bool, the two types that a verification set has."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        text = name.decode("ascii", "replace") if isinstance(name, bytes) else str(name)
        if text.lstrip("|") not in ("u1", "b1"):
            raise pickle.UnpicklingError(f"it holds an array of {text!r}, expected uint8 or bool")

    def __setstate__(self, state: object) -> None:
        """Byte order and alignment, which bytes have none of."""


class _Array:
    """An array of bytes: shape and data, checked against each other."""

    __slots__ = ("data", "shape")

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.data = b""

    def fill(self, shape: tuple[int, ...], dtype: object, data: object) -> _Array:
        if not isinstance(dtype, _Dtype) or not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError("it holds an array of something else than bytes")
        fine = len(shape) <= _MOST_DIMENSIONS and all(isinstance(n, int) and 0 <= n <= len(data) for n in shape)
        if not fine or math.prod(shape) != len(data):
            raise pickle.UnpicklingError(f"it holds an array whose shape is not that of its {len(data)} bytes")
        self.shape, self.data = shape, bytes(data)
        return self

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, _, data = state
        self.fill(shape, dtype, data)


def _encode(text: str, encoding: str | bytes) -> bytes:
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}, expected latin1")
    return text.encode("latin-1")


def _reconstruct(*_: object) -> _Array:
    return _Array()


def _scalar(dtype: object, data: bytes) -> int:
    return _Array().fill((1,), dtype, data).data[0]


def _from_buffer(data: bytes, dtype: object, shape: tuple[int, ...], *_: object) -> _Array:
    return _Array().fill(shape, dtype, data)


_STAND_INS = {
    "_codecs.encode": _StandIn(_encode),
    "numpy.ndarray": _StandIn(_reconstruct),
    "numpy.dtype": _StandIn(_Dtype),
    "numpy._core.multiarray._reconstruct": _StandIn(_reconstruct),
    "numpy._core.multiarray.scalar": _StandIn(_scalar),
    "numpy._core.numeric._frombuffer": _StandIn(_from_buffer),
}
