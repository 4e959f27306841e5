"""`python -m evaluation export`: a trained backbone as ONNX, or as torch's ExportedProgram."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from backbones import Backbone
from data.commands.arguments import whole
from data.errors import DataError
from data.rec.places import where
from data.rec.records import RecordSet
from data.verification_bin import VerificationSet
from evaluation.commands.model import add_model, chosen_model
from evaluation.commands.results import names_of, percent, refuse_ranks, show
from evaluation.embed.records import load_backbone
from evaluation.export.check import LIMIT
from evaluation.export.export import Exported, export_onnx, export_program
from evaluation.export.form import Form, needed
from evaluation.export.int8 import Drawn, draw_images
from evaluation.export.run import FileBackbone
from evaluation.export.write import files_of
from evaluation.page import Table
from evaluation.pairs import embed_pairs, read_pairs
from evaluation.verification import Verification, verify

_EXAMPLE = "python -m evaluation export --run runs/demo/run --out face.onnx"
_IMAGES = 128
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="a backbone as ONNX or as torch's ExportedProgram, checked against it, as float32 or int8",
        description="What is written is run and compared with the backbone first, on the CPU.",
        epilog=f"Example: {_EXAMPLE}",
    )
    add_model(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--format", choices=("onnx", "exported"), default="onnx", help="default onnx; exported: .pt2")
    parser.add_argument("--pixels", action="store_true", help="input uint8 (B, 112, 112, 3), in place of -1 … 1 floats")
    parser.add_argument("--unit", action="store_true", help="embeddings of length 1")
    parser.add_argument("--int8", action="store_true", help="8 bits in place of float32, with --calibrate")
    parser.add_argument("--calibrate", type=where, metavar="FOLDER", help="a record set to find int8's ranges by")
    parser.add_argument(
        "--images", type=whole(1), default=_IMAGES, help=f"to calibrate by, and as many to compare, default {_IMAGES}"
    )
    parser.add_argument(
        "--sets", type=Path, nargs="+", default=[], metavar="SET.bin", help="verify the backbone and the file on them"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there, write int8 however far off")
    parser.set_defaults(run_alone=_run)


def _run(args: argparse.Namespace, console: Console) -> None:
    _refuse(args)
    model, weights = chosen_model(args, example=_EXAMPLE)
    backbone = load_backbone(model.backbone, embedding_size=model.embedding_size, weights=weights)
    if args.format == "onnx":
        _refuse_present(files_of(args.out, backbone), force=args.force)
    sets = {path.stem: read_pairs(path) for path in args.sets}
    int8 = draw_images(RecordSet.open(args.calibrate), args.images) if args.int8 else None
    form = Form(pixels=args.pixels, unit=args.unit)
    compared: dict[str, tuple[Verification, Verification]] = {}

    def look(exported: FileBackbone) -> None:
        for name, pairs in sets.items():
            compared[name] = (_verified(name, backbone, pairs, args), _verified(name, exported, pairs, args))

    with console.status(f"exporting {model.backbone}"):
        if args.format == "onnx":
            done = export_onnx(
                backbone, args.out, name=model.backbone, form=form, int8=int8, force=args.force, look=look
            )
        else:
            done = export_program(backbone, args.out, name=model.backbone, form=form, look=look)
    _tell(args, done, backbone, int8)
    if compared:
        _show(compared)


def _refuse(args: argparse.Namespace) -> None:
    """Before any work is done."""
    refuse_ranks("it writes one file")
    if args.device == "cuda":
        raise DataError("--device: expected cpu or auto, got cuda: export and its checks run on the CPU")
    if args.int8 and args.format != "onnx":
        raise DataError("--int8: expected --format onnx: torch's ExportedProgram is float32 here")
    if args.int8 != (args.calibrate is not None):
        raise DataError("expected both of --int8 and --calibrate, a record set to find its ranges by, or none")
    names_of(args.sets)
    if args.out.is_dir():
        raise DataError(f"{args.out}: expected the name of a file, found a folder")
    _refuse_present([args.out], force=args.force)
    if args.format == "onnx":
        for package in _PACKAGES:
            needed(package)


def _refuse_present(paths: Sequence[Path], *, force: bool) -> None:
    if there := [path for path in paths if path.exists() and not force]:
        raise DataError(f"{there[0]}: expected no file there: name another, or replace it with --force")


def _verified(name: str, backbone: Backbone, pairs: VerificationSet, args: argparse.Namespace) -> Verification:
    try:
        return verify(*embed_pairs(backbone, pairs.images, pairs.same, batch_size=args.batch_size))
    except ValueError as error:  # an image that does not decode, embeddings that are not finite
        raise DataError(f"{name}: {error}") from None


def _tell(args: argparse.Namespace, done: Exported, backbone: Backbone, int8: Drawn | None) -> None:
    size = sum(path.stat().st_size for path in done.files) / 1e6
    taken = "uint8 (B, 112, 112, 3), 0 … 255" if args.pixels else "float32 (B, 3, 112, 112), -1 … 1"
    beside = "".join(f", with {path.name} beside it" for path in done.files[:-1])
    print(f"{args.out}: {size:.1f} MB{beside}; RGB {taken} to embeddings (B, {backbone.embedding_size})")
    print(f"float32 against the backbone: unit embeddings differ by {done.worst:.1e} at most, {LIMIT:g} is let pass")
    if int8 is not None and done.cosines is not None:
        print(
            f"int8 against float32 on {len(int8.second_NHW3)} images that it was not calibrated by: cosine "
            f"{done.cosines.mean:.4f} in the mean, {done.cosines.least:.4f} at least"
        )
        if int8.bad:
            print(f"{int8.bad} images of {args.calibrate} do not decode: others were taken")


def _show(compared: dict[str, tuple[Verification, Verification]]) -> None:
    rows = [
        (name, key, percent(value), percent(exported.values().get(key, float("nan"))))
        for name, (backbone, exported) in compared.items()
        for key, value in backbone.values().items()
        if key != "accuracy_std"
    ]
    show(Table("Verification", ("set", "figure", "backbone %", "file %"), rows))
