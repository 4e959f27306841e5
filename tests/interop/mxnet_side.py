"""mxnet's side of the comparison; runs in .venv-interop, without any code of ours.

mxnet_side.py dump REC IDX images|raw > JSON: every record as mxnet reads it, by key and in file order.
mxnet_side.py write FOLDER: records of random payloads, many with the magic in them, and payloads.json.
mxnet_side.py bin FILE > JSON: a verification set as its users' plain unpickling reads it.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import struct
import sys
from pathlib import Path

import mxnet
from mxnet.recordio import MXIndexedRecordIO, MXRecordIO, unpack

PIECES = [struct.pack("<I", 0xCED7230A), b"\n#\xd7", b"a", b"\0\0", b"wxyz"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def dump(rec: str, idx: str, kind: str) -> dict[str, object]:
    reader, rows = MXIndexedRecordIO(idx, rec, "r"), {}
    for key in reader.keys:
        payload = reader.read_idx(key)
        row = {"payload": sha256(payload)}
        if kind == "images":
            header, image = unpack(payload)
            labels = header.label.tolist() if header.flag else [header.label]
            row.update(flag=header.flag, labels=labels, id=header.id, id2=header.id2, image=sha256(image))
        rows[key] = row
    sequential, in_order = MXRecordIO(rec, "r"), []
    while (payload := sequential.read()) is not None:
        in_order.append(sha256(payload))
    return {"mxnet": mxnet.__version__, "by_key": rows, "in_order": in_order}


def write(folder: Path) -> None:
    rng = random.Random(1)
    writer, payloads = MXIndexedRecordIO(str(folder / "mx.idx"), str(folder / "mx.rec"), "w"), []
    for key in range(500):
        payload = b"".join(rng.choice(PIECES) for _ in range(rng.randrange(12)))
        payloads.append(payload.hex())
        writer.write_idx(key, payload)
    writer.close()
    (folder / "payloads.json").write_text(json.dumps(payloads))


def read_bin(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        images, same = pickle.load(file, encoding="bytes")
    return {
        "images": [sha256(image) for image in images],
        "same": same,
        "kinds": sorted({type(i).__name__ for i in images}),
    }


if __name__ == "__main__":
    if sys.argv[1] == "dump":
        print(json.dumps(dump(*sys.argv[2:])))
    elif sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        print(json.dumps(read_bin(Path(sys.argv[2]))))
