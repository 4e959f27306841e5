"""Ten thousand inputs for each parser of files: it reads them, or raises its own error in one line that says where.

Bytes are drawn by a seed, and what an input is made of is chosen by them.
"""

from __future__ import annotations

import functools
import inspect
import pickle
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from data.errors import DataError
from data.rec.header import HEADER, HeaderError, unpack
from data.rec.index import read_index
from data.rec.properties import read_properties
from data.rec.recordio import HEAD, MAGIC_BYTES, RecordError, RecordReader
from data.rec.records import RecordSet
from data.verification_bin import read_bin
from tests.record_files import insightface_records, write_set

T = TypeVar("T")
INPUTS = 10_000
"""Of each parser."""


def inputs(count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Runs a test on so many `drawn` bytes, and names those on which it fails."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(**fixtures: Any) -> None:
            draw = random.Random(test.__name__)
            for _ in range(count):
                drawn = draw.randbytes(draw.randint(1, 64))
                try:
                    test(**fixtures, drawn=drawn)
                except Exception as error:
                    raise AssertionError(f"with drawn=bytes.fromhex('{drawn.hex()}'): {error}") from error

        told = inspect.signature(test)
        kept = [parameter for name, parameter in told.parameters.items() if name != "drawn"]
        run.__signature__ = told.replace(parameters=kept)  # type: ignore[attr-defined]  # drawn is no fixture
        return run

    return decorate


many = inputs(INPUTS)


class Chooser:
    """Choices by drawn bytes; the first of all when they are used up."""

    def __init__(self, drawn: bytes) -> None:
        self._rest = drawn

    def __bool__(self) -> bool:
        return bool(self._rest)

    def below(self, count: int) -> int:
        size = 1 if count <= 256 else 2
        taken, self._rest = self._rest[:size], self._rest[size:]
        return int.from_bytes(taken, "little") % count

    def of(self, choices: list[T]) -> T:
        return choices[self.below(len(choices))]

    def taken(self, most: int) -> bytes:
        count = self.below(most + 1)
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def damaged(self, content: bytes) -> bytes:
        """Up to four bytes changed, and now and then cut, or something put in."""
        damaged = bytearray(content)
        for _ in range(self.below(5)):
            damaged[self.below(len(damaged))] = self.below(256)
        place, kind = self.below(len(damaged)), self.below(4)
        if kind == 1:
            del damaged[place:]
        elif kind == 2:
            damaged[place:place] = self.taken(20)
        return bytes(damaged)


def _outcome(function: Callable[..., T], *arguments: Any) -> T | DataError:
    """What it returns, or the one error that may be, in one line."""
    try:
        return function(*arguments)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017
        return error


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set, and a place for files that many inputs use one after the other."""
    return write_set(tmp_path_factory.mktemp("hostile"), insightface_records([3, 0, 2]), classes=3)


_WORDS = [
    MAGIC_BYTES,
    *(number.to_bytes(4, "little") for number in (0, 1, 3, 4, 8, 1 << 29, 5 << 29, 2**31, 2**32 - 1)),
]
_WORDS += [(kind << 29 | length).to_bytes(4, "little") for kind in range(4) for length in (0, 5, 8)]


@many
def test_record_files(shared: Path, drawn: bytes) -> None:
    choose, content = Chooser(drawn), b""
    while choose:
        content += choose.taken(9) if choose.below(6) == 0 else choose.of(_WORDS)
    path = shared / "any.rec"
    path.write_bytes(content)
    reader = RecordReader(path)
    found = _outcome(lambda: [(len(reader.read_at(offset)), length) for offset, length in reader.scan()])
    if isinstance(found, DataError):
        assert isinstance(found, RecordError)
        assert 0 <= found.offset <= len(content)
        assert f"any.rec: byte {found.offset}: expected " in str(found)
    else:
        assert all(read == length <= len(content) for read, length in found)


_FLAGS = [0, 1, 2, 3, 11, 1 << 24, 1 << 30, 1 << 31, (1 << 32) - 1]


@many
def test_headers(drawn: bytes) -> None:
    choose = Chooser(drawn)
    flag, kind = choose.of(_FLAGS), choose.below(3)
    payload = HEADER.pack(flag, float(choose.below(9)), 2**64 - 1, choose.below(256)) + choose.taken(60)
    payload = (payload, choose.damaged(payload), drawn)[kind]
    found = _outcome(unpack, memoryview(payload))
    if isinstance(found, DataError):
        assert isinstance(found, HeaderError)
    else:
        assert len(found[0].labels) == max(found[0].flag, 1)
        assert payload.endswith(bytes(found[1]))


_NUMBERS = [
    *map(str, range(0, 400, 4)),
    *("-1", "9" * 18, "9" * 19, "9" * 400, "1e3", "0x1", "nan", " 4", "\u0661", ""),
]


@many
def test_indices(shared: Path, drawn: bytes) -> None:
    choose, lines = Chooser(drawn), []
    while choose:
        line = f"{choose.of(_NUMBERS)}{choose.of([chr(9), chr(9), chr(9), ' ', ',', chr(9) * 2])}{choose.of(_NUMBERS)}"
        lines.append(line.encode() if choose.below(8) else choose.taken(12))
    path, reader = shared / "any.idx", RecordReader(shared / "train.rec")
    path.write_bytes(b"\n".join(lines))
    index = _outcome(read_index, path, reader)
    if not isinstance(index, DataError):
        assert len(index.keys) == len(index.offsets) > 0
        assert (np.diff(index.offsets) > 0).all()
        assert 0 <= index.offsets[0] <= index.offsets[-1] <= reader.size - HEAD.size


@many
def test_properties(shared: Path, drawn: bytes) -> None:
    choose = Chooser(drawn)
    content = ",".join(choose.of(_NUMBERS) for _ in range(choose.of([3, 3, 3, 0, 1, 2, 4]))).encode()
    content += choose.of([b"", b"\n", b"\r\n", b"\nlabels,hi,lo\n"]) + choose.taken(12)
    path = shared / "any.property"
    path.write_bytes(content if choose.below(3) else choose.damaged(content or b"0"))
    found = _outcome(read_properties, path)
    if not isinstance(found, DataError):
        assert all(0 < number < 10**18 for number in (found.num_classes, *found.image_size))
        assert found.pair or found.num_classes <= 1 << 24


_PAIRS: Any = ([b"\xff\xd8one", b"two", b"3", b"four"], [True, False])
_ARRAYS: Any = ([np.frombuffer(image, np.uint8) for image in _PAIRS[0]], np.array(_PAIRS[1]))
_PICKLES = [pickle.dumps(content, protocol) for content in (_PAIRS, _ARRAYS) for protocol in range(6)]


@pytest.fixture
def _a_gigabyte() -> Iterator[None]:
    """So much more memory at most than is used now."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("_a_gigabyte")
@many
def test_verification_sets(shared: Path, drawn: bytes) -> None:
    choose = Chooser(drawn)
    content = choose.damaged(choose.of(_PICKLES))
    path = shared / "any.bin"
    path.write_bytes(content)
    found = _outcome(read_bin, path)
    if isinstance(found, DataError):
        assert "any.bin: " in str(found)
    else:
        assert len(found.images) == 2 * len(found.same)
        assert all(type(image) is bytes for image in found.images)


@inputs(1_000)
def test_sets(shared: Path, drawn: bytes) -> None:
    """Several files of a set damaged at once: it does not open, or its samples are of its classes."""
    choose, folder = Chooser(drawn), write_set(shared / "damaged", insightface_records([3, 0, 2]), classes=3)
    for _ in range(1 + choose.below(2)):
        path = folder / choose.of(["train.rec", "train.idx", "property"])
        path.write_bytes(choose.damaged(path.read_bytes() or b"0"))
    records = _outcome(RecordSet.open, folder)
    if not isinstance(records, DataError):
        for sample in range(records.num_samples):
            found = _outcome(records.image, sample)
            assert isinstance(found, DataError) or 0 <= found[0] < records.num_classes
        records.close()
