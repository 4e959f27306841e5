"""The run: build everything from the configuration, train, evaluate, save, and say how it goes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from backbones import build_backbone
from clustering.service import ClusterService
from configs.load import to_dict, to_yaml
from configs.schema import ConfigError, RunConfig
from data.batch import Batch
from data.files import appearing
from data.loader import build_loader
from partial_fc.collectives import all_reduce_
from partial_fc.head import PartialFCHead
from training.checkpoint import CheckpointError, CheckpointFolder, check_same_checkpoint, refuse_another_run
from training.checks import make_writable, open_records
from training.distributed import Ranks, data_parallel
from training.errors import TrainingError
from training.meter import Meter, cluster_advice
from training.metrics import HISTOGRAM_BINS, RunLog, count_histogram
from training.optim import build_optimizers, learning_rate
from training.step import TrainStep
from training.stopping import StopRequest
from training.timing import Stopwatch
from training.verify import Verification


class Trainer:
    """One run on this rank. `run` trains to the end, or to `train.stop_after_steps`."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        train = config.train
        self.output = Path(train.output)
        make_writable(self.output, ranks.rank)
        self.records = open_records(config.data)
        self.loader = build_loader(
            self.records,
            batch_size=train.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            seed=train.seed,
            backend=config.data.backend,
            device=ranks.device,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
            flip=config.data.flip,
            augment=config.augment,
            sampler=config.data.sampler,
            images_per_identity=config.data.images_per_identity,
            window=config.data.window,
        )
        self.steps_per_epoch = self.loader.steps_per_epoch // train.accumulation
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"train.accumulation: expected at most the epoch's {self.loader.steps_per_epoch} batches, "
                f"got {train.accumulation}"
            )
        self.total_steps = self.steps_per_epoch * train.epochs
        self.global_batch = train.batch_size * train.accumulation * ranks.world_size
        torch.manual_seed(train.seed)  # the same weights on all ranks
        try:
            backbone = build_backbone(config.model.backbone, embedding_size=config.model.embedding_size)
        except ValueError as error:
            raise ConfigError(f"model.backbone: {error}") from None
        torch.manual_seed(train.seed + 1 + ranks.rank)  # dropout and the like differ
        self.backbone = data_parallel(backbone.to(ranks.device), ranks)
        bf16_products = train.precision == "bf16" and ranks.device.type == "cuda"  # CPUs would only emulate them
        self.product_dtype = torch.bfloat16 if bf16_products else torch.float32
        self.head = PartialFCHead(
            num_classes=self.records.num_classes,
            embedding_size=config.model.embedding_size,
            config=config.head,
            group=ranks.group,
            seed=train.seed,
            product_dtype=self.product_dtype,
        ).to(ranks.device)
        self.service = self._build_service() if config.clustering.enabled else None
        self.optimizers = build_optimizers(
            self.backbone.parameters(), self.head.parameters(), config.optim, config.head, seed=train.seed
        )
        self.train_step = TrainStep(
            backbone=self.backbone,
            head=self.head,
            service=self.service,
            optimizers=self.optimizers,
            config=config,
            device=ranks.device,
        )
        self.verification = Verification(config, self.records, ranks)
        self.checkpoints = CheckpointFolder(self.output, ranks, train.keep_checkpoints)
        self.step, self._saved, self._advised = 0, -1, False
        self.meter = Meter(ranks)
        self._resume()

    def _build_service(self) -> ClusterService:
        return ClusterService(
            labels=self.records.labels,
            num_classes=self.records.num_classes,
            dim=self.config.model.embedding_size,
            group=self.ranks.group,
            device=self.ranks.device,
            config=self.config.clustering,
            margin=self.config.head.margin,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            product_dtype=self.product_dtype,
            stopwatch=Stopwatch(self.ranks.device),
        )

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, dict[str, Any]]:
        records = {"classes": self.records.num_classes, "samples": self.records.num_samples}
        return {"records": records, **to_dict(self.config)}

    def _state(self) -> dict[str, Any]:
        # Optimizers first: that of the class centres may bring them up to date.
        state: dict[str, Any] = {
            "settings": self._settings(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "head": self.head.state_dict(),
            "backbone": self.backbone.module.state_dict(),
            "service": None if self.service is None else self.service.state_dict(),
            "unusable": self.meter.unusable,
            "random": torch.get_rng_state(),
        }
        if self.ranks.device.type == "cuda":
            state["random_cuda"] = torch.cuda.get_rng_state(self.ranks.device)
        return state

    def _resume(self) -> None:
        path = self.checkpoints.latest() if self.config.train.resume else None
        check_same_checkpoint(path, self.ranks)
        if path is None:
            return
        state = self.checkpoints.load(path)
        if missing := self._state().keys() - state.keys() - {"random_cuda"}:
            raise CheckpointError(f"{path}: not a checkpoint of this program, {min(missing)!r} is not in it")
        refuse_another_run(path, state["settings"], self._settings())
        self.backbone.module.load_state_dict(state["backbone"])
        self.head.load_state_dict(state["head"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        if self.service is not None:
            self.service.load_state_dict(state["service"])
        self.meter.unusable.copy_(state["unusable"])
        torch.set_rng_state(state["random"])
        if self.ranks.device.type == "cuda" and "random_cuda" in state:  # else it was written on CPUs
            torch.cuda.set_rng_state(state["random_cuda"], self.ranks.device)
        self.step = self._saved = state["step"]

    def _save(self) -> None:
        if self.step == self._saved:
            return  # nothing has happened since the checkpoint that this run goes on from
        self._refuse_diverged()
        self.checkpoints.save(self.step, self._state())
        self._saved = self.step

    # ---- training ----------------------------------------------------------------------------------------------

    def run(self) -> str:
        """Train to the end, evaluating, saving and logging on the way: "", or the signal by which it was stopped.

        Raises TrainingError when it cannot go on. Call it in the main thread.
        """
        with StopRequest(self.ranks) as stop:
            return self._run(stop)

    def _run(self, stop: StopRequest) -> str:
        train = self.config.train
        last = min(self.total_steps, train.stop_after_steps or self.total_steps)
        self.log = RunLog(self.output, active=self.ranks.is_main, total_steps=self.total_steps, first_step=self.step)
        try:
            self._introduce()
            if self.step == 0:
                self._evaluate()  # untrained: what the later figures stand against
            stopped = ""
            while self.step < last and not stopped:
                for batches in self._epoch_from(self.step, last):
                    values = self.train_step(batches, step=self.step, lr=self._learning_rate())
                    self.step += 1
                    self.meter.add(values)
                    self.log.moved(self.step)
                    self._after_step(last)
                    if stopped := stop.due():
                        break
            self._save()
            if self.step == self.total_steps:
                self._finish()
            else:
                by = f" by {stopped}" if stopped else ""
                self.log.say(f"stopped{by} after {self.step} of {self.total_steps} steps; the same command goes on")
                return stopped
        finally:
            self.log.close()
            self.loader.close()
            self.records.close()
        return ""

    def _after_step(self, last: int) -> None:
        """What is due after a finished step: log, histograms, evaluation, checkpoint."""
        train = self.config.train
        epoch_ends = self.step % self.steps_per_epoch == 0
        evaluate_every = max(1, round(self.config.eval.every_epochs * self.steps_per_epoch))
        if self.step % train.log_steps == 0 or self.step == last or epoch_ends:
            self._report()
        if self.step % train.histogram_steps == 0 or self.step == last:
            self._histograms()
        if self.step % evaluate_every == 0 and self.step < self.total_steps:
            self._evaluate()
        if self.step % (train.checkpoint_steps or self.steps_per_epoch) == 0 and self.step < last:
            with self.meter.pause():
                self._save()

    def _learning_rate(self) -> float:
        return learning_rate(
            self.step,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            global_batch=self.global_batch,
            config=self.config.optim,
        )

    def _epoch_from(self, step: int, last: int) -> Iterator[list[Batch]]:
        """Groups of `accumulation` batches from optimizer step `step` to the end of its epoch, or to `last`."""
        accumulation = self.config.train.accumulation
        epoch, done = divmod(step, self.steps_per_epoch)
        if done == 0:
            self.meter.unusable.zero_()
        stream = self.loader.epoch(epoch, start=done * self.global_batch)
        try:
            for _ in range(min(self.steps_per_epoch - done, last - step)):
                with self.meter.data_wait:
                    batches = list(itertools.islice(stream, accumulation))
                yield batches
        finally:
            stream.close()

    def _introduce(self) -> None:
        records, ranks = self.records, self.ranks
        if self.ranks.is_main:
            (self.output / "config.yaml").write_text(to_yaml(self.config), encoding="utf-8")
        self.log.text("config", "```yaml\n" + to_yaml(self.config) + "```")
        self.log.text(
            "versions", f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}"
        )
        self.log.say(
            f"{records.num_samples} images of {records.num_classes} identities ({records.layout} records), "
            f"{ranks.world_size} rank(s) on {ranks.device.type}, {self.loader.backend} loader, "
            f"{self.global_batch} images a step, {self.steps_per_epoch} steps an epoch, {self.total_steps} in all"
            + (f"; resumed at step {self.step}" if self.step else "")
        )

    def _evaluate(self) -> None:
        with self.meter.pause():
            self.verification.run(self.backbone.module, self.step, self.log, self.output)

    def _report(self) -> None:
        """Log the means since the last report; stop, on all ranks alike, when going on makes no sense."""
        values = self.meter.take(self.train_step.head_time, self.train_step.cluster_time, self.global_batch)
        values["optim/learning_rate"] = self._learning_rate()
        if self.service is not None:
            values |= self.service.statistics(self.step)
        losses = " ".join(f"{name} {values[f'loss/{name}']:.3f}" for name in ("margin", "contrastive", "alignment"))
        rate = values["throughput/images_per_second"]
        self.log.scalars(self.step, values, f"loss {values['loss/total']:.3f} ({losses})  {rate:.0f} img/s")
        if not self._advised and (advice := cluster_advice(values, self.config.clustering)):
            self._advised = True
            self.log.say(advice)
        self._refuse_diverged()
        bad, limit = values["data/images_that_did_not_decode"], self.config.data.max_bad_images
        if bad > limit:
            raise TrainingError(
                f"{bad:.0f} images did not decode in this epoch, data.max_bad_images allows {limit}: the log names "
                "them; repair the records, or raise the limit"
            )

    def _refuse_diverged(self) -> None:
        if self.meter.diverged:
            raise TrainingError(
                f"the loss or its gradient is no longer finite at step {self.step}: lower optim.lr, add "
                "optim.warmup_epochs, or use --set train.precision=fp32; the newest checkpoint is from before"
            )

    def _histograms(self) -> None:
        """Margins and hard levels of all classes: each rank counts its own, one all-reduce adds them."""
        if self.service is None:
            return
        c = self.config.clustering
        bounds = (0.0, self.config.head.margin) if c.margin_rule == "kappaface" else (c.margin_low, c.margin_high)
        tags = {"margins": (self.service.margins_C, *bounds),
                "hard_level": (self.service.hard_levels_C, 0.0, 1.0)}  # fmt: skip
        for tag, (values_C, low, high) in tags.items():
            counts = all_reduce_(count_histogram(values_C, low, high), self.ranks.group).cpu()
            total, squares = counts[HISTOGRAM_BINS:].tolist()
            self.log.histogram(self.step, f"clusters/{tag}", counts[:HISTOGRAM_BINS], low, high, (total, squares))

    def _finish(self) -> None:
        self._evaluate()
        hardest = None if self.service is None else self.service.easiest_and_hardest(5)
        if self.ranks.is_main:
            with appearing([self.output / "backbone.pt"]) as (partial,), partial.open("wb") as file:
                torch.save(self.backbone.module.state_dict(), file)  # a path would hide why it cannot be written
            if hardest is not None:
                rows = [dataclasses.asdict(row) for row in hardest]
                with appearing([self.output / "classes.json"]) as (partial,):
                    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
        self.log.say(f"done: weights in {self.output / 'backbone.pt'}, logs in {self.output / 'tensorboard'}")
