"""A plan: memory of a rank, time of a step by part, and what follows for a whole run.

A step's parts run one after the other; only the sum of the backbone's gradients hides behind its backward pass. On a
GPU the host runs ahead: a step takes no less than its operators' launches, nor than its images' decoding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from clustering.service.schedule import RefreshSchedule
from configs.schema import ConfigError, RunConfig
from data.rec.layout import Labels
from training.plan import links, memory, state, traffic, work
from training.plan.devices import Device
from training.plan.links import Link
from training.plan.rates import BANDWIDTH, FIXED, GPU, LOGIT_BYTES, MEASURED_ON, Rates, cpu_rates, gpu_rates
from training.plan.work import Resource
from training.traffic import OVER_HOSTS, Collective

IMAGES_PER_CORE_S = 8200.0
"""docs/experiments.md: the CPU loader on a Xeon of family 6, model 207; 7,961 on an EPYC of family 25
(data_epyc3-2core_2026-11-26.md)."""
IMAGES_PER_THREAD_S = 6300.0
"""docs/experiments.md: 25,200 by four threads of that host."""
_AUGMENTED = 0.57
"""data_epyc3-2core_2026-11-26.md: with all augmentations at 0.2, 4,516 images a second of a core in place of 7,961."""
_HIDDEN = 0.8
"""Assumed: share of the backward pass behind which buckets travel; the first layer's gradient comes last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dataset:
    """The training set: sizes alone, or with each sample's class, where it is at hand."""

    classes: int
    samples: int
    labels: Labels | None = None
    guessed: bool = False
    """Whether nobody has said how many samples."""

    def sizes(self, ranks: int, per_host: int) -> state.Sizes:
        host_ranks = per_host if ranks > per_host else 0
        if self.labels is None:
            return state.even_sizes(self.classes, self.samples, ranks, host_ranks)
        return state.sizes_of(self.labels, self.classes, ranks, host_ranks)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is planned."""

    config: RunConfig
    dataset: Dataset
    ranks: int
    per_host: int
    """Ranks of a host."""
    device: Device
    network: Link
    cores: int = 0
    """Of a host; 0: not known, and no limit."""
    reference: Mapping[Resource, float] | None = None
    """Of a CPU: what `machine.measure` says of it."""

    @functools.cached_property
    def sizes(self) -> state.Sizes:
        return self.dataset.sizes(self.ranks, self.per_host)

    @functools.cached_property
    def rates(self) -> Rates:
        """Raises ConfigError for a precision that the device has not."""
        if self.reference is not None:
            return cpu_rates(self.reference)
        return gpu_rates(self.device, self.config.train.precision)

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.per_host)

    @property
    def images(self) -> int:
        """Of an optimizer step, over all ranks."""
        batch, accumulation = self.config.train.share(self.ranks)
        return batch * accumulation * self.ranks


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Of a step. hidden: seconds that pass while others are at work, and are not part of the step's time."""

    name: str
    seconds: float
    hidden: float = 0.0
    assumed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Of a run; seconds are of one rank, all ranks being alike."""

    memory: memory.Memory
    parts: tuple[Part, ...]
    """Of a step with all losses on, a refresh of the clusters shared out over its steps."""
    step: float
    """Seconds."""
    limit: str
    """What the step waits for: the device, the host's launches, or the loader."""
    steps_per_epoch: int
    total_steps: int
    total: float
    """Seconds of all steps; evaluations and checkpoints are not in it."""
    images: int
    """Of a step."""
    checkpoint: int
    """Bytes of one, all ranks together."""
    refresh: float
    """Seconds of a whole refresh, if nothing else ran."""
    fits: bool
    cores: float
    """Of a host, that decoding keeps busy."""
    notes: tuple[str, ...]

    @property
    def images_per_s(self) -> float:
        """Of all ranks."""
        return self.images / self.step


def collective_seconds(one: Collective, scenario: Scenario) -> float:
    """A ring over the slowest wire on its way, and a tree's latency for every call."""
    within, inside = scenario.device.within, min(one.ranks, scenario.per_host)
    beside = min(scenario.per_host, scenario.ranks) if one.what == OVER_HOSTS else 1  # rings on a host's link at once
    over_hosts = one.ranks > scenario.per_host or one.what == OVER_HOSTS
    speed = within.bytes_per_s
    latency = links.LAUNCH_S + 2 * within.latency_s * math.ceil(math.log2(max(2, inside)))
    if scenario.hosts > 1 and over_hosts:
        speed = min(speed, scenario.network.bytes_per_s / beside)
        latency += 2 * scenario.network.latency_s * math.ceil(math.log2(scenario.hosts))
    return one.times * latency + one.sent / (links.SHARE * speed)


def make_plan(scenario: Scenario) -> Plan:
    """Raises ConfigError for settings that no run could have: an unknown backbone, a batch that ranks cannot share, a
    precision that the device has not, an epoch without a step."""
    config, sizes, device = scenario.config, scenario.sizes, scenario.device
    _, A = config.share(scenario.ranks)
    found = memory.memory_of(config, sizes, device)
    refresh = _refresh_seconds(scenario)
    parts = _parts(scenario)
    if sizes.samples < scenario.images:
        raise ConfigError(
            f"batch too large: {scenario.images} images a step, but an epoch has {sizes.samples}: use a smaller "
            "train.batch_size, or fewer ranks"
        )
    steps_per_epoch = sizes.samples // (scenario.images // A) // A
    total_steps = steps_per_epoch * config.train.epochs
    schedule = RefreshSchedule.of(config.clustering, total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    plain = sum(part.seconds for part in parts if "cluster" not in part.name)
    losses = sum(part.seconds for part in parts if "cluster" in part.name)
    host, loader = _host_floor(scenario), _loader_floor(scenario)
    share = refresh / schedule.interval if config.clustering.enabled else 0.0
    budget = config.clustering.step_budget
    if budget:
        share = min(share, budget / (1 - budget) * (plain + losses))
    if config.clustering.enabled:
        parts.append(Part(name="clusters: refresh, shared out", seconds=share, assumed=scenario.ranks > 1))
    limits = {scenario.device.name: plain + losses + share, "launches by the host": host, "decoding": loader}
    limit = max(limits, key=limits.__getitem__)
    step = limits[limit]
    total = total_steps * max(plain, host, loader)
    if config.clustering.enabled:
        refreshes = max(0, -(-(total_steps - schedule.span - schedule.first) // schedule.interval))
        on = max(0.0, total_steps - max(schedule.warmup, schedule.first + schedule.span)) if refreshes else 0.0
        total += on * (max(plain + losses, host, loader) - max(plain, host, loader))
        total += refreshes * share * schedule.interval
    per_host = min(scenario.per_host, scenario.ranks)
    return Plan(
        memory=found,
        parts=tuple(parts),
        step=step,
        limit=limit,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        total=total,
        images=scenario.images,
        checkpoint=state.checkpoint_bytes(config, sizes)[0],
        refresh=refresh,
        fits=_fits(scenario, found),
        cores=scenario.images / step / scenario.ranks * per_host / _core_rate(config),
        notes=tuple(_notes(scenario)),
    )


def _fits(scenario: Scenario, found: memory.Memory) -> bool:
    if scenario.device.cuda:
        return found.peak <= scenario.device.memory
    ranks = min(scenario.per_host, scenario.ranks)
    return ranks * (found.peak + sum(size for _, size in found.host)) <= scenario.device.memory


def _parts(scenario: Scenario) -> list[Part]:
    config, sizes, device, rates = scenario.config, scenario.sizes, scenario.device, scenario.rates
    _, A = config.train.share(scenario.ranks)
    cuda = device.cuda
    others = cuda and (device.name not in MEASURED_ON or config.train.precision != "bf16")
    backbone = rates.seconds(work.of_backbone(config, sizes))
    # Backward has twice the arithmetic of forward (`training.showing.flops`), and that of what is computed again.
    ahead = backbone / (3 + config.model.recompute)
    untried = others or (cuda and _is_transformer(scenario))
    forward, update = work.of_head(config, sizes, device)
    parts = [
        Part(name="backbone, forward", seconds=ahead, assumed=untried),
        Part(name="backbone, backward", seconds=backbone - ahead, assumed=untried),
        Part(name="head, forward", seconds=rates.seconds(forward) + A * rates.fixed.get("head", 0.0), assumed=others),
        Part(name="centres' gradient and update", seconds=rates.seconds(update), assumed=others),
        Part(name="backbone's optimizer", seconds=rates.seconds(work.of_optimizer(config, device)), assumed=cuda),
    ]
    if config.clustering.enabled:
        seconds = rates.seconds(work.of_cluster_losses(config, sizes, device)) + A * rates.fixed.get(
            "cluster losses", 0.0
        )
        parts.append(Part(name="cluster losses", seconds=seconds, assumed=others))
        kept = A * rates.fixed.get("bank and centres", 0.0)
        parts.append(Part(name="clusters: bank and centres", seconds=kept, assumed=others))
    # What travels beside the backbone's work: its gradients with the last micro-batch, its weights with all of them.
    room = _HIDDEN * ((backbone - ahead) / A if state.copy_ranks(config, sizes) == 1 else backbone)
    if config.model.graph:  # which hands gradients over at its end
        room = 0.0
    for one in traffic.of_step(config, sizes):
        seconds, hidden = collective_seconds(one, scenario), 0.0
        if one.what in traffic.OF_BACKBONE:
            hidden = min(seconds * (1 - 1 / one.times), room)
            room -= hidden
        elif one.what in traffic.UNWAITED:
            hidden = seconds
        whose = "cluster losses, " if one.what in traffic.OF_CLUSTER_LOSSES else ""
        name = f"{whose}{one.kind}: {one.what}"
        parts.append(Part(name=name, seconds=seconds - hidden, hidden=hidden, assumed=True))
    return parts


def _refresh_seconds(scenario: Scenario) -> float:
    config, sizes = scenario.config, scenario.sizes
    if not config.clustering.enabled:
        return 0.0
    sent = sum(collective_seconds(one, scenario) for one in traffic.of_refresh(config, sizes, first=False))
    return scenario.rates.seconds(work.of_refresh(config, sizes)) + sent


def _host_floor(scenario: Scenario) -> float:
    if scenario.config.model.graph:  # two launches
        return 0.0
    return scenario.rates.host_seconds(work.of_backbone(scenario.config, scenario.sizes))


def _core_rate(config: RunConfig) -> float:
    a = config.augment
    augmented = any(getattr(a, name) for name in ("colour", "blur", "grey", "low_resolution", "crop", "occlusion"))
    return IMAGES_PER_CORE_S * (_AUGMENTED if augmented else 1.0)


def _loader_floor(scenario: Scenario) -> float:
    """Seconds in which a rank's images of a step are decoded at the earliest."""
    config = scenario.config
    rate = config.data.threads * IMAGES_PER_THREAD_S * _core_rate(config) / IMAGES_PER_CORE_S
    if scenario.cores:
        rate = min(rate, scenario.cores / min(scenario.per_host, scenario.ranks) * _core_rate(config))
    return scenario.images / scenario.ranks / rate


def _notes(scenario: Scenario) -> list[str]:
    """What is assumed, in words."""
    config, device = scenario.config, scenario.device
    notes = []
    if scenario.ranks > 1:
        wires = device.within.name + (f", {scenario.network.name}" if scenario.hosts > 1 else "")
        notes.append(f"collectives: not measured; {links.SHARE:g} of the wires' speed ({wires})")
    if device.cuda:
        notes.append(f"memory: {BANDWIDTH.value:g} of the maker's bandwidth; context, libraries and allocator")
        if device.name not in MEASURED_ON or config.train.precision != "bf16":
            kind = f"{device.name} in {config.train.precision}"
            notes.append(f"{kind}: not measured; the shares of the peak that an H100 and an H200 reach in bf16")
        if _is_transformer(scenario):
            share = GPU["product"].value
            notes.append(f"matrix products of the backbone: {share:g} of the peak; not measured on a GPU")
        if config.clustering.enabled and not memory.contrast_by_triton(config, device):
            notes.append(f"logits of the contrastive loss: {LOGIT_BYTES:g} bytes moved for each; measured for 128 rows")
        small = 1e3 * sum(one.value for one in FIXED.values())
        notes.append(f"kernels that are small anywhere: {small:.2g} ms a micro-batch, as on an H100 and an H200")
    if state.copy_ranks(config, scenario.sizes) > 1:
        whole = 4e-9 * state.backbone_of(config).parameters
        notes.append(f"memory: an evaluation holds the backbone's weights whole, {whole:.2g} GB, which are not counted")
    if scenario.dataset.guessed:
        notes.append(f"{scenario.dataset.samples:,} images: --images was not given")
    if scenario.dataset.labels is None:
        notes.append("every identity has as many images")
    return notes


def _is_transformer(scenario: Scenario) -> bool:
    """Whether matrix products outweigh convolutions in the backbone."""
    found = work.of_backbone(scenario.config, scenario.sizes)
    return found["product"] > found["convolution"]


def with_settings(scenario: Scenario, **sections: Mapping[str, object]) -> Scenario:
    """The same with other settings: with_settings(s, train={"batch_size": 64}). Raises ConfigError."""
    changed = {name: replace(getattr(scenario.config, name), **values) for name, values in sections.items()}
    return replace(scenario, config=replace(scenario.config, **changed))
