"""Contact sheets: many small images on one picture, a row for each class, with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from data.files import appearing

Pixels = npt.NDArray[np.uint8]

_GAP = 4
_CAPTION = 16
_PAPER = (250, 250, 250)
_INK = (40, 40, 40)


def contact_sheet(rows: Sequence[Sequence[Pixels]], *, captions: Sequence[str] = ()) -> Pixels:
    """One picture of rows of images, RGB uint8, each row with its caption above it.

    rows: images (H, W, 3) of one size; rows may differ in length. captions: one for each row, or none at all.
    Raises ValueError when there is nothing to show, or numbers or sizes do not fit.
    """
    shapes = {image.shape for row in rows for image in row}
    if len(shapes) != 1 or (captions and len(captions) != len(rows)):
        raise ValueError(
            f"expected images of one size and a caption for each row or none, got sizes {sorted(shapes)}, "
            f"{len(rows)} rows and {len(captions)} captions"
        )
    height, width, _ = shapes.pop()
    head = _CAPTION if captions else 0
    columns = max(len(row) for row in rows)
    size = (_GAP + columns * (width + _GAP), _GAP + len(rows) * (head + height + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for number, row in enumerate(rows):
        top = _GAP + number * (head + height + _GAP)
        if captions:
            draw.text((_GAP, top), captions[number], fill=_INK, font=font)
        for column, image in enumerate(row):
            sheet.paste(Image.fromarray(image), (_GAP + column * (width + _GAP), top + head))
    return np.asarray(sheet)


def write_png(path: Path, picture: Pixels) -> None:
    """Write a picture; the file appears whole or not at all. Raises DataError."""
    with appearing([path]) as (partial,), partial.open("wb") as file:
        Image.fromarray(picture).save(file, "PNG", optimize=True)
