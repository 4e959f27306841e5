"""The run: build everything from the configuration, train, evaluate, save, and say how it goes."""

from __future__ import annotations

import contextlib
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from configs.schema import RunConfig
from data.loading.batch import Batch
from partial_fc.head import PartialFCHead
from training.building import loader_of, new_backbone, on_all_ranks, service_of, weights_of, whole
from training.checkpoint import Saved
from training.checkpointing import RunCheckpoints
from training.checks import make_writable, steps_of
from training.distributed import Ranks, is_restart
from training.errors import TrainingError
from training.guard import Guard, RollBack
from training.optim import build_optimizers, learning_rate
from training.ranks.agreement import facts_of, open_same_records
from training.ranks.monitor import CLOSING
from training.results import introduce, write_results
from training.run_state import RunState
from training.sharded import ShardedBackbone
from training.showing.board import Board
from training.showing.flops import Work
from training.showing.layout import layout
from training.showing.meter import Meter, cluster_advice, cluster_histograms
from training.showing.metrics import RunLog
from training.sinks import Sinks, build_sinks
from training.step import TrainStep
from training.stopping import Signals, Stopped, StopRequest
from training.verify import Verification

_LAST_PICTURES_S = 120.0
"""A run that is done waits so long for the curves of its last evaluation."""


class Trainer:
    """One run on this rank. `run` trains to the end, or to `train.stop_after_steps`."""

    def __init__(self, config: RunConfig, ranks: Ranks) -> None:
        self.config, self.ranks = config, ranks
        train = config.train
        self.batch_size, self.accumulation = config.share(ranks.world_size)
        self.output = Path(train.output)
        make_writable(self.output, ranks.rank)
        sinks = build_sinks(config.monitor, lambda line: self.log.say(line))  # noqa: PLW0108  # all refuse it alike
        self.sinks = sinks if ranks.is_main else Sinks()
        self.records, labels = open_same_records(config.data, ranks)
        self.loader = loader_of(config, self.records, ranks, batch_size=self.batch_size)
        self.steps_per_epoch = steps_of(self.loader.steps_per_epoch, self.accumulation)
        self.total_steps = self.steps_per_epoch * train.epochs
        self.global_batch = self.batch_size * self.accumulation * ranks.world_size
        torch.manual_seed(train.seed)  # the same weights on all ranks
        backbone = new_backbone(config.model)
        self.work = Work.of(backbone, config, num_classes=self.records.num_classes, device=ranks.device)
        torch.manual_seed(train.seed + 1 + ranks.rank)  # dropout and the like differ
        self.backbone = on_all_ranks(backbone, config.model, ranks)
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
        self.service = None
        if config.clustering.enabled:
            steps = {"total_steps": self.total_steps, "steps_per_epoch": self.steps_per_epoch}
            self.service = service_of(config, self.records, ranks, **steps, product_dtype=self.product_dtype)
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
        state = RunState(
            backbone=self.backbone if isinstance(self.backbone, ShardedBackbone) else self.backbone.module,
            head=self.head,
            optimizers=self.optimizers,
            service=self.service,
            ranks=ranks,
            seed=train.seed,
        )
        self.checkpoints = RunCheckpoints(
            train, ranks, state, facts_of(config, self.records, labels, self.global_batch)
        )
        self.step, self._evaluated, self._checked, self._advised = 0, -1, -1, False
        self.meter = Meter(ranks)
        cuda, rates = ranks.device.type == "cuda", self.work.rates(0)
        self.layout = layout(config, ranks=ranks.world_size, cuda=cuda, rates=rates)
        trained = [name for name, p in self.backbone.module.named_parameters() if p.requires_grad]
        self.guard = Guard(config.guard, parameters=trained, ranks=ranks, say=lambda line: self.log.say(line))  # noqa: PLW0108
        self._start()
        if config.model.graph:
            self.train_step.record(self.batch_size)  # before any thread of the loader's
        self.board = Board(config, self.records, self.verification.sets, self.service, ranks, self.output)

    # ---- checkpoints -------------------------------------------------------------------------------------------

    def counts(self) -> dict[str, Any]:
        """That belong to the state of the run."""
        scale = self.train_step.loss_scale
        return {
            "unusable": float(self.meter.unusable),
            "guard": self.guard.state_dict(),
            "loss_scale": None if scale is None else scale.state_dict(),
        }

    def _start(self) -> None:
        saved = self.checkpoints.start(resume=self.config.train.resume)
        if saved is not None:
            self._go_on_from(saved)
            self.guard.load_state_dict(saved.values["run"]["guard"])

    def _go_on_from(self, saved: Saved) -> None:
        """Counts of the run as they were saved, but for the guard's."""
        values = saved.values["run"]
        self.meter.unusable.fill_(values["unusable"])
        if self.train_step.loss_scale is not None:
            self.train_step.loss_scale.load_state_dict(values["loss_scale"])
        self.step, self._checked = saved.manifest.step, -1
        self._evaluated = self.step if saved.manifest.evaluated else -1

    def _roll_back(self, why: str) -> None:
        """Go on from the newest checkpoint with a lower learning rate. Raises TrainingError when that is of no use."""
        self.guard.rolled_back(why, can=self.checkpoints.has_one(self.log))
        saved = self.checkpoints.resume()
        assert saved is not None
        self._go_on_from(saved)
        rate = f"{self.guard.lr_factor:g} of the schedule's"
        self.log.say(f"{why}: back to step {self.step}; the learning rate is {rate}")

    def _check_weights(self) -> None:
        """Raises RollBack, on all ranks, when they are not finite. One all-reduce, once after a step."""
        if self._checked != self.step:
            self.guard.check_weights(self.backbone, self.head)
            self._checked = self.step

    def _save(self, *, last: bool = False) -> None:
        """Raises RollBack instead of saving what no step could go on from."""
        self.guard.settle()
        self._check_weights()
        self.ranks.monitor.at(self.step, "checkpoint")
        self.checkpoints.save(self.step, self.counts, self.log, last=last)

    # ---- training ----------------------------------------------------------------------------------------------

    def run(self, signals: Signals) -> str:
        """Train to the end, evaluating, saving and logging on the way: "", or the signal by which it was stopped.

        Raises TrainingError when it cannot go on.
        """
        self._stop = StopRequest(self.ranks, signals)
        train = self.config.train
        last = min(self.total_steps, train.stop_after_steps or self.total_steps)
        main, total = self.ranks.is_main, self.total_steps
        self.log = RunLog(
            self.output, active=main, total_steps=total, first_step=self.step, layout=self.layout, sinks=self.sinks
        )
        self.ranks.monitor.closing.append(lambda: self.log.close(failed=True))
        try:
            introduce(self.log, self.config, self.records, self.ranks, self.output)
            self.sinks.start(self.config, self.output, resumed=self.step > 0 or is_restart())
            self.log.say(
                f"{self.loader.backend} loader, {self.global_batch} images a step, {self.steps_per_epoch} steps an "
                f"epoch, {self.total_steps} in all" + (f"; resumed at step {self.step}" if self.step else "")
            )
            stopped = ""
            try:
                self._stop.check_now()  # it may have come while all was built
                self._train(last)
                if self.step == self.total_steps:
                    self._finish()
                    return ""
            except Stopped as end:
                stopped = str(end)
                self._save_last()
            by = f" by {stopped}" if stopped else ""
            self.log.say(f"stopped{by} after {self.step} of {self.total_steps} steps; the same command goes on")
            return stopped
        finally:
            self._close()

    def _close(self) -> None:
        """The end, be it by a signal, which leaves half a minute. One that fails does not keep the others from it."""
        if sys.exc_info()[0] is None:  # else the place of the error is what the other ranks are told
            self.ranks.monitor.at(self.step, CLOSING)
        with contextlib.ExitStack() as closing:  # the last one first
            closing.callback(self.records.close)
            closing.callback(self.loader.close)
            closing.callback(self.log.close)
            closing.callback(self.board.close, self.step, self.log)
            closing.callback(self.verification.close)

    def _train(self, last: int) -> None:
        """To step `last`, and save. Raises Stopped, on all ranks."""
        while True:
            try:
                if self._is_evaluation_due() and self.step < self.total_steps:
                    self._evaluate()  # untrained: what the later figures stand against; or what a stop came before
                self._steps(last)
                self._save(last=True)
                return
            except RollBack as failure:
                self._roll_back(str(failure))

    def _save_last(self) -> None:
        """Before an end that was asked for."""
        try:
            if self.step:
                self._save(last=True)
        except RollBack as failure:  # nothing to save: the checkpoint before is the newest that one can go on from
            self.log.say(f"{failure}: no checkpoint is written, the one before counts")

    def _steps(self, last: int) -> None:
        """Train to step `last`. Raises RollBack and Stopped, on all ranks."""
        while self.step < last:
            for batches in self._epoch_from(self.step, last):
                self.ranks.begin_step(self.step)
                lr = self._learning_rate()
                values = self.train_step(batches, step=self.step, lr=lr)
                self.guard.take(self.step, lr, values)
                self.step += 1
                self.meter.add(values)
                self.log.moved(self.step)
                self._after_step(last)
                self.board.after_step(self.step, self.log)
                self._stop.check()

    def _after_step(self, last: int) -> None:
        """What is due after a finished step: log, histograms, evaluation, checkpoint."""
        train = self.config.train
        epoch_ends = self.step % self.steps_per_epoch == 0
        if self.step % train.log_steps == 0 or self.step == last or epoch_ends:
            self._report()
        if self.service is not None and (self.step % train.histogram_steps == 0 or self.step == last):
            cluster_histograms(self.service, self.config, self.step, self.log)
        if self.step % (train.checkpoint_steps or self.steps_per_epoch) == 0 and self.step < last:
            self._save()  # before an evaluation: it is written meanwhile
        if self._is_evaluation_due() and self.step < self.total_steps:
            self._check_weights()
            self._evaluate()

    def _is_evaluation_due(self) -> bool:
        """Also before the first step, and again when a run that goes on had not come to it."""
        every = max(1, round(self.config.eval.every_epochs * self.steps_per_epoch))
        return self.step % every == 0 and self._evaluated != self.step

    def _learning_rate(self) -> float:
        return self.guard.lr_factor * learning_rate(
            self.step,
            total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch,
            global_batch=self.global_batch,
            config=self.config.optim,
        )

    def _epoch_from(self, step: int, last: int) -> Iterator[list[Batch]]:
        """Groups of `accumulation` batches from optimizer step `step` to the end of its epoch, or to `last`."""
        epoch, done = divmod(step, self.steps_per_epoch)
        if done == 0:
            self.meter.unusable.zero_()
        stream = self.loader.epoch(epoch, start=done * self.global_batch)
        try:
            for _ in range(min(self.steps_per_epoch - done, last - step)):
                self.ranks.monitor.at(self.step, "data")
                with self.meter.data_wait:
                    batches = list(itertools.islice(stream, self.accumulation))
                yield batches
        finally:
            stream.close()

    def _evaluate(self) -> None:
        self.ranks.monitor.at(self.step, "evaluation")
        with self.meter.pause(), whole(self.backbone) as backbone:
            score = self.verification.run(backbone, self.step, self.log, self.output, self._stop)
            self.checkpoints.rate(self.step, score, self.log)
        self._evaluated = self.step

    def _report(self) -> None:
        """Log the means since the last report; stop, on all ranks alike, when going on makes no sense."""
        values = self.meter.take(self.train_step.stopwatches, self.global_batch)
        values |= self.work.rates(values["throughput/images_per_second_per_rank"])
        values["optim/learning_rate"] = self._learning_rate()
        if self.train_step.loss_scale is not None:
            values["optim/loss_scale"] = self.train_step.loss_scale.factor.item()
        values |= self.guard.statistics()
        self.checkpoints.listen(self.log)
        self.verification.show()
        values |= self.checkpoints.statistics()
        if self.service is not None:
            values |= self.service.statistics(self.step)
        losses = " ".join(f"{name} {values[f'loss/{name}']:.3f}" for name in ("margin", "contrastive", "alignment"))
        rate = values["throughput/images_per_second"]
        self.log.scalars(self.step, values, f"loss {values['loss/total']:.3f} ({losses})  {rate:.0f} img/s")
        if not self._advised and (advice := cluster_advice(values, self.config.clustering)):
            self._advised = True
            self.log.say(advice)
        bad, limit = values["data/images_that_did_not_decode"], self.config.data.max_bad_images
        if bad > limit:
            raise TrainingError(
                f"{bad:.0f} images did not decode in this epoch, data.max_bad_images allows {limit}: the log names "
                "them; repair the records, or raise the limit"
            )

    def _finish(self) -> None:
        self._evaluate()
        hardest = None if self.service is None else self.service.easiest_and_hardest(5)
        weights = weights_of(self.backbone)
        if self.ranks.is_main:
            write_results(self.output, weights, hardest)
        with whole(self.backbone) as backbone:
            self.board.finish(backbone, self.step, self.log)
        self.ranks.monitor.at(self.step, CLOSING)
        self.verification.show(within=_LAST_PICTURES_S)
        self.log.say(f"done: weights in {self.output / 'backbone.pt'}, logs in {self.output / 'tensorboard'}")
