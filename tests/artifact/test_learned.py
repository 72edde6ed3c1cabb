"""What methods learn beside images: soft labels of three kinds, a learning rate, a schedule."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet, Meta
from ddray.artifact.export import export_ddranking, export_folder, export_parquet
from ddray.artifact.foreign import ForeignRequest
from ddray.artifact.reading import load
from ddray.artifact.schedule import Schedule
from ddray.distillation.method import SetExtras
from ddray.errors import InputError

STORED = Path(__file__).resolve().parents[1] / "stored" / "distilled.pt"
LOGITS = torch.tensor([[3.0, -1.0], [0.5, 2.0], [-2.0, -4.0], [0.0, 7.0]])
PARTS = {"decoder": "partition", "partition": {"factor": 2}, "ipc": 2, "ipc_decoded": 8}
SCHEDULE = {"order": [[0, 1], [3]], "rates": [0.1, 0.2]}


def learned_set(soft: Tensor | None = LOGITS, **changes: Any) -> DistilledSet:
    labels = torch.tensor([0, 1, 0, 1])
    values: dict[str, Any] = {
        "dataset": "toy",
        "fingerprint": "f" * 64,
        "class_names": ("cat", "dog"),
        "ipc": 2,
        "ipc_decoded": 2,
        "storage_floats": 4 * 3 * 4 * 4 + (0 if soft is None else soft.numel()),
        "pixel_space": "normalized",
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.25, 0.3),
        "image_shape": (3, 4, 4),
        "method": "datm",
        "arch": "convnet1",
        "norm": "instance",
    }
    images = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return DistilledSet(images, labels, Meta.parse({**values, **changes}), soft_labels=soft)


class TestFile:
    @pytest.mark.parametrize("kind", ["logits", "probabilities", "values"])
    def test_all_of_it_is_read_again(self, kind: str, tmp_path: Path) -> None:
        soft = LOGITS.softmax(1) if kind == "probabilities" else LOGITS
        distilled = learned_set(soft, label_kind=kind, learned_lr=0.0213, schedule=SCHEDULE)

        distilled.save(tmp_path / "a.pt")

        again = load(tmp_path / "a.pt")
        assert again.meta == distilled.meta
        assert torch.equal(again.soft_labels, soft)
        assert again.labels.tolist() == [0, 1, 0, 1]
        contents = torch.load(tmp_path / "a.pt", weights_only=True)
        assert contents.keys() == {"format_version", "images", "soft_labels", "meta"}
        assert contents["format_version"] == 2
        meta = json.loads(contents["meta"])
        assert (meta["label_kind"], meta["learned_lr"]) == (kind, 0.0213)
        assert meta["schedule"] == {**SCHEDULE, "init": "random", "init_seed": None}

    def test_files_without_it_stay_byte_for_byte(self, tmp_path: Path) -> None:
        load(STORED).save(tmp_path / "again.pt")

        assert (tmp_path / "again.pt").read_bytes() == STORED.read_bytes()
        learned_set(LOGITS.softmax(1)).save(tmp_path / "soft.pt")
        contents = torch.load(tmp_path / "soft.pt", weights_only=True)
        assert contents["format_version"] == 1
        assert json.loads(contents["meta"]).keys().isdisjoint({"label_kind", "learned_lr", "schedule"})

    @pytest.mark.parametrize(
        ("soft", "changes", "message"),
        [
            (None, {"label_kind": "logits"}, "label_kind logits must go with soft_labels, this set has none"),
            (LOGITS, {"label_kind": "probabilities"}, "soft_labels must be probabilities that sum to 1"),
            (-LOGITS, {"label_kind": "logits"}, "labels must be the largest of every row of soft_labels"),
            (LOGITS * torch.nan, {"label_kind": "values"}, "images must be finite"),
            (
                None,
                {"schedule": {"order": [[4]], "rates": [1.0]}},
                r"schedule\.order must name rows 0\.\.3 of the images, got 4",
            ),
            (None, {**PARTS, "schedule": SCHEDULE}, "decoder must be null with a schedule .* got partition"),
        ],
    )
    def test_what_does_not_go_together_is_refused(
        self, soft: Tensor | None, changes: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        with pytest.raises(InputError, match=message):
            learned_set(soft, **changes).save(tmp_path / "a.pt")

    @pytest.mark.parametrize("rate", [0.0, -0.1, float("nan")])
    def test_a_learned_rate_is_above_zero(self, rate: float) -> None:
        with pytest.raises(InputError, match="learned_lr: "):
            learned_set(learned_lr=rate)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"order": [[0], [1]], "rates": [0.1]}, "rates must be one per step of order, 2 in all, got 1"),
            ({"order": [], "rates": []}, "schedule.order: "),
            ({"order": [[]], "rates": [0.1]}, "schedule.order.0: "),
            ({"order": [[-1]], "rates": [0.1]}, "schedule.order.0.0: "),
            ({"order": [[0]], "rates": [0.0]}, "schedule.rates.0: "),
            ({"order": [[0]], "rates": [0.1], "init": "fixed"}, "init_seed must go with init fixed only"),
            ({"order": [[0]], "rates": [0.1], "init_seed": 3}, "init_seed must go with init fixed only"),
        ],
    )
    def test_a_schedule_has_a_rate_per_step(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            Schedule.parse(values, prefix="schedule.")


class TestTraining:
    def test_networks_learn_the_softmax_of_logits(self) -> None:
        train = learned_set(label_kind="logits").decode()

        assert torch.equal(train.supervision, LOGITS.softmax(1))
        assert torch.equal(train.classes, LOGITS.softmax(1))
        assert not train.regress

    def test_values_are_learned_as_they_are_and_cross_entropy_takes_their_classes(self) -> None:
        train = learned_set(label_kind="values").decode()

        assert torch.equal(train.supervision, LOGITS)
        assert train.classes.tolist() == [0, 1, 0, 1]
        assert train.select(torch.tensor([2, 3])).regress
        assert torch.equal(train.select(torch.tensor([2, 3])).supervision, LOGITS[2:])

    @pytest.mark.parametrize(("kind", "regress"), [("logits", False), ("values", True)])
    def test_every_part_of_an_image_has_its_labels(self, kind: str, regress: bool) -> None:
        distilled = learned_set(label_kind=kind, **PARTS)

        distilled.validate()

        train = distilled.decode()
        whole = LOGITS if regress else LOGITS.softmax(1)
        assert torch.equal(train.supervision, whole.repeat_interleave(4, 0))
        assert train.regress == regress


class TestMethods:
    def test_soft_labels_take_the_place_of_classes_and_count_as_storage(self, planned: Any, toy: Any) -> None:
        _, ctx, _ = planned("random", toy(), ipc=2)
        images, classes = torch.randn(6, 3, 16, 16), torch.arange(3).repeat_interleave(2)
        soft = torch.randn(6, 3, requires_grad=True)
        schedule = Schedule(order=((5,), (0, 1)), rates=(0.1, 0.2), init="fixed", init_seed=3)
        extras = SetExtras(soft, "logits", 0.5, schedule)

        distilled = ctx.make_set(images, classes, extras=extras)

        distilled.validate()
        assert torch.equal(distilled.soft_labels, soft.detach())
        assert not distilled.soft_labels.requires_grad
        assert distilled.labels.tolist() == soft.argmax(1).tolist()
        assert distilled.meta.storage_floats == images.numel() + 18
        meta = distilled.meta
        assert (meta.label_kind, meta.learned_lr, meta.schedule) == ("logits", 0.5, schedule)

    def test_without_extras_a_set_is_as_before(self, planned: Any, toy: Any) -> None:
        _, ctx, _ = planned("random", toy(), ipc=2)
        images, classes = torch.randn(6, 3, 16, 16), torch.arange(3).repeat_interleave(2)

        distilled = ctx.make_set(images, classes)

        assert distilled.labels.tolist() == classes.tolist()
        assert distilled.soft_labels is None
        assert distilled.meta.format_version == 1


class TestExport:
    def test_ddranking_gets_logits_and_the_learned_rate(self, tmp_path: Path) -> None:
        distilled = learned_set(label_kind="logits", learned_lr=0.02, config={"evaluate": {"lr": "learned"}})

        export_ddranking(distilled, tmp_path / "out")

        tensors = {file.stem: torch.load(file, weights_only=True) for file in (tmp_path / "out").iterdir()}
        order = torch.tensor([0, 2, 1, 3])
        assert torch.equal(tensors["labels"], LOGITS[order])
        assert torch.equal(tensors["images"], distilled.images[order])
        assert float(tensors["lr"]) == pytest.approx(0.02)

    def test_ddranking_gets_logits_of_every_part(self, tmp_path: Path) -> None:
        distilled = learned_set(label_kind="logits", **PARTS)

        export_ddranking(distilled, tmp_path / "out")

        labels = torch.load(tmp_path / "out" / "labels.pt", weights_only=True)
        assert torch.equal(labels, LOGITS[[0, 2, 1, 3]].repeat_interleave(4, 0))

    def test_ddranking_gets_the_classes_of_values(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        export_ddranking(learned_set(label_kind="values"), tmp_path / "out")

        assert torch.load(tmp_path / "out" / "labels.pt", weights_only=True).tolist() == [0, 0, 1, 1]
        assert "has no regression" in caplog.text

    def test_ddranking_has_no_steps(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        schedule = Schedule(order=((0, 1), (2, 3)), rates=(0.1, 0.2), init="random")

        export_ddranking(learned_set(None, schedule=schedule), tmp_path / "out")

        assert "gets neither their order nor their rates" in caplog.text

    def test_a_parquet_file_has_the_labels_as_stored_and_their_kind(self, tmp_path: Path) -> None:
        import pyarrow.parquet as pq

        export_parquet(learned_set(label_kind="logits", learned_lr=0.02), tmp_path / "train.parquet")

        table = pq.read_table(tmp_path / "train.parquet")
        assert table["soft_label"].to_pylist() == LOGITS.tolist()
        meta = json.loads(table.schema.metadata[b"ddray"])
        assert (meta["label_kind"], meta["learned_lr"]) == ("logits", 0.02)

    def test_pictures_keep_the_learned_rate_alone(
        self, toy: Any, planned: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        _, ctx, _ = planned("random", toy(), ipc=2)
        extras = SetExtras(torch.eye(3).repeat_interleave(2, 0), "values", 0.5, Schedule.parse(SCHEDULE))
        distilled = ctx.make_set(torch.randn(6, 3, 16, 16), torch.zeros(6), extras=extras)
        with caplog.at_level(logging.WARNING):
            export_folder(distilled, tmp_path / "out")

        again = load(tmp_path / "out", ForeignRequest(toy()))

        assert (again.meta.learned_lr, again.meta.label_kind, again.meta.schedule) == (0.5, None, None)
        assert "pictures have no soft labels" in caplog.text
        assert "pictures have no order" in caplog.text
        again.save(tmp_path / "again.pt")
        assert load(tmp_path / "again.pt").soft_labels is None


def test_a_file_of_a_later_version_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    learned_set(label_kind="logits").save(tmp_path / "a.pt")
    contents = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**contents, "format_version": 4}, buffer)
    (tmp_path / "b.pt").write_bytes(buffer.getvalue())

    with pytest.raises(InputError, match="format_version must be 1, 2, 3, got 4; update ddray"):
        load(tmp_path / "b.pt")
