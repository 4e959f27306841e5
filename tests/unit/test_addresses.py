"""Addresses with credentials are refused before anything names them; others are taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.addresses import holds_credentials
from configs.load import load_config
from configs.schema import ConfigError
from data.errors import DataError
from data.rec.places import local_file, place_of
from data.rec.records import RecordSet
from data.stores.cache import Cache

SECRET = "hunter2"
WITH = [
    f"s3://AKIA:{SECRET}@bucket/set",
    f"s3://AKIA:{SECRET}/with+slash@bucket/set",
    f"s3://AKIA:12{SECRET}@bucket",
    f"ftp://me:{SECRET}@host:21/set",
    f"https://{SECRET}@host/set",
    f"https://host/set?token={SECRET}",
    f"https://host/set/lfw.bin?X-Amz-Expires=9&X-Amz-Signature={SECRET}",
    f"https://host/set?sig=a/b{SECRET}",
    f"simplecache::s3://AKIA:{SECRET}@bucket/set",
    f"zip://set::https://host/a.zip?sig={SECRET}",
]
WITHOUT = [
    "s3://bucket/set",
    "s3://bucket/a:b/set",
    "http://host:9000/bucket/set",
    "http://host:9000/a@b/set",
    "http://[::1]:9000/a@b",
    "abfs://container@account.dfs.core.windows.net/set",
    "hdfs://user@host/set",
    "gs://bucket/what?/set",
    "simplecache::s3://bucket/set",
    "/data/a:b@c/d?e=f",
]


@pytest.mark.parametrize("address", WITH)
def test_credentials_are_refused_and_never_named(address: str, tmp_path: Path) -> None:
    assert holds_credentials(address)
    told = []
    for setting in (f"data.path={address}", f"eval.sets=['{address}']", f"eval.sets=['{address}', lfw.bin]"):
        with pytest.raises(ConfigError, match="without credentials") as refused:
            load_config(None, [setting])
        told.append(str(refused.value))
    recipe = tmp_path / "recipe.yaml"
    for text in (f"data: {{path: ['{address}']}}", f"data: {{threads: '{address}'}}", f"data: '{address}'"):
        recipe.write_text(text)
        with pytest.raises(ConfigError, match="with credentials, not shown") as wrong:
            load_config(recipe)
        told.append(str(wrong.value))
    cache = Cache(tmp_path)
    for read in (
        lambda: RecordSet.open(address, cache),
        lambda: place_of(address, cache),
        lambda: local_file(f"{address}/lfw.bin", cache),
    ):
        with pytest.raises(DataError, match="without credentials") as refused_too:
            read()
        told.append(str(refused_too.value))
    assert not [text for text in told if SECRET in text or "AKIA" in text or "\n" in text]


@pytest.mark.parametrize("address", WITHOUT)
def test_addresses_without_are_taken(address: str) -> None:
    assert not holds_credentials(address)
    assert load_config(None, [f"data.path={address}"]).data.path == address


def test_a_query_behind_a_name_beside_a_far_set() -> None:
    far = "data.path=https://host/set"
    with pytest.raises(ConfigError, match=r"eval\.sets: expected an address without credentials"):
        load_config(None, [far, f"eval.sets=['lfw.bin?token={SECRET}']"])
    assert load_config(None, ["data.path=/here", "eval.sets=['odd?name=1.bin']"]).eval.sets == ("odd?name=1.bin",)


def test_a_mistyped_setting_does_not_show_them() -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(None, [f"data.path s3://AKIA:{SECRET}@bucket"])
    assert SECRET not in str(refused.value)
