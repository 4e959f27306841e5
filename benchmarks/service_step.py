"""What the cluster service costs a training step of MS1MV3's size, measured: made for one GPU.

Two trainings of iResNet-50 with the settings of configs/ms1mv3_r50.yaml, one of them without clusters, take turns of
some steps on the same random images, so that what a slice makes the host wait falls on those who caused it. There are
as many images, identities and clusters as MS1MV3 has. On one GPU with a batch of 128 a step has the share of head,
clusters and refresh that it has on eight with 128 each, as both grow with the global batch; collectives are left out on
both sides. The bank is filled with rows like faces' and a first version made, untimed; while steps are timed all losses
are on and the second refresh is under way.

Legend: B images of the batch, N all of them, C identities, D embedding size.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from backbones import IMAGE_SIZE, build_backbone
from benchmarks.measuring.report import facts, publish
from benchmarks.service import HEADER, step_rows
from clustering.service.service import ClusterService
from configs.load import load_config
from configs.schema import ConfigError, RunConfig, TrainConfig
from data.loading.batch import Batch
from partial_fc.collectives import GatheredBatch
from partial_fc.head import PartialFCHead
from training.distributed import Ranks, data_parallel, open_ranks
from training.optim import build_optimizers
from training.showing.timing import Stopwatch
from training.step import TrainStep

_CONFIG = Path(__file__).parents[1] / "configs" / "ms1mv3_r50.yaml"
_FILLED_AT_ONCE = 1 << 14
_JUMP = 50  # steps at a time of the refresh that is not timed
_COSINE = 0.65  # of a row to its person
_TURN = 10  # steps


def long_tailed_labels(images: int, classes: int, generator: np.random.Generator) -> npt.NDArray[np.int64]:
    """Class of each image, int64 (N,): one image a class, the others in proportion to j^-1/2, shuffled."""
    share_C = np.arange(1, classes + 1) ** -0.5
    rest = generator.choice(classes, size=images - classes, p=share_C / share_C.sum())
    labels_N = np.concatenate([np.arange(classes), rest]).astype(np.int64)
    generator.shuffle(labels_N)
    return labels_N


class Arm:
    """One of the two trainings."""

    def __init__(self, config: RunConfig, labels_N: Tensor, steps: int, ranks: Ranks, *, guided: bool) -> None:
        """steps: of an epoch."""
        torch.manual_seed(0)
        D, product_dtype = config.model.embedding_size, torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
        classes = int(labels_N.max()) + 1
        backbone = build_backbone(config.model.backbone, embedding_size=D).to(ranks.device)
        head = PartialFCHead(
            num_classes=classes,
            embedding_size=D,
            config=config.head,
            group=ranks.group,
            seed=0,
            product_dtype=product_dtype,
        ).to(ranks.device)
        self.service = (
            None
            if not guided
            else ClusterService(
                labels=labels_N.numpy(),
                num_classes=classes,
                dim=D,
                group=ranks.group,
                device=ranks.device,
                config=config.clustering,
                margin=config.head.margin,
                total_steps=steps * config.train.epochs,
                steps_per_epoch=steps,
                product_dtype=product_dtype,
            )
        )
        self.labels_N, self.ranks, self.steps, self.dim = labels_N, ranks, steps, D
        self.train_step = TrainStep(
            backbone=data_parallel(backbone, ranks),
            head=head,
            service=self.service,
            optimizers=build_optimizers(backbone.parameters(), head.parameters(), config.optim, config.head, seed=0),
            config=config,
            device=ranks.device,
        )
        if config.model.graph:
            self.train_step.record(config.train.batch_size)

    def prepare(self) -> int:
        """Fill the bank, publish the first version, begin the second refresh; the step that comes next. If guided."""
        device, service = self.ranks.device, self.service
        assert service is not None
        person_CD = F.normalize(torch.randn(int(self.labels_N.max()) + 1, self.dim, device=device))
        for ids_n in torch.arange(len(self.labels_N)).split(_FILLED_AT_ONCE):
            labels_n = self.labels_N[ids_n].to(device)
            noise_nD = torch.randn(len(ids_n), self.dim, device=device) * (_COSINE**-2 - 1) ** 0.5 / self.dim**0.5
            x_nD = F.normalize(person_CD[labels_n] + noise_nD)
            service.observe(GatheredBatch(x_nD, labels_n, ids_n.to(device), self.ranks.group))
        step = self.steps - 1
        service.advance(step)
        while service.version == 0:
            step = min(step + _JUMP, 2 * self.steps - 1)
            service.advance(step)
        if step < 2 * self.steps - 1:
            step = 2 * self.steps - 1
            service.advance(step)
        return step + 1


def measure(config: RunConfig, args: argparse.Namespace, ranks: Ranks) -> tuple[dict[str, list[float]], str]:
    """Seconds of each timed step of both arms, and what the steps were made of."""
    labels_N = torch.from_numpy(long_tailed_labels(args.images, args.classes, np.random.default_rng(0)))
    steps = args.images // args.batch
    arms = {name: Arm(config, labels_N, steps, ranks, guided=name == "clusters") for name in ("plain", "clusters")}
    guided = arms["clusters"]
    assert guided.service is not None
    first = guided.prepare()
    pixels = torch.randint(0, 256, (args.batch, *IMAGE_SIZE, 3), dtype=torch.uint8, device=ranks.device)
    total = args.warmup + args.steps
    ids_TB = torch.randint(0, len(labels_N), (total, args.batch))
    # On the device before the first step: copies of memory that is not pinned would make each wait for the one before.
    on_device = zip(labels_N[ids_TB].to(ranks.device), ids_TB.to(ranks.device), strict=True)
    batches = [Batch(pixels.permute(0, 3, 1, 2), labels_B, ids_B) for labels_B, ids_B in on_device]
    watches: dict[str, list[Stopwatch]] = {name: [] for name in arms}  # one a step: none waits for the one before
    names = list(arms)
    for start in range(0, total, _TURN):
        for name in names:
            for number in range(start, min(start + _TURN, total)):
                if number == args.warmup:
                    arms[name].train_step.head_time.take()
                    arms[name].train_step.cluster_time.take()
                watches[name].append(Stopwatch(ranks.device))
                with watches[name][-1]:
                    arms[name].train_step([batches[number]], step=first + number, lr=1e-3)
        names.reverse()  # nobody always comes first
    seconds = {name: [watch.take() for watch in of_arm[args.warmup :]] for name, of_arm in watches.items()}
    head, plain_head, cluster = (
        1000 * watch.take() / args.steps
        for watch in (guided.train_step.head_time, arms["plain"].train_step.head_time, guided.train_step.cluster_time)
    )
    about = guided.service.statistics(first + total)
    return seconds, (
        f"B = {args.batch}, {args.images:,} images of {args.classes:,} identities, {guided.service.num_clusters:,} "
        f"clusters, {config.model.backbone} in {config.train.precision}, {args.steps} timed steps of {steps:,} of an "
        f"epoch; version {about['clusters/version']:.0f}, ramp {about['clusters/ramp']:g}; head and losses "
        f"{head:.2f} ms a step (plain {plain_head:.2f}), bank, centres and slices {cluster:.2f}"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.service_step", description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=5_179_510, metavar="N")
    parser.add_argument("--classes", type=int, default=93_431, metavar="C")
    parser.add_argument("--batch", type=int, default=128, metavar="B")
    parser.add_argument("--backbone", default="iresnet50")
    parser.add_argument(
        "--graph", action="store_true", help="both with model.graph: what a host's launches cost is left out"
    )
    parser.add_argument("--steps", type=int, default=200, help="timed, default 200")
    parser.add_argument("--warmup", type=int, default=20, help="steps before those, default 20")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the result there, in Markdown; JSON beside it")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when done, 2 when an argument is not as expected."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser()
    args = parser.parse_args(arguments)
    if min(args.batch, args.steps, args.classes - 1, args.warmup + 1) < 1:
        parser.error("expected at least 2 classes, a batch of 1, 1 step and a warm-up of 0")
    if args.images < max(args.classes, args.batch):
        parser.error("expected as many images as classes, and as a batch")
    try:
        with open_ranks(TrainConfig(device=args.device)) as ranks:
            config = load_config(
                _CONFIG,
                [
                    *("clustering.warmup_fraction=0", "clustering.ramp_fraction=0", f"train.batch_size={args.batch}"),
                    *(f"model.backbone={args.backbone}", "eval.sets=[]"),
                    f"model.graph={str(args.graph).lower()}",
                    *(() if ranks.device.type == "cuda" else ("train.precision=fp32",)),
                ],
            )
            about = facts(ranks.device, "benchmarks.service_step", arguments)
            seconds, about["work"] = measure(config, args, ranks)
    except (ConfigError, ValueError) as error:
        parser.error(str(error))
    rows = step_rows("a step", seconds, 2)
    publish("Cluster service: a step of MS1MV3's size", HEADER, rows, about=about, rows=[seconds], out=args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
