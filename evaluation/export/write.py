"""Writes a backbone as ONNX, or as torch's ExportedProgram, with any number of images at a time."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from data.errors import said
from evaluation.export.form import INPUT, OUTPUT, Deployed, ExportError, example, needed

OPSET = 20
"""The one that torch's exporter recommends; onnxruntime reads it from 1.17 on."""
_LARGE = 1536 << 20
"""Bytes of weights from which on they lie beside the ONNX file, as one file holds 2 GiB at most."""


def files_of(out: Path, network: nn.Module) -> list[Path]:
    """The files that `write_onnx` makes, the one that names the others last."""
    return [out.with_name(f"{out.name}.data"), out] if weights_apart(network) else [out]


def weights_apart(network: nn.Module) -> bool:
    """Whether the weights are too many for one ONNX file."""
    held = (*network.parameters(), *network.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in held) > _LARGE


def write_onnx(network: Deployed, path: Path, about: Mapping[str, str]) -> None:
    """Write an ONNX file, with `<name>.data` beside it where `weights_apart`, and let onnx check it.

    about: its metadata. Raises OSError, and ExportError when a package is missing or torch cannot export the backbone.
    """
    needed("onnx")
    needed("onnxscript")
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                network,
                (example(network.form),),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                verbose=False,
            )
        except Exception as error:  # of a model of others: nearly anything
            raise ExportError(f"torch cannot export this backbone as ONNX: {said(error):.200}") from None
        _forget_sources(program.model)
        program.model.metadata_props.update(about)
        program.save(path, external_data=weights_apart(network))
    check_onnx(path)


def check_onnx(path: Path) -> None:
    """Raise ExportError for a file that onnx's own checker refuses."""
    try:
        needed("onnx").checker.check_model(str(path), full_check=True)
    except Exception as error:  # of no common class
        raise ExportError(f"onnx refuses what was exported: {said(error):.200}") from None


def write_program(network: Deployed, path: Path, about: Mapping[str, str]) -> None:
    """Write an ExportedProgram, `about` beside it as extra files. Raises ExportError, OSError."""
    with _quiet(), _frozen(network):
        shapes = ({0: torch.export.Dim("batch")},)
        try:
            program = torch.export.export(network, (example(network.form),), dynamic_shapes=shapes)
        except Exception as error:
            raise ExportError(f"torch cannot export this backbone: {said(error):.200}") from None
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # paths of this machine
        torch.export.save(program, path, extra_files=dict(about))


def _forget_sources(model: Any) -> None:
    """The exporter notes for every node the lines of code that it comes from, with paths of this machine."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


@contextlib.contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """Without gradients, which the file's embeddings would ask for as well."""
    trained = [weight for weight in network.parameters() if weight.requires_grad]
    network.requires_grad_(False)
    try:
        yield
    finally:
        for weight in trained:
            weight.requires_grad_(True)


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """These loggers say errors alone: exporters tell a user things that are for their own authors."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with quiet("torch.onnx", "torch.export", "onnxscript", "onnx_ir"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
