"""A trained backbone as a file that other programs run: written, checked against the backbone, and only then there."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from backbones import Backbone
from data.files import appearing
from evaluation.export.check import worst_difference
from evaluation.export.form import Deployed, ExportError, Form, describe
from evaluation.export.int8 import LEAST, LEAST_MEAN, Cosines, Drawn, cosines, quantise
from evaluation.export.run import FileBackbone, open_onnx, open_program
from evaluation.export.write import files_of, weights_apart, write_onnx, write_program

Look = Callable[[FileBackbone], None]


class Exported(NamedTuple):
    """files: what was written, the one to open last. worst: see `worst_difference`. cosines: of int8 to float."""

    files: list[Path]
    worst: float
    cosines: Cosines | None = None


def export_onnx(
    backbone: Backbone,
    out: Path,
    *,
    name: str,
    form: Form,
    int8: Drawn | None = None,
    force: bool = False,
    look: Look = lambda exported: None,
) -> Exported:
    """Write ONNX for any number of images a batch; with `<out>.data` beside it where the weights exceed 1.5 GiB.

    name: of the backbone, for the metadata. int8: images to quantise by and to compare on. look: is given the file,
    ready to run, before it appears; what it raises ends the work. The file appears whole or not at all. force: int8
    embeddings may be any distance from the float ones.

    Raises ExportError when a package is missing, the float file differs from the backbone (`export_check.LIMIT`), or
    int8 embeddings from the float ones (`export_int8.LEAST`), DataError when the folder cannot be written.
    """
    network = Deployed(backbone, form)
    if int8 is not None and weights_apart(network):
        raise ExportError(f"--int8: expected weights of less than 1.5 GiB, as {name} has more: export it as float32")
    about = describe(name, backbone.embedding_size, form)
    paths = files_of(out, network)
    with appearing(paths) as partial, tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        written = Path(folder, out.name)  # the file names its data by their final name
        write_onnx(network, written, about | {"clusterface.precision": "float32" if int8 is None else "int8"})
        exported = open_onnx(written)
        worst = worst_difference(backbone, exported, unit=form.unit)
        found = None
        if int8 is not None:
            whole, written = written, Path(folder, "int8.onnx")
            quantise(whole, written, int8.first_NHW3, form)
            quantised = open_onnx(written)
            found = cosines(exported, quantised, int8.second_NHW3)
            exported = quantised
            if not force:
                _refuse_far(found)
        look(exported)
        for place, path in zip(partial, paths, strict=True):
            (written if path == out else Path(folder, path.name)).replace(place)
    return Exported(paths, worst, found)


def export_program(
    backbone: Backbone, out: Path, *, name: str, form: Form, look: Look = lambda exported: None
) -> Exported:
    """Write torch's ExportedProgram (.pt2) for any number of images a batch. For the rest see `export_onnx`."""
    about = describe(name, backbone.embedding_size, form)
    with appearing([out]) as (partial,), tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        written = Path(folder, "model.pt2")  # its name is in the file
        write_program(Deployed(backbone, form), written, about)
        exported = open_program(written, embedding_size=backbone.embedding_size, form=form)
        worst = worst_difference(backbone, exported, unit=form.unit)
        look(exported)
        written.replace(partial)
    return Exported([out], worst)


def _refuse_far(found: Cosines) -> None:
    if not (found.mean >= LEAST_MEAN and found.least >= LEAST):
        raise ExportError(
            f"--int8: expected a cosine to the float embeddings of at least {LEAST_MEAN} in the mean and {LEAST} for "
            f"each image, got {found.mean:.4f} and {found.least:.4f}: nothing was written; export "
            "float32, calibrate by more --images, or take it all the same with --force"
        )
