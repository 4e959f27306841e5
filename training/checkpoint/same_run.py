"""Whether a checkpoint is of the run that wants to go on from it."""

from __future__ import annotations

from typing import Any

from training.checkpoint.errors import CheckpointError

# A checkpoint may be continued with other values of these; a change of anything else makes it another run.
_FREE_TO_CHANGE = {
    "train": {"output", "checkpoints", "resume", "stop_after_steps", "log_steps", "histogram_steps",
              "checkpoint_steps", "keep_checkpoints", "keep_best", "cpu_threads", "timeout", "device",
              "batch_size", "accumulation", "global_batch"},
    "data": {"path", "cache", "cache_gb", "backend", "threads", "prefetch", "max_bad_images"},
    "eval": {"sets", "every_epochs", "batch_size"},
    "head": {"impl"},
    "model": {"recompute", "compile", "graph", "shard"},
    "clustering": {"step_budget", "block", "start"},
    "tensorboard": {"sheet_classes", "projector_images"},
    "profile": {"steps", "after", "all_ranks"},
    "monitor": {"wandb_project", "mlflow_uri", "mlflow_experiment", "prometheus_port", "prometheus_address"},
    "guard": {"skips_to_roll_back", "rollback_lr", "max_rollbacks", "spike_deviations"},
}  # fmt: skip


def refuse_another_run(path: str, saved: dict[str, dict[str, Any]], mine: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError, naming the first setting that differs, unless `saved` and `mine` are the same run.

    Both: settings by section and name, as `configs.load.to_dict` gives them, with any further facts that must
    agree (classes, samples, images of a step) as sections of their own.
    """
    was, now = (facts.get("step", {}).get("images") for facts in (saved, mine))
    if now is not None and was is not None and was != now:
        raise CheckpointError(
            f"{path}: its steps were of {was} images, this run's are of {now} (train.batch_size x accumulation x "
            f"ranks): --set train.global_batch={was} keeps them so on any number of ranks that divides it"
        )
    for section, values in mine.items():
        for key, value in values.items():
            if key in _FREE_TO_CHANGE.get(section, ()):
                continue
            if key not in saved.get(section, {}):
                raise CheckpointError(
                    f"{path}: was written by a version of this program without {section}.{key}: choose another "
                    "train.output, or start over with --set train.resume=false"
                )
            before = saved[section][key]
            if before != value:
                raise CheckpointError(
                    f"{path}: was written with {section}.{key} = {before!r}, this run has {value!r}: set it back, "
                    "choose another train.output, or start over with --set train.resume=false"
                )
