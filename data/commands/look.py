"""`python -m data inspect` and `preview`: a set in numbers and pictures, and what augmentation makes of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from configs.load import load_config
from configs.schema import ConfigError
from data.commands.arguments import whole
from data.contact_sheet import Pixels, contact_sheet, write_png
from data.errors import DataError
from data.loading.augment import Augment, apply_
from data.loading.decode import decode_image
from data.making.sources import IMAGE_SIZE
from data.rec.places import local_file, where
from data.rec.records import RecordSet
from data.stores.cache import Cache
from data.summary import facts_of, facts_of_pairs, first_images, first_pairs, histogram, lines
from data.verification_bin import read_bin

_ROWS, _COLUMNS = 8, 8
_BIN_SIZE = (IMAGE_SIZE, IMAGE_SIZE)


def add(commands: Any) -> None:
    """Register both commands."""
    parser = commands.add_parser("inspect", help="layout, counts and sizes of a set, or of a verification set (.bin)")
    parser.add_argument(
        "path", type=where, metavar="SET", help="a folder with train.rec, or a .bin; or the address of either"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.add_argument("--histogram", type=Path, metavar="PNG", help="how many identities have how many images")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="images of the first identities, or the first pairs")
    parser.set_defaults(run=_inspect)

    parser = commands.add_parser("preview", help="what the augmentations of a recipe make of some images")
    parser.add_argument("folder", type=where, metavar="SET")
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe, one of configs/*.yaml")
    about = "change one setting, for example augment.blur=0.5; may be given many times"
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help=about)
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument(
        "--images", type=whole(1), default=_ROWS, metavar="N", help=f"default {_ROWS}, spread over the set"
    )
    parser.set_defaults(run=_preview)


def _inspect(args: argparse.Namespace, _: Console) -> int:
    if str(args.path).endswith(".bin"):
        if args.histogram is not None:
            raise DataError("--histogram: expected a set with identities, a .bin has none")
        pairs = read_bin(local_file(args.path, Cache.default()))
        facts = facts_of_pairs(pairs, _BIN_SIZE)
        sheet = None if args.sheet is None else first_pairs(pairs, _BIN_SIZE, rows=_ROWS)
    else:
        records = RecordSet.open(args.path)
        facts = facts_of(records)
        sheet = None if args.sheet is None else first_images(records, rows=_ROWS, columns=_COLUMNS)
        if args.histogram is not None:
            histogram(records, args.histogram)
    if sheet is not None:
        write_png(args.sheet, contact_sheet(sheet[0], captions=sheet[1]))
    print(json.dumps(facts, indent=1) if args.json else lines(facts))
    return 0


def _preview(args: argparse.Namespace, _: Console) -> int:
    try:
        config = load_config(args.config, args.set)
    except ConfigError as error:
        raise DataError(str(error)) from None
    records = RecordSet.open(args.folder)
    augment = Augment(config.augment, size=records.image_size, seed=config.train.seed)
    if augment.idle:
        raise DataError("expected augmentations that are switched on, found none: for example --set augment.blur=0.5")
    samples = np.unique(np.linspace(0, records.num_samples - 1, args.images).astype(np.int64))
    rows: list[list[Pixels]] = []
    for sample in samples.tolist():
        plain = decode_image(records.image(sample)[1], records.image_size)
        row = [plain]
        for epoch in range(_COLUMNS):
            pixels = plain.copy()
            apply_(pixels, augment.draw(np.array([sample]), epoch), 0)
            row.append(pixels)
        rows.append(row)
    captions = [f"sample {sample}: as it is, then in the first {_COLUMNS} epochs" for sample in samples.tolist()]
    write_png(args.out, contact_sheet(rows, captions=captions))
    print(f"{args.out}: {len(rows)} images, as they are and as the first {_COLUMNS} epochs have them, flips aside")
    return 0
