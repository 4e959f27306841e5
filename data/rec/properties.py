"""The file `property` beside a record file: `classes,height,width`, and a line more when labels are pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from data.errors import DataError
from data.rec.header import EXACT

_PAIR_LINE = "labels,hi,lo"


@dataclass(frozen=True, kw_only=True, slots=True)
class Properties:
    """num_classes; image_size (height, width) in pixels; pair: class numbers are stored as two labels (hi, lo)."""

    num_classes: int
    image_size: tuple[int, int]
    pair: bool = False

    def text(self) -> str:
        """What the file holds."""
        lines = [f"{self.num_classes},{self.image_size[0]},{self.image_size[1]}"]
        return "".join(f"{line}\n" for line in (*lines, *([_PAIR_LINE] if self.pair else [])))


_DIGITS = 18
"""Of a number below 2^63."""
_MOST_PIXELS = 4096
"""Of a side: an image is decoded into what `property` states, if it says the same of itself."""


def whole_number(text: str) -> int:
    """The number that plain digits stand for, -1 for any other text, or for too many of them."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS else -1


def read_properties(path: Path) -> Properties:
    """Read and check; lines that are neither ours nor the first are left to those who wrote them. Raises DataError."""
    expected = "expected a first line `classes,height,width` such as `93431,112,112`"
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except FileNotFoundError:
        raise DataError(f"{path}: missing: {expected}; write one for this set") from None
    except OSError as error:
        raise DataError(f"{path}: cannot read it ({error.strerror}): {expected}") from None
    first = lines[0] if lines else ""
    parts = [part.strip(" \t\r") for part in first.split(",")]  # not strip(): it drops more than int() overlooks
    numbers = [whole_number(part) for part in parts]
    if len(numbers) != 3 or first.count(",") != 2 or min(numbers) < 1:
        raise DataError(f"{path}: {expected}, found {first!r:.80}: correct it")
    if max(numbers[1:]) > _MOST_PIXELS:
        raise DataError(
            f"{path}: expected images of at most {_MOST_PIXELS} pixels a side, found {numbers[1]} x {numbers[2]}: "
            "correct it"
        )
    pair = _PAIR_LINE in lines[1:]
    if numbers[0] > EXACT and not pair:
        raise DataError(
            f"{path}: {numbers[0]} classes with single labels: float32 rounds labels above {EXACT}; pack the set again "
            f"with labels as pairs (`{_PAIR_LINE}` in property)"
        )
    return Properties(num_classes=numbers[0], image_size=(numbers[1], numbers[2]), pair=pair)
