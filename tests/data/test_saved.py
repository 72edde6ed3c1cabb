"""Folders as `datasets.save_to_disk` writes them: Arrow streams beside state.json and dataset_dict.json."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ddray.data import open_dataset
from ddray.errors import InputError
from tests.data.data_files import png, random_images

NAMES = ("cat", "ant", "bee")
IMAGES = random_images(12, (3, 16, 16))
LABELS = [0, 1, 2] * 4


def save(
    folder: Path,
    images: np.ndarray,
    labels: Sequence[object],
    *,
    names: Sequence[str] | None = NAMES,
    columns: tuple[str, ...] = ("image", "label"),
    num_shards: int = 1,
) -> None:
    """Write what `Dataset.save_to_disk` of datasets 5.2 writes."""
    label = {"names": names, "_type": "ClassLabel"} if names else {"dtype": "int64", "_type": "Value"}
    features = {columns[0]: {"_type": "Image"}, columns[1]: label}
    encoded = pa.array(
        [{"bytes": png(image), "path": None} for image in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({columns[0]: encoded, columns[1]: pa.array(labels)})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir(parents=True)
    files = [f"data-{shard:05}-of-{num_shards:05}.arrow" for shard in range(num_shards)]
    step = -(-len(images) // num_shards)
    for start, file in zip(range(0, len(images), step), files, strict=True):
        part = table.slice(start, step)
        with pa.ipc.new_stream(str(folder / file), part.schema) as writer:
            writer.write_table(part, max_chunksize=5)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": file} for file in files]}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def save_dict(root: Path, splits: Sequence[str]) -> None:
    (root / "dataset_dict.json").write_text(json.dumps({"splits": list(splits)}))


def test_a_dict_of_splits(tmp_path: Path) -> None:
    save(tmp_path / "train", IMAGES, LABELS, num_shards=2)
    save(tmp_path / "test", IMAGES[::-1], LABELS)
    save_dict(tmp_path, ["train", "test"])
    data = open_dataset(str(tmp_path))
    assert data.class_names == NAMES
    assert torch.equal(data.train().images, torch.from_numpy(IMAGES))
    assert data.train().labels.tolist() == LABELS
    assert torch.equal(data.test().images, torch.from_numpy(IMAGES[::-1].copy()))


def test_splits_that_order_their_names_differently_are_matched_by_name(tmp_path: Path) -> None:
    save(tmp_path / "train", IMAGES, LABELS)
    save(tmp_path / "test", IMAGES, [(2 - label) % 3 for label in LABELS], names=NAMES[::-1])
    save_dict(tmp_path, ["train", "test"])
    assert open_dataset(str(tmp_path)).test().labels.tolist() == LABELS


def test_one_dataset_gives_a_fifth_to_test(tmp_path: Path) -> None:
    save(tmp_path / "d", IMAGES, LABELS)
    data = open_dataset(str(tmp_path / "d"))
    assert torch.bincount(data.train().labels).tolist() == [3, 3, 3]
    assert torch.bincount(data.test().labels).tolist() == [1, 1, 1]


def test_an_unlabelled_test_split_gives_way_to_validation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path / "train", IMAGES, LABELS)
    save(tmp_path / "validation", IMAGES[:6], LABELS[:6])
    save(tmp_path / "test", IMAGES, [-1] * 12)
    save_dict(tmp_path, ["train", "validation", "test"])
    data = open_dataset(str(tmp_path))
    assert len(data.test()) == 6
    assert caplog.messages == [
        f"{tmp_path}: left out 1 shards of test without labels: test/data-00000-of-00001.arrow"
    ]


def test_a_label_column_and_labels_without_names(tmp_path: Path) -> None:
    save(tmp_path / "d", IMAGES, LABELS, names=None, columns=("img", "kind"))
    with pytest.raises(InputError, match=r"label column named .* got img, kind in .*; --label-column"):
        open_dataset(str(tmp_path / "d"))
    data = open_dataset(str(tmp_path / "d"), label_column="kind")
    assert data.class_names == ("0", "1", "2")


def test_other_splits_and_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for split in ("train", "test", "extra"):
        save(tmp_path / split, IMAGES, LABELS)
    save_dict(tmp_path, ["train", "test", "extra"])
    (tmp_path / "train" / "cache-1a2b.arrow").touch()
    open_dataset(str(tmp_path))
    assert caplog.messages == [
        f"{tmp_path}: left out 1 folders that are neither train nor test: extra (3 files)",
        f"{tmp_path}: left out 1 shards that aren't read: train/cache-1a2b.arrow",
    ]


@pytest.mark.parametrize("name", ["/etc/passwd", "../x.arrow", "a/x.arrow"])
def test_files_elsewhere_are_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path / "d", IMAGES, LABELS)
    (tmp_path / "d" / "state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(InputError, match="_data_files must name what is in its folder, got"):
        open_dataset(str(tmp_path / "d"))
    (tmp_path / "d" / "state.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match="_data_files must be readable"):
        open_dataset(str(tmp_path / "d"))


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "train", IMAGES, LABELS)
    save_dict(tmp_path, ["train", "test"])
    with pytest.raises(InputError, match=r"_data_files must be readable, got .*test/state\.json: "):
        open_dataset(str(tmp_path))
    save_dict(tmp_path, ["train"])
    file = tmp_path / "train" / "data-00000-of-00001.arrow"
    file.write_bytes(b"ARROW nothing")
    with pytest.raises(InputError, match=r"must be readable, got .*data-00000-of-00001\.arrow: "):
        open_dataset(str(tmp_path))
