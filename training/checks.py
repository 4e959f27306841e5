"""What must hold before a run is built: a folder to write to, records that the backbones can take, and a step."""

from __future__ import annotations

from pathlib import Path

from backbones import IMAGE_SIZE
from configs.data import DataConfig
from configs.schema import ConfigError
from data.rec.records import RecordSet
from data.stores.cache import Cache, default_folder


def make_writable(output: Path, rank: int) -> None:
    """Make the output folder. Raises ConfigError when this rank cannot write to it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        probe = output / f".writable_{rank}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"train.output: cannot write to {output} ({error.strerror}): choose another with --set train.output=…"
        ) from None


def cache_of(config: DataConfig) -> Cache:
    """Where blocks of a far set are kept."""
    folder = Path(config.cache).expanduser() if config.cache else default_folder()
    return Cache(folder, int(config.cache_gb * 1e9))


def steps_of(batches: int, accumulation: int) -> int:
    """Optimizer steps of an epoch of so many batches. Raises ConfigError when there is none."""
    if batches < accumulation:
        raise ConfigError(f"train.accumulation: expected at most the epoch's {batches} batches, got {accumulation}")
    return batches // accumulation


def open_records(config: DataConfig) -> RecordSet:
    """Open the training set. Raises ConfigError or DataError when there is none, or none that can be trained on."""
    path = config.path
    if not path:
        raise ConfigError("data.path: expected the folder that holds train.rec, got nothing: use --set data.path=…")
    records = RecordSet.open(path, cache_of(config))
    if records.image_size != IMAGE_SIZE:
        expected, found = ("x".join(map(str, size)) for size in (IMAGE_SIZE, records.image_size))
        raise ConfigError(
            f"data.path: expected images of {expected} pixels, which the backbones take, got {found} by "
            f"{records.address}/property: pack the images again, or correct property"
        )
    if records.num_classes < 2:
        raise ConfigError(f"data.path: expected at least 2 identities, got {records.num_classes} in {path}")
    return records
