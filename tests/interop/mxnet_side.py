"""mxnet's side of the comparison; runs in .venv-interop, without any code of ours.

mxnet_side.py dump REC IDX images|raw > JSON: every record as mxnet reads it, by key and in file order.
mxnet_side.py write FOLDER: records of random payloads, many with the magic in them, and payloads.json.
mxnet_side.py bin FILE > JSON: a verification set as its users' plain unpickling reads it.
mxnet_side.py identities REC IDX > JSON: the images that key 0 and the identity headers lead to.
mxnet_side.py iterate REC IDX WIDTH NPZ > JSON: labels, WIDTH each, and pixels as mxnet's data set and iterators give
them; the names of these.
mxnet_side.py im2rec PREFIX FOLDER [OPTION …] > JSON: mxnet's own im2rec.py, first for the list, then for the records.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import struct
import subprocess
import sys
from pathlib import Path

import mxnet
import numpy as np
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


def read_bin(path: str) -> dict[str, object]:
    with Path(path).open("rb") as file:
        images, same = pickle.load(file, encoding="bytes")
    return {
        "images": [sha256(image) for image in images],
        "same": same,
        "kinds": sorted({type(i).__name__ for i in images}),
    }


def identities(rec: str, idx: str) -> dict[str, object]:
    reader = MXIndexedRecordIO(idx, rec, "r")
    begin, end = (int(key) for key in unpack(reader.read_idx(0))[0].label)
    found = [unpack(reader.read_idx(key)) for key in range(1, begin)]
    images = [(np.atleast_1d(header.label).tolist(), sha256(image)) for header, image in found]
    ranges = [[int(key) for key in unpack(reader.read_idx(key))[0].label] for key in range(begin, end)]
    return {"images": images, "ranges": ranges}


def iterate(rec: str, idx: str, width: str, npz: str) -> list[str]:
    shape, labels = (3, 112, 112), {"label_width": int(width)}
    iterators = {
        "ImageIter": mxnet.image.ImageIter(1, shape, path_imgrec=rec, **labels),
        "ImageIter with the index": mxnet.image.ImageIter(1, shape, path_imgrec=rec, path_imgidx=idx, **labels),
        "ImageRecordIter": mxnet.io.ImageRecordIter(
            path_imgrec=rec,
            data_shape=shape,
            batch_size=1,
            round_batch=False,
            preprocess_threads=1,
            verbose=False,
            **labels,
        ),
    }
    batches = {
        name: [(batch.label[0].asnumpy()[0], batch.data[0].asnumpy()[0].transpose(1, 2, 0)) for batch in iterator]
        for name, iterator in iterators.items()
    }
    kept = mxnet.gluon.data.vision.ImageRecordDataset(rec)
    batches["ImageRecordDataset"] = [(kept[n][1], kept[n][0].asnumpy()) for n in range(len(kept))]
    arrays = {}
    for name, rows in batches.items():
        arrays[f"{name} labels"] = np.array([label for label, _ in rows])
        arrays[f"{name} pixels"] = np.stack([pixels for _, pixels in rows])
    np.savez(npz, **arrays)
    return sorted(batches)


def im2rec(prefix: str, folder: str, *more: str) -> None:
    program = Path(mxnet.__file__).parent / "tools" / "im2rec.py"
    for options in (["--list", "--recursive"], more):
        subprocess.run([sys.executable, program, prefix, folder, *options], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    if sys.argv[1] == "write":
        write(Path(sys.argv[2]))
    else:
        commands = {"dump": dump, "bin": read_bin, "identities": identities, "iterate": iterate, "im2rec": im2rec}
        print(json.dumps(commands[sys.argv[1]](*sys.argv[2:])))
