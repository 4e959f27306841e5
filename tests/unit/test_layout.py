"""The page of custom scalars: every pattern means one tag, and is there only when that is logged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from configs.schema import ClusteringConfig, EvalConfig, RunConfig, TrainConfig
from training.showing.layout import Layout, layout
from training.showing.metrics import RunLog


def _patterns(
    *, ranks: int = 1, cuda: bool = False, rates: tuple[str, ...] = ("throughput/tflops",), **sections: Any
) -> list[str]:
    page = layout(RunConfig(**sections), ranks=ranks, cuda=cuda, rates=rates)
    assert all(chart[0] == "Multiline" for charts in page.values() for chart in charts.values())
    return [pattern for charts in page.values() for chart in charts.values() for pattern in chart[1]]


def _shown(tag: str, patterns: list[str]) -> bool:
    return any(re.match(pattern, tag) for pattern in patterns)  # as TensorBoard asks


@pytest.mark.parametrize(
    ("tag", "settings"),
    [
        ("optim/loss_scale", {"train": TrainConfig(precision="fp16")}),
        ("throughput/mfu", {"rates": ("throughput/tflops", "throughput/mfu")}),
        ("memory/allocated_gb", {"cuda": True}),
        ("ranks/slowest", {"ranks": 2}),
        ("time/communication_ms", {"ranks": 2}),
        ("verification/lfw.v2/accuracy", {"eval": EvalConfig(sets=("lfw.v2.bin",))}),
        ("verification/lfw/tar@far=1e-3", {"eval": EvalConfig(sets=("lfw.bin",))}),
    ],
)
def test_what_only_some_runs_log(tag: str, settings: dict[str, Any]) -> None:
    assert _shown(tag, _patterns(**settings))
    assert not _shown(tag, _patterns())


def test_without_clusters_nothing_is_asked_of_them() -> None:
    plain = {"clustering": ClusteringConfig(enabled=False)}
    for tag in ("loss/contrastive", "time/cluster_ms", "clusters/hard_level_mean", "clusters/purity"):
        assert _shown(tag, _patterns())
        assert not _shown(tag, _patterns(**plain))


def test_rates_that_are_not_known_have_no_chart() -> None:
    assert _shown("throughput/tflops", _patterns())
    assert not _shown("throughput/tflops", _patterns(rates=()))


def test_a_pattern_means_one_tag() -> None:
    patterns = _patterns(eval=EvalConfig(sets=("a.bin",)))
    assert _shown("loss/total", patterns)
    for tag in ("loss/total2", "my_loss/total", "clusters/suspects_kept", "verification/a/b/accuracy",
                "verification/a/accuracy_std"):  # fmt: skip
        assert not _shown(tag, patterns)
    assert len(patterns) == len(set(patterns)), "no tag stands on the page twice"


def test_the_page_of_a_resumed_run_counts_and_former_points_stay(tmp_path: Path) -> None:
    for first_step, title in ((0, "before"), (10, "after")):
        page: Layout = {"losses": {title: ["Multiline", ["loss/total$"]]}}
        log = RunLog(tmp_path, active=True, total_steps=20, first_step=first_step, layout=page)
        log.scalars(first_step + 5, {"loss/total": 1.0})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    made = layout_pb2.Layout()
    made.ParseFromString(events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    assert [chart.title for chart in made.category[0].chart] == ["after"]
    assert [event.step for event in events.Scalars("loss/total")] == [5, 15]
