"""How fast a device works: the makers' peaks times what was measured of them, or, on a CPU, what is measured now.

Every number says what it rests on: a result that is committed, or an assumption, which plans repeat.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from training.plan.devices import Device
from training.plan.work import Resource, Work


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """Units of each resource a second, and seconds that parts take whatever their size."""

    per_second: dict[Resource, float]
    fixed: dict[str, float] = field(default_factory=dict)
    """Seconds of a micro-batch, by part: many small kernels."""
    launches: float = 0.0
    """Operators a second that a host launches while a GPU works; 0: on a CPU, where they are part of the work."""

    def seconds(self, work: Work) -> float:
        """Of work whose kernels run one after the other."""
        return sum(
            amount / self.per_second[name] for name, amount in work.items() if not (name == "call" and self.launches)
        )

    def host_seconds(self, work: Work) -> float:
        """In which a host launches it."""
        return work.get("call", 0.0) / self.launches if self.launches else 0.0


@dataclass(frozen=True, slots=True)
class Measured:
    """A share of a peak, and where it comes from."""

    value: float
    source: str = ""
    """File of benchmarks/results or of docs; empty: assumed."""


BANDWIDTH = Measured(0.8)
"""Of the memory's."""
GPU: dict[Resource, Measured] = {
    "convolution": Measured(0.21, "docs/experiments.md: iresnet50 alone on an H200, 4,346 images/s"),
    "product": Measured(0.4),
    "head": Measured(0.25, "docs/experiments.md: kernels of the head, 360,232 classes on an H100, 7.7 ms"),
    "contrast": Measured(0.8, "kmeans_h100_2026-11-26.md: large products, 791 of 989 TFLOPS"),
    "kmeans": Measured(0.55, "kmeans_h100_2026-11-26.md: an iteration with nothing left out"),
}
"""Shares of the peak of the run's precision; measured in bf16 on H100 and H200, assumed for all else."""
MEASURED_ON = ("H100", "H200")
FIXED = {
    "head": Measured(0.95e-3, "service-step_h200_2026-11-26.md: head of the plain step, 1.44 ms"),
    "cluster losses": Measured(0.45e-3, "service-step-graph_h100_2026-11-27.md: head and losses, 2.17 ms"),
    "bank and centres": Measured(
        0.1e-3, "service-step-graph_h100_2026-11-27.md: 0.26 ms, 0.16 of them planned for slices"
    ),
}
"""Seconds of many small kernels, on any GPU."""
LAUNCHES = Measured(250e3)
"""Operators a second: a host that launches 4 µs an operator."""
LOGIT_BYTES, _DRAW_BYTES = 40.0, 400.0
"""What torch's operators move for a logit and for a class that may be drawn, counted from their code."""


def gpu_rates(device: Device, precision: str) -> Rates:
    """Raises ConfigError for a precision that the device has not."""
    peak, bandwidth = device.peak(precision), BANDWIDTH.value * device.bandwidth
    # Only bf16 runs multiply in half precision outside of the backbone (docs/numerics.md).
    others = peak if precision == "bf16" else device.single
    return Rates(
        per_second={
            **{name: share.value * peak for name, share in GPU.items() if name in ("convolution", "product")},
            **{name: share.value * others for name, share in GPU.items() if name not in ("convolution", "product")},
            "logit": bandwidth / LOGIT_BYTES,
            "draw": bandwidth / _DRAW_BYTES,
            "moved": bandwidth,
        },
        fixed={name: seconds.value for name, seconds in FIXED.items()},
        launches=LAUNCHES.value,
    )


CPU_FACTORS: dict[Resource, float] = {
    "convolution": 0.86,
    "product": 1.15,
    "head": 1.27,
    "contrast": 1.27,
    "kmeans": 1.06,
    "logit": 1.03,
    "draw": 0.98,
    "moved": 1.52,
    "call": 1.0,
}
"""A training's speed at each kind of work over that of `machine`'s small pieces: fitted to the six rows marked "fit" of
benchmarks/results/planner_epyc5-2core_2026-11-26.md, on one thread; nine other rows test them."""


def cpu_rates(reference: Mapping[Resource, float]) -> Rates:
    """reference: what `machine.measure` found on this machine, of small pieces of each kind."""
    return Rates(per_second={name: factor * reference[name] for name, factor in CPU_FACTORS.items()})
