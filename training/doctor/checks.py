"""The checks of a run on this host, from its settings."""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from configs.schema import ConfigError, RunConfig
from data.rec.records import RecordSet
from training.checks import cache_of, open_records
from training.doctor import dataset, disk, gpus, host, memory, network, processes
from training.doctor.finding import Check, Finding, Once

_SECONDS = 20.0
_SECONDS_OF_DATA = 60.0
"""A set without an index is scanned when it is opened."""


class Doctor:
    """What several checks need is found out once."""

    def __init__(self, config: RunConfig, place: network.Endpoint, *, ranks: int = 0, hosts: int = 1) -> None:
        """place: where ranks meet. ranks: of all hosts together; 0: one for each GPU of the hosts, or one."""
        self.config, self._place, self._ranks, self._hosts = config, place, ranks, hosts
        self._records: Once[RecordSet] = Once(lambda: open_records(config.data))
        self._probed: Once[gpus.GpuFacts] = Once(processes.gpu_facts)
        self.plan: Once[memory.Plan] = Once(self._make_plan)

    def checks(self) -> list[Check]:
        """In the order of the report."""
        late, of_gpus = _SECONDS_OF_DATA, processes.SECONDS + _SECONDS
        return [
            Check("versions", host.versions, _SECONDS),
            Check("GPUs", self._of_gpus, of_gpus),
            Check("process group", lambda: [self._group()], 2 * of_gpus),
            Check("rendezvous", lambda: network.meeting_place(self._place), _SECONDS),
            Check("host", self._host, of_gpus),
            Check("open files", lambda: [self._open_files()], late),
            Check("output", self._output, _SECONDS),
            Check("disk space", lambda: [self._room()], late),
            Check("records", lambda: [dataset.opened(self._records())], late),
            Check("images", lambda: self._if_open(dataset.decoded, self.config.data.max_bad_images), late),
            Check("epoch", lambda: self._if_open(dataset.epoch, self.config, self.ranks), late),
            Check("verification", self._verification, late),
            Check("cache", self._cache, late),
            Check("memory", self._memory, late),
        ]

    # ---- what they need ----------------------------------------------------------------------------------------

    def _facts(self) -> gpus.GpuFacts:
        """Without GPUs where they are not wanted, or not to be found out."""
        if self.config.train.device == "cpu" or not torch.version.cuda:
            return gpus.GpuFacts(gpus=(), driver=gpus.driver())
        try:
            return self._probed()
        except ConfigError:  # said by the check of GPUs
            return gpus.GpuFacts(gpus=())

    @property
    def ranks(self) -> int:
        return self._ranks or max(1, len(self._facts().gpus) * self._hosts)

    @property
    def local_ranks(self) -> int:
        """Of one host."""
        return -(-self.ranks // self._hosts)

    @property
    def _on_gpus(self) -> bool:
        return gpus.will_use(self._facts(), self.config.train.device, self.local_ranks)

    def _make_plan(self) -> memory.Plan:
        records = self._records()
        on_host = self.local_ranks if self._hosts > 1 else 0
        sizes = memory.sizes_of(records.labels, records.num_classes, self.ranks, on_host)
        return memory.plan(self.config, sizes, cuda=self._on_gpus)

    def _is_open(self) -> bool:
        try:
            self._records()
        except Exception:  # said by the check of the records
            return False
        return True

    # ---- checks ------------------------------------------------------------------------------------------------

    def _of_gpus(self) -> Iterator[Finding]:
        train = self.config.train
        facts = self._probed() if train.device != "cpu" and torch.version.cuda else self._facts()
        yield from gpus.gpus(facts, device=train.device, local_ranks=self.local_ranks, precision=train.precision)
        yield gpus.nccl(facts, on_gpus=self._on_gpus)

    def _group(self) -> Finding:
        count = min(2, len(self._facts().gpus)) if self._on_gpus else 2
        return processes.group(cuda=self._on_gpus, processes=count)

    def _host(self) -> Iterator[Finding]:
        local, threads = self.local_ranks, self.config.data.threads
        yield host.cores(host.cores_here(), local, threads)
        yield host.shared_memory(host.shared_memory_here(), local, nccl=self._on_gpus)
        yield host.processes(host.process_limit(), local_ranks=local, threads=threads)
        yield host.locked_memory(host.soft_limit(resource.RLIMIT_MEMLOCK))

    def _open_files(self) -> Finding:
        return host.open_files(
            host.soft_limit(resource.RLIMIT_NOFILE),
            ranks=self.ranks,
            record_files=len(self._records().names) if self._is_open() else 1,
            threads=self.config.data.threads,
        )

    def _output(self) -> Iterator[Finding]:
        train = self.config.train
        yield disk.output(Path(train.output), "train.output")
        folder = disk.checkpoint_folder(train)
        if folder is not None and (train.checkpoints or folder.exists()):
            yield disk.output(folder, "train.checkpoints")

    def _room(self) -> Finding:
        folder = disk.checkpoint_folder(self.config.train)
        if folder is None:
            return Finding("disk space", "pass", f"checkpoints go to {self.config.train.checkpoints}: not looked at")
        if not self._is_open():
            return _unknown("disk space")
        return disk.room(disk.free_at(folder), disk.held_by(folder), self.plan().checkpoint, self.config.train)

    def _if_open(self, look: Callable[..., Finding], *more: object) -> list[Finding]:
        """look: gets the records first. Nothing where there are none: one line says so."""
        return [look(self._records(), *more)] if self._is_open() else []

    def _verification(self) -> Iterator[Finding]:
        if self._is_open():
            yield from dataset.verification(self.config.eval.sets, self._records().file)

    def _cache(self) -> Iterator[Finding]:
        if not self._is_open() or not self._records().far:
            return
        cache = cache_of(self.config.data)
        yield disk.cache(disk.free_at(cache.folder), disk.held_by(cache.folder), cache, self._records().bytes)

    def _memory(self) -> Iterator[Finding]:
        if not self._is_open():
            yield _unknown("memory plan")
            return
        plan, local, cuda = self.plan(), self.local_ranks, self._on_gpus
        if cuda:
            yield memory.device_memory(plan, [gpu.free for gpu in self._facts().gpus[:local]])
        yield memory.host_memory(plan, host.memory_here(), local, cuda=cuda)


def _unknown(name: str) -> Finding:
    return Finding(name, "warn", "not known, as the records do not open")
