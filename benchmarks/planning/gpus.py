"""What GPUs have measured, as committed results and docs/experiments.md have it, and what the planner says of the same.

No GPU is needed: the figures are read off those files, each named beside its row. Rates of GPUs rest on the rows marked
"fit" (`training.plan.rates`); the others test them.
"""

from __future__ import annotations

from typing import Any

from configs.load import load_config
from training.plan import memory, work
from training.plan.devices import device_of
from training.plan.links import BETWEEN
from training.plan.planner import Dataset, Plan, Scenario, make_plan

_TIME, _MEMORY = 0.30, 0.15
_PLAIN = ("clustering.enabled=false",)
_LOSSES_ON = ("clustering.warmup_fraction=0", "clustering.ramp_fraction=0")
_MS1MV3 = Dataset(classes=93_431, samples=5_179_510)


def scenario_of(gpu: str, dataset: Dataset, *settings: str, ranks: int = 1) -> Scenario:
    """A run on so many of them, in one host, whose loader is no limit."""
    config, device = load_config(None, ("data.threads=64", *settings)), device_of(gpu)
    return Scenario(
        config=config,
        dataset=dataset,
        ranks=ranks,
        per_host=ranks,
        device=device,
        network=BETWEEN[device.network],
    )


def _row(role: str, name: str, what: str, predicted: float, measured: float) -> dict[str, Any]:
    limit = _MEMORY if what == "MB" else _TIME
    return {
        "for": f"GPU, {role}",
        "configuration": name,
        "what": what,
        "predicted": predicted,
        "measured": measured,
        "limit": limit,
    }


def _parts(plan: Plan, *names: str) -> float:
    """Milliseconds."""
    return 1e3 * sum(part.seconds for part in plan.parts if part.name.startswith(names))


def gpu_rows() -> list[dict[str, Any]]:
    """Of one H100 or H200. ms: by the clock, unless "kernels" says that only the GPU's own time counts."""
    return [*_steps(), *_heads(), *_kmeans()]


_OTHERS = (
    ("V100-32GB", "iresnet50", 125_000, 0.1, 128, 5004),
    ("V100-32GB", "iresnet50", 1_400_000, 0.1, 128, 4738),
    ("V100-32GB", "iresnet50", 5_500_000, 0.1, 128, 3975),
    ("V100-32GB", "iresnet50", 29_000_000, 0.1, 128, 1855),
    ("V100-32GB", "iresnet50", 85_742, 1.0, 128, 5102),
    ("V100-32GB", "iresnet100", 85_742, 1.0, 128, 3337),
    ("A10", "iresnet50", 617_970, 1.0, 128, 3300),
)
"""Images a second that insightface has published for eight GPUs of a host in fp16, of its own program: the tables of
recognition/arcface_torch/README.md (of classes at a rate of 0.1), recognition/partial_fc/pytorch/README.md (MS1MV2) and
benchmarks/train/nvidia_a10.md of deepinsight/insightface. The first names no batch: 128 is taken."""


def others_rows() -> list[dict[str, Any]]:
    """Another program on GPUs that nothing here was measured on: how far shares of a peak reach. Not a calibration."""
    rows = []
    for gpu, net, classes, rate, batch, published in _OTHERS:
        settings = (f"model.backbone={net}", "train.precision=fp16", f"train.batch_size={batch}", *_PLAIN)
        dataset = Dataset(classes=classes, samples=20 * classes)
        plan = make_plan(scenario_of(gpu, dataset, *settings, f"head.sample_rate={rate}", ranks=8))
        name = f"insightface: 8 x {gpu}, {net}, C={classes:,}" + f", rate {rate:g}" * (rate < 1)
        row = _row("", name, "images/s", plan.images_per_s, published)
        rows.append(row | {"for": "others"})
    return rows


def _steps() -> list[dict[str, Any]]:
    net = "model.backbone=iresnet50"
    h200 = make_plan(scenario_of("H200", _MS1MV3, net, *_LOSSES_ON))
    plain200 = make_plan(scenario_of("H200", _MS1MV3, net, *_PLAIN))
    h100 = make_plan(scenario_of("H100", _MS1MV3, net, *_LOSSES_ON))
    plain100 = make_plan(scenario_of("H100", _MS1MV3, net, *_PLAIN))
    head = ("head", "centres'")
    losses = (*head, "cluster losses")
    return [
        _row(
            "fit", "H200: iresnet50 alone, B=128 (experiments.md)", "ms", _parts(plain200, "backbone"), 1e3 * 128 / 4346
        ),
        _row("fit", "H200: head of a step, N=128, C=93,431 (service-step_h200)", "ms", _parts(plain200, *head), 1.44),
        _row(
            "test",
            "H200: head and cluster losses, in tiles (service-step_h200)",
            "ms",
            _parts(h200, *losses),
            2.09,
        ),
        _row("test", "H200: a plain step (service-step_h200)", "ms", 1e3 * plain200.step, 31.86),
        _row("test", "H200: a step with clusters (service-step_h200)", "ms", 1e3 * h200.step + _twice(h200), 32.49),
        _row("test", "H100: a plain step, kernels (service-step_h100)", "ms", 1e3 * plain100.step, 32.85),
        _row("test", "H100: a step with clusters, kernels (service-step_h100)", "ms", 1e3 * h100.step, 34.05),
        _row("fit", "H100: head and cluster losses (service-step-graph_h100)", "ms", _parts(h100, *losses), 2.17),
        _row(
            "fit",
            "H100: bank, centres, slices (service-step-graph_h100)",
            "ms",
            _parts(h100, "clusters") + _twice(h100),
            0.26,
        ),
        _row("test", "H100: a plain step (service-step-graph_h100)", "ms", 1e3 * plain100.step, 32.60),
        _row(
            "test", "H100: a step with clusters (service-step-graph_h100)", "ms", 1e3 * h100.step + _twice(h100), 33.59
        ),
    ]


def _twice(plan: Plan) -> float:
    """Milliseconds: while steps were timed a refresh was under way, which fills half of the interval."""
    return _parts(plan, "clusters: refresh")


def _heads() -> list[dict[str, Any]]:
    rows = []
    for classes, rate, kernels, clock in (
        (93_431, 1.0, None, 4.26),
        (360_232, 1.0, 7.7, 8.3),
        (360_232, 0.1, 0.9, 4.7),
    ):
        settings = ("train.batch_size=1024", f"head.sample_rate={rate}", "model.backbone=small", *_PLAIN)
        scenario = scenario_of("H100", Dataset(classes=classes, samples=classes), *settings)
        plan = make_plan(scenario)
        name = f"H100: head, N=1,024, C={classes:,}" + f", rate {rate:g}" * (rate < 1)
        parts = work.of_head(scenario.config, scenario.sizes, scenario.device)
        if kernels is not None:
            role = "fit" if rate == 1 else "test"
            of_kernels = 1e3 * sum(scenario.rates.seconds({**part, "draw": 0.0}) for part in parts)
            rows.append(_row(role, f"{name}, kernels (experiments.md)", "ms", of_kernels, kernels))
        rows.append(_row("test", f"{name}, alone (experiments.md)", "ms", _parts(plan, "head", "centres'"), clock))
        if classes == 93_431:
            found = memory.memory_of(scenario.config, scenario.sizes, scenario.device)
            own = [row for row in found.rows if row.name.startswith(("head", "gathered", "targets"))]
            most = max(sum(row.bytes for row in own if moment in row.when) for moment in ("head", "update"))
            rows.append(_row("test", f"{name}: peak over weights and momentum (experiments.md)", "MB", most, 104e6))
    return rows


def _kmeans() -> list[dict[str, Any]]:
    """Two iterations over a million rows and 360,232 clusters."""
    rows = []
    dataset = Dataset(classes=360_232, samples=1_000_000)
    for gpu, role, seconds in (("H100", "fit", 1.36), ("H200", "test", 1.27)):
        scenario = scenario_of(gpu, dataset, "clustering.extra_clusters=0", "clustering.iterations=2")
        predicted = scenario.rates.seconds(work.of_refresh(scenario.config, scenario.sizes))
        name = f"{gpu}: k-means, nothing left out (kmeans_{gpu.lower()})"
        rows.append(_row(role, name, "ms", 1e3 * predicted, 1e3 * seconds))
    return rows
