"""Small datasets on disk, written by hand in the layouts of their publishers."""

from __future__ import annotations

import io
import json
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image


def random_images(num: int, shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """uint8 [num, C, H, W]"""
    return np.random.default_rng(seed).integers(0, 256, (num, *shape), dtype=np.uint8)


def as_pil(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    as_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def write_png(path: Path, image: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(image))


def write_parquet(
    path: Path,
    images: Sequence[np.ndarray] | np.ndarray,
    labels: Sequence[object],
    *,
    names: Sequence[str] | None = None,
    columns: tuple[str, str] = ("img", "label"),
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = pa.array(
        [{"bytes": png(image), "path": None} for image in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({columns[0]: encoded, columns[1]: pa.array(labels)})
    if names is not None:
        features = {columns[0]: {"_type": "Image"}, columns[1]: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)


def write_idx(root: Path, name: str, part: str, images: np.ndarray, labels: Sequence[int]) -> None:
    raw = root / name / "raw"
    raw.mkdir(parents=True, exist_ok=True)
    num, _, height, width = images.shape
    (raw / f"{part}-images-idx3-ubyte").write_bytes(
        struct.pack(">IIII", 2051, num, height, width) + images.tobytes()
    )
    (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, num) + bytes(labels))


def write_cifar(root: Path, *, fine: bool, per_batch: int = 10) -> dict[str, tuple[np.ndarray, list[int]]]:
    """CIFAR's python batches; returns {"train": (images, labels), "test": ...}"""
    folder = root / ("cifar-100-python" if fine else "cifar-10-batches-py")
    folder.mkdir(parents=True)
    classes = 100 if fine else 10
    key = "fine_labels" if fine else "labels"
    train_names = ["train"] if fine else [f"data_batch_{i}" for i in range(1, 6)]
    written: dict[str, tuple[list[np.ndarray], list[int]]] = {"train": ([], []), "test": ([], [])}
    for batch_index, name in enumerate([*train_names, "test" if fine else "test_batch"]):
        num = 100 if fine else per_batch
        images = random_images(num, (3, 32, 32), seed=batch_index)
        labels = [i % classes for i in range(num)]
        (folder / name).write_bytes(pickle.dumps({"data": images.reshape(num, -1), key: labels}, protocol=2))
        half = written["train" if name in train_names else "test"]
        half[0].append(images)
        half[1].extend(labels)
    meta = {"fine_label_names" if fine else "label_names": [f"c{i:02}" for i in range(classes)]}
    (folder / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps(meta, protocol=2))
    return {half: (np.concatenate(images), labels) for half, (images, labels) in written.items()}


def write_wav(path: Path, samples: np.ndarray, rate: int) -> None:
    from scipy.io import wavfile

    path.parent.mkdir(parents=True, exist_ok=True)
    wavfile.write(path, rate, samples)
