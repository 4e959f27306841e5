"""The page of TensorBoard to look at first: custom scalars, in groups, of what this run will log."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from configs.schema import RunConfig

Layout = dict[str, dict[str, list[str | list[str]]]]
"""Group, title of the chart, and ["Multiline", patterns of tags], as `SummaryWriter.add_custom_scalars` takes it."""


_RATES = {"throughput/tflops": "TFLOPS of a rank", "throughput/mfu": "MFU: share of the GPU's peak"}


def _chart(*tags: str) -> list[str | list[str]]:
    """TensorBoard takes tags for regular expressions that begin where the tag does."""
    return ["Multiline", [re.escape(tag).replace(r"\*", "[^/]+") + "$" for tag in tags]]


def _of(group: str, names: Iterable[str]) -> list[str | list[str]]:
    return _chart(*(f"{group}/{name}" for name in names))


def layout(config: RunConfig, *, ranks: int, cuda: bool, rates: Collection[str]) -> Layout:
    """Charts of the scalars that a run of these settings logs, and of no others.

    ranks: of the run. cuda: whether it trains on GPUs. rates: the tags that `training.showing.flops.Work` knows.
    """
    clusters, several = config.clustering.enabled, ranks > 1
    losses = {
        "joint loss, and the margin softmax in it": _of("loss", ["total", "margin"]),
        "learning rate": _of("optim", ["learning_rate"]),
        "norm of the gradient, unclipped": _of("optim", ["gradient_norm"]),
        "steps skipped, spikes of the loss": _of("guard", ["skipped_steps", "loss_spikes"]),
    }
    if clusters:
        losses["contrastive, alignment loss, unweighted"] = _of("loss", ["contrastive", "alignment"])
    if config.train.precision == "fp16":
        losses["loss scale"] = _of("optim", ["loss_scale"])
    throughput = {"images per second": _of("throughput", ["images_per_second"])}
    throughput |= {title: _chart(tag) for tag, title in _RATES.items() if tag in rates}
    parts = ["step_ms", "data_wait_ms", "backbone_ms", "head_ms", *["cluster_ms"] * clusters]
    times = {"a step, and the parts of it (ms)": _of("time", parts)}
    if several:
        times["communication of the head, waiting in it (ms)"] = _chart("time/communication_ms", "ranks/wait_ms")
        times["the slowest rank"] = _of("ranks", ["slowest"])
    memory = {"resident memory of a process (GB)": _of("memory", ["resident_gb"])}
    if cuda:
        memory["GPU memory, peak since the last line (GB)"] = _of("memory", ["allocated_gb", "reserved_gb"])
    page: Layout = {"losses": losses, "throughput": throughput, "where a step's time goes": times, "memory": memory}
    if clusters:
        page["margins and hard level"] = {
            "hard level": _of("clusters", ["hard_level_mean", "hard_level_deviation"]),
            "margins at full strength": _of("clusters", ["margin_mean", "margin_deviation"]),
            "ramp: weight of the cluster terms": _of("clusters", ["ramp"]),
            "purity and agreement with the labels": _of("clusters", ["purity", "agreement"]),
            "samples that look mislabelled": _of("clusters", ["suspects"]),
            "versions published": _of("clusters", ["version"]),
        }
    if config.eval.sets:
        page["verification"] = {
            "accuracy": _chart("verification/*/accuracy"),
            "TAR at fixed FAR": _chart("verification/*/tar@far=*"),
            "equal error rate": _chart("verification/*/eer"),
        }
    return page
