"""What `ddray export` writes is the set again: pictures, parquet files, their cards and their whitening."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import ddray
from ddray.artifact import export, exported
from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.export import export_folder, export_parquet, export_set, folder_names, whitening_file
from ddray.artifact.foreign import ForeignRequest
from ddray.artifact.reading import dataset_of, load
from ddray.data import Dataset
from ddray.errors import InputError
from ddray.ranking.command import _read_proxies
from ddray.ranking.options import NasRequest
from tests.artifact.test_learned import LOGITS, learned_set

UNICODE = ("ねこ", "très grand chien", "a/b:c?")


def drawn(dataset: Dataset, planned: Any, **settings: Any) -> DistilledSet:
    _, ctx, method = planned("random", dataset, ipc=2, **settings)
    method.setup(ctx)
    distilled: DistilledSet = method.snapshot()
    return distilled


def readme(folder: Path) -> tuple[dict[str, Any], str]:
    """The card's metadata and its text."""
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


class TestParquet:
    @pytest.mark.parametrize("kind", [None, "logits", "probabilities", "values"])
    def test_it_is_the_set_again_with_what_it_has_learned(self, kind: Any, tmp_path: Path) -> None:
        soft = None if kind is None else LOGITS.softmax(1) if kind == "probabilities" else LOGITS
        distilled = learned_set(soft, label_kind=kind, learned_lr=0.02, seed=3)

        export_parquet(distilled, tmp_path / "set.parquet")
        again = load(tmp_path / "set.parquet")

        assert torch.equal(again.images, distilled.images)
        assert again.labels.tolist() == distilled.labels.tolist()
        assert again.meta == distilled.meta
        assert (f"| {kind}, in the column soft_label |" in readme(tmp_path)[1]) == (soft is not None)
        assert (again.soft_labels is None) if soft is None else torch.equal(again.soft_labels, soft)

    def test_steps_targets_and_partitions_come_back_as_networks_learn_them(self, tmp_path: Path) -> None:
        schedule = {"order": [[0, 1], [3]], "rates": [0.1, 0.2], "init": "random"}
        parts = {"decoder": "partition", "partition": {"factor": 2}, "ipc_decoded": 8}
        images, none = learned_set().images, torch.zeros(0, dtype=torch.int64)
        floats = images.numel() + 8
        sets = {
            "steps": learned_set(None, schedule=schedule),
            "parts": learned_set(None, **parts),
            "targets": DistilledSet(
                images, none, learned_set(None, storage_floats=floats).meta, targets=torch.randn(4, 2)
            ),
        }
        for name, distilled in sets.items():
            export_parquet(distilled, tmp_path / f"{name}.parquet")
            again, train = load(tmp_path / f"{name}.parquet"), distilled.decode()
            assert torch.equal(again.decode().images, train.images), name
            assert torch.equal(again.decode().supervision, train.supervision), name
            assert again.meta.schedule == distilled.meta.schedule
            assert again.meta.storage_floats == distilled.meta.storage_floats
            again.save(tmp_path / f"{name}.pt")
        assert len(load(tmp_path / "parts.pt").images) == 16

    def test_tensors_are_of_the_hubs_type_for_arrays(self, tmp_path: Path) -> None:
        """`datasets` stores Array3D as lists of lists of lists."""
        export_parquet(learned_set(None), tmp_path / "set.parquet")

        schema = pq.read_schema(tmp_path / "set.parquet")
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        assert features["tensor"] == {"shape": [3, 4, 4], "dtype": "float32", "_type": "Array3D"}
        assert schema.field("tensor").type == pa.list_(pa.list_(pa.list_(pa.float32())))

    def test_files_of_before_hold_flat_tensors(self, tmp_path: Path) -> None:
        distilled = learned_set(None)
        export_parquet(distilled, tmp_path / "set.parquet")
        table = pq.read_table(tmp_path / "set.parquet")
        flat = pa.FixedSizeListArray.from_arrays(pa.array(distilled.images.flatten().numpy()), 48)
        column = table.column_names.index("tensor")
        pq.write_table(table.set_column(column, "tensor", flat), tmp_path / "old.parquet")

        assert torch.equal(load(tmp_path / "old.parquet").images, distilled.images)

    def test_columns_that_do_not_fit_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "set.parquet"
        export_parquet(learned_set(None), path)
        table = pq.read_table(path)
        for name, values in (("tensor", [[1.0]] * len(table)), ("label", ["cat"] * len(table))):
            index = table.column_names.index(name)
            pq.write_table(table.set_column(index, name, pa.array(values)), tmp_path / "odd.parquet")
            with pytest.raises(InputError, match="must be an undamaged parquet file"):
                load(tmp_path / "odd.parquet")
        monkeypatch.setattr(exported, "available_bytes", lambda device: 1000)
        with pytest.raises(InputError, match="would unpack to"):
            load(path)

    def test_a_large_set_is_written_in_parts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(export, "_MOST_IN_LISTS", 100)
        distilled = learned_set(None)
        export_parquet(distilled, tmp_path / "set.parquet")
        assert torch.equal(load(tmp_path / "set.parquet").images, distilled.images)

    def test_other_parquet_files_are_refused(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"label": [1, 2]}), tmp_path / "real.parquet")
        with pytest.raises(InputError, match="must be a parquet file that ddray export wrote"):
            load(tmp_path / "real.parquet")
        pictures = pa.table({"img": [{"bytes": b"", "path": "a"}], "label": ["cat"]})
        pq.write_table(pictures, tmp_path / "pictures.parquet")
        with pytest.raises(InputError, match="must be a parquet file that ddray export wrote"):
            load(tmp_path / "pictures.parquet")
        (tmp_path / "torn.parquet").write_bytes(b"PAR1")
        with pytest.raises(InputError, match="must be an undamaged parquet file"):
            load(tmp_path / "torn.parquet")

    def test_a_card_that_is_there_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").write_text("mine")

        assert export_parquet(learned_set(None), tmp_path / "set.parquet") == tmp_path / "README-set.md"
        assert (tmp_path / "README.md").read_text() == "mine"


class TestFolder:
    def test_class_names_of_every_script_are_folders_that_are_read_again(
        self, toy: Any, planned: Any, tmp_path: Path
    ) -> None:
        dataset = replace(toy(), class_names=UNICODE)
        distilled = drawn(dataset, planned)

        export_folder(distilled, tmp_path / "out")

        assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir()) == [
            "0_ねこ",
            "1_très-grand-chien",
            "2_a-b-c",
        ]
        again = load(tmp_path / "out", ForeignRequest(dataset))
        assert again.labels.tolist() == sorted(distilled.labels.tolist())
        assert again.meta.method == "random"
        assert dataset_of(tmp_path / "out") == "toy"
        (tmp_path / "out" / "0_ねこ").rename(tmp_path / "out" / "0_")  # as releases before wrote it
        assert load(tmp_path / "out", ForeignRequest(dataset)).labels.tolist() == again.labels.tolist()

    def test_long_names_fit_the_file_system(self) -> None:
        assert max(len(name.encode()) for name in folder_names(("猫" * 300, "b" * 300))) < 255
        assert folder_names(("cat", "big dog_2")) == ["0_cat", "1_big-dog-2"]

    def test_labels_follow_the_names_if_the_dataset_counts_otherwise(
        self, toy: Any, planned: Any, tmp_path: Path
    ) -> None:
        distilled = drawn(replace(toy(), class_names=UNICODE), planned)
        export_folder(distilled, tmp_path / "out")

        again = load(tmp_path / "out", ForeignRequest(replace(toy(), class_names=UNICODE[::-1])))

        order = (2 - distilled.labels).argsort(stable=True)
        torch.testing.assert_close(again.images, distilled.images[order], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["out", "set.parquet", "set.PARQUET"])
def test_whitening_goes_along_and_is_read_instead_of_fitted(
    name: str, toy: Any, planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = toy()
    distilled = drawn(dataset, planned, pixel_space="zca")
    export_set(distilled, tmp_path / name)
    monkeypatch.setattr("ddray.artifact.foreign.pictures.pixel_space", None)  # nothing is fitted
    assert (tmp_path / name).is_dir() == (name == "out")

    again = load(tmp_path / name, ForeignRequest(dataset))

    order = distilled.labels.argsort(stable=True) if name == "out" else slice(None)
    assert torch.equal(again.zca["zca_matrix"], distilled.zca["zca_matrix"])
    pixels, expected = (one.space().decode(one.images) for one in (again, distilled))
    torch.testing.assert_close(pixels, expected[order], atol=1e-3, rtol=0)
    whitening_file(tmp_path / name).write_bytes(b"torn")
    with pytest.raises(InputError, match="export it again"):
        load(tmp_path / name, ForeignRequest(dataset))


@pytest.mark.parametrize("space", ["raw", "normalized", "zca"])
@pytest.mark.parametrize("name", ["out", "set.parquet", "set.PARQUET"])
def test_the_cards_code_gives_what_networks_are_trained_on(
    name: str, space: str, toy: Any, planned: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distilled = drawn(toy(), planned, pixel_space=space)
    card = export_set(distilled, tmp_path / "x" / name)
    assert card is not None
    front, text = readme(card.parent)
    monkeypatch.chdir(tmp_path / "x")

    reading, encoding = re.findall(r"```python\n(.*?)```", text, re.S)
    values: dict[str, Any] = {}
    exec(reading, values)
    is_table = name != "out"
    order = slice(None) if is_table else distilled.labels.argsort(stable=True)
    if not is_table:
        exec(encoding, values)
    torch.testing.assert_close(values["pixels"], distilled.images[order], atol=2e-2, rtol=0)
    assert values["labels"].tolist() == distilled.labels[order].tolist()
    assert front["configs"] == [{"config_name": "default", "data_files": name if is_table else "*/*.png"}]
    assert (front["size_categories"], front["pretty_name"]) == (["n<1K"], "random on toy, 2 images per class")
    assert f"$ ddray evaluate {name}\n" in text
    assert ("whitening" in encoding) == (space == "zca")


def test_nas_takes_both_as_proxies(toy: Any, planned: Any, tmp_path: Path) -> None:
    distilled, dataset = drawn(toy(), planned), toy()
    for name in ("out", "set.parquet"):
        export_set(distilled, tmp_path / name)
    request = NasRequest.parse({"proxies": [tmp_path / "out", tmp_path / "set.parquet"]})

    files, sets = _read_proxies(request, dataset)

    assert [file.path.name for file in files] == ["out", "set.parquet"]
    assert torch.equal(sets[1].images, distilled.images)
    torch.testing.assert_close(sets[0].images.sum(), distilled.images.sum(), atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "form", "message"),
    [
        ("set.zip", None, r"folder is a folder, whose name must not end as a file's, got set\.zip; use set "),
        ("set.tar.gz", "ddranking", r"got set\.tar\.gz; use set \(and pack that folder then\)"),
        ("set.parquet", "folder", r"got set\.parquet; use set \("),
        ("set.pq", "parquet", r"must end in \.parquet, got set\.pq"),
    ],
)
def test_names_that_would_mislead_are_refused(
    name: str, form: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        ddray.export(learned_set(None), tmp_path / name, form=form)
    assert not list(tmp_path.iterdir())
