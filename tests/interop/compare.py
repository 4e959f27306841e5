"""Our side of `make interop`: writes sets, has mxnet read them, reads what mxnet writes, and compares all of it.

compare.py PYTHON_WITH_MXNET: prints a line a check; 1 when one fails.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.header import unpack
from data.index import read_index
from data.recordio import HEAD, LENGTH_BITS, RecordReader, RecordWriter
from data.records import RecordSet
from data.verification_bin import read_bin

ROOT = Path(__file__).parents[2]
FIXTURE = ROOT / "tests" / "fixtures" / "mxnet"
_Mxnet = Callable[..., str]


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _dump(reader: RecordReader, idx: Path, kind: str) -> dict[str, Any]:
    """What `mxnet_side.py dump` prints, by our reader."""
    rows = {}
    for key, offset in zip(*(column.tolist() for column in read_index(idx, reader)), strict=True):
        payload = reader.read_at(offset)
        rows[str(key)] = row = {"payload": _sha256(payload)}
        if kind == "images":
            header, image = unpack(payload)
            row.update(header._asdict() | {"labels": list(header.labels), "image": _sha256(image)})
    return {"by_key": rows, "in_order": [_sha256(reader.read_at(offset)) for offset, _ in reader.scan()]}


def _parts(reader: RecordReader) -> int:
    """Number of records in more than one part."""
    return sum(HEAD.unpack_from(reader.view, offset)[1] >> LENGTH_BITS != 0 for offset, _ in reader.scan())


def _compare_dump(rec: Path, kind: str, mxnet: _Mxnet) -> str:
    reader, idx = RecordReader(rec), rec.with_suffix(".idx")
    ours = _dump(reader, idx, kind)
    theirs = json.loads(mxnet("tests/interop/mxnet_side.py", "dump", str(rec), str(idx), kind))
    version = theirs.pop("mxnet")
    assert theirs["in_order"] == ours["in_order"]
    for key, row in ours["by_key"].items():
        assert theirs["by_key"][key] == row, f"key {key}: mxnet {theirs['by_key'][key]}, ours {row}"
    assert theirs.keys() == ours.keys()
    assert len(theirs["by_key"]) == len(ours["by_key"])
    return f"mxnet {version} reads {len(ours['in_order'])} records alike, {_parts(reader)} of them in parts"


def mxnet_reads_a_packed_set(folder: Path, mxnet: _Mxnet) -> str:
    pack = ("pack", "synthetic", "--identities", "12", "--images-per-identity", "5", "--label-noise", "0.1")
    held_out = ("--verification-identities", "6", "--pairs", "20", "--workers", "2")
    command = [sys.executable, "-m", "data", *pack, *held_out, "--out", str(folder / "set")]
    subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
    assert RecordSet.open(folder / "set").num_samples == 60
    return _compare_dump(folder / "set" / "train.rec", "images", mxnet)


def mxnet_unpickles_a_verification_set(folder: Path, mxnet: _Mxnet) -> str:
    path = folder / "set" / "verification.bin"
    theirs, ours = json.loads(mxnet("tests/interop/mxnet_side.py", "bin", str(path))), read_bin(path)
    assert theirs == {"images": [_sha256(i) for i in ours.images], "same": ours.same.tolist(), "kinds": ["bytes"]}
    return f"plain unpickling gives the {len(ours.same)} pairs that we read"


def we_read_what_mxnet_writes(folder: Path, mxnet: _Mxnet) -> str:
    mxnet("tests/interop/mxnet_side.py", "write", str(folder))
    payloads = [bytes.fromhex(text) for text in json.loads((folder / "payloads.json").read_text())]
    reader = RecordReader(folder / "mx.rec")
    index = read_index(folder / "mx.idx", reader)
    assert index.keys.tolist() == list(range(len(payloads)))
    assert [bytes(reader.read_at(offset)) for offset in index.offsets.tolist()] == payloads
    with RecordWriter(folder / "ours.rec") as writer:
        offsets = [writer.write(payload) for payload in payloads]
    assert offsets == index.offsets.tolist()
    assert (folder / "ours.rec").read_bytes() == bytes(reader.view)
    return f"{len(payloads)} random payloads of mxnet read, {_parts(reader)} in parts; our file of them is the same"


def mxnet_reads_our_parts(folder: Path, mxnet: _Mxnet) -> str:
    (folder / "ours.idx").write_bytes((folder / "mx.idx").read_bytes())
    return _compare_dump(folder / "ours.rec", "raw", mxnet)


def the_fixture_is_what_mxnet_writes(folder: Path, mxnet: _Mxnet) -> str:
    mxnet("tests/fixtures/mxnet/make_fixture.py", str(folder / "fixture"))
    made = sorted(path.relative_to(folder / "fixture") for path in (folder / "fixture").rglob("*") if path.is_file())
    kept = sorted(path.relative_to(FIXTURE) for path in FIXTURE.rglob("*") if path.is_file() and path.suffix != ".py")
    assert made == kept
    for path in made:
        assert (folder / "fixture" / path).read_bytes() == (FIXTURE / path).read_bytes(), path
    return f"{len(made)} files of the fixture come out the same again"


def main() -> int:
    def mxnet(*command: str) -> str:
        done = subprocess.run([sys.argv[1], *command], check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        return done.stdout

    failed = 0
    checks = (
        mxnet_reads_a_packed_set,
        mxnet_unpickles_a_verification_set,
        we_read_what_mxnet_writes,
        mxnet_reads_our_parts,
        the_fixture_is_what_mxnet_writes,
    )
    with tempfile.TemporaryDirectory() as folder:
        for check in checks:
            name = check.__name__.replace("_", " ")
            try:
                print(f"ok: {name}: {check(Path(folder), mxnet)}", flush=True)
            except (AssertionError, subprocess.CalledProcessError, ValueError, OSError) as error:
                failed += 1
                print(f"FAILED: {name}: {error}", flush=True)
    print(f"{len(checks) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
