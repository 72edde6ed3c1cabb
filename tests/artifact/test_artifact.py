from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet, Meta, save_result
from ddray.artifact.foreign import ForeignRequest
from ddray.artifact.partition import Partition, expand
from ddray.artifact.reading import has_whitening, load
from ddray.data import PixelSpace
from ddray.errors import InputError
from ddray.system.tensors import numpy_scalars


def meta(**changes: Any) -> Meta:
    values: dict[str, Any] = {
        "dataset": "toy",
        "fingerprint": "f" * 64,
        "class_names": ("cat", "dög"),
        "ipc": 2,
        "ipc_decoded": 2,
        "storage_floats": 4 * 3 * 4 * 5,
        "pixel_space": "normalized",
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.25, 0.3),
        "image_shape": (3, 4, 5),
        "method": "dm",
        "config": {"steps": 3, "method": {"lr_img": 1e-05, "layers": [1, 2], "init": None}},
        "seed": 7,
        "arch": "convnet1",
        "norm": "instance",
        "versions": {"torch": "2"},
        "git_commit": None,
    }
    return Meta.parse({**values, **changes})


def images(num: int = 4, shape: tuple[int, ...] = (3, 4, 5)) -> Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(0))


def distilled_set(**changes: Any) -> DistilledSet:
    fields: dict[str, Any] = {"images": images(), "labels": torch.tensor([0, 0, 1, 1]), "meta": meta()}
    return DistilledSet(**{**fields, **changes})


def whitening(width: int = 60) -> dict[str, Tensor]:
    return {"zca_mean": torch.rand(width), "zca_matrix": torch.eye(width) * 2}


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "distilled.pt"
    distilled_set().save(path)

    loaded = load(path)

    assert torch.equal(loaded.images, images())
    assert loaded.labels.tolist() == [0, 0, 1, 1]
    assert loaded.labels.dtype == torch.int64
    assert loaded.meta == meta()
    assert loaded.zca == {}
    assert loaded.space().std == (0.2, 0.25, 0.3)
    assert torch.equal(loaded.decode().images, images())
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".tmp"] == []


def test_saving_twice_gives_the_same_bytes_wherever_it_lies(tmp_path: Path) -> None:
    distilled_set().save(tmp_path / "a.pt")
    load(tmp_path / "a.pt").save(tmp_path / "longer name.pt")

    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "longer name.pt").read_bytes()


def test_the_file_holds_tensors_and_one_json_string(tmp_path: Path) -> None:
    distilled_set().save(tmp_path / "a.pt")

    contents = torch.load(tmp_path / "a.pt", weights_only=True)

    assert set(contents) == {"format_version", "images", "labels", "meta"}
    assert contents["format_version"] == 1
    assert json.loads(contents["meta"])["class_names"] == ["cat", "dög"]


def test_a_view_is_stored_without_the_tensor_behind_it(tmp_path: Path) -> None:
    whole = torch.randn(4000, 3, 4, 5)
    distilled_set(images=whole[:4]).save(tmp_path / "a.pt")

    loaded = load(tmp_path / "a.pt")
    assert torch.equal(loaded.images, whole[:4])
    assert (tmp_path / "a.pt").stat().st_size < 10_000


def test_a_whitened_set_keeps_its_whitening(tmp_path: Path) -> None:
    zca = whitening()
    distilled_set(meta=meta(pixel_space="zca"), zca=zca).save(tmp_path / "a.pt")

    loaded = load(tmp_path / "a.pt")

    assert loaded.zca.keys() == zca.keys()
    assert all(torch.equal(loaded.zca[name], zca[name]) for name in zca)
    pixels = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(loaded.space().decode(loaded.space().encode(pixels)), pixels)


def test_the_sets_of_a_run_share_one_whitening(tmp_path: Path) -> None:
    one = distilled_set(meta=meta(pixel_space="zca"), zca=whitening())
    paths = [tmp_path / "a.pt", tmp_path / "artifacts" / "b.pt", tmp_path / "artifacts" / "c-steps" / "d.pt"]
    for path in paths:
        one.save(path, shared=tmp_path)
    one.save(tmp_path / "whole.pt")

    loaded = [load(path) for path in paths]

    assert len(list(tmp_path.rglob("whitening-*.pt"))) == 1
    for path, each in zip(paths, loaded, strict=True):
        assert path.stat().st_size < one.made_of()["whitening"] < (tmp_path / "whole.pt").stat().st_size
        assert all(torch.equal(each.zca[name], tensor) for name, tensor in one.zca.items())
        each.save(tmp_path / "again.pt")
        assert (tmp_path / "again.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()


def test_a_set_without_its_runs_whitening_says_which_file_it_needs(tmp_path: Path) -> None:
    distilled_set(meta=meta(pixel_space="zca"), zca=whitening()).save(
        tmp_path / "run/a.pt", shared=tmp_path / "run"
    )
    (file,) = (tmp_path / "run").glob("whitening-*.pt")
    copied = tmp_path / "elsewhere" / "a.pt"
    copied.parent.mkdir()
    copied.write_bytes((tmp_path / "run/a.pt").read_bytes())

    with pytest.raises(InputError, match=rf"must have its whitening beside it.* copy {file.name} too"):
        load(copied)
    torch.save({name: tensor + 1 for name, tensor in whitening().items()}, copied.parent / file.name)
    with pytest.raises(InputError, match="must have its whitening beside it"):
        load(copied)  # it is another one


def test_a_runs_result_holds_the_whitening_of_the_sets_beside_it(tmp_path: Path) -> None:
    one = distilled_set(meta=meta(pixel_space="zca"), zca=whitening())
    one.save(tmp_path / "artifacts" / "a.pt", shared=tmp_path)

    save_result(one, tmp_path / "distilled.pt")

    assert not list(tmp_path.rglob("whitening-*.pt"))
    loaded = load(tmp_path / "artifacts" / "a.pt")
    assert all(torch.equal(loaded.zca[name], tensor) for name, tensor in one.zca.items())
    other = {name: tensor + 1 for name, tensor in whitening().items()}
    distilled_set(meta=meta(pixel_space="zca"), zca=other).save(tmp_path / "distilled.pt")
    with pytest.raises(InputError, match="must have its whitening beside it"):
        load(tmp_path / "artifacts" / "a.pt")


def test_another_result_leaves_the_sets_beside_it_their_whitening(tmp_path: Path) -> None:
    first, second = (
        distilled_set(
            meta=meta(pixel_space="zca"), zca={name: one + add for name, one in whitening().items()}
        )
        for add in (0, 1)
    )
    first.save(tmp_path / "artifacts" / "a.pt", shared=tmp_path)
    for result in (first, second):
        save_result(result, tmp_path / "distilled.pt")

        again = load(tmp_path / "artifacts" / "a.pt")

        assert all(torch.equal(again.zca[name], tensor) for name, tensor in first.zca.items())


@pytest.mark.parametrize("damage", ["missing", "torn", "another"])
def test_a_damaged_whitening_of_a_run_is_noticed_and_written_again(tmp_path: Path, damage: str) -> None:
    one, path = distilled_set(meta=meta(pixel_space="zca"), zca=whitening()), tmp_path / "a.pt"
    one.save(path, shared=tmp_path)
    (file,) = tmp_path.glob("whitening-*.pt")
    assert has_whitening(path)
    if damage == "missing":
        file.unlink()
    elif damage == "torn":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        torch.save({name: tensor + 1 for name, tensor in whitening().items()}, file)
    assert not has_whitening(path)
    one.save(tmp_path / "b.pt", shared=tmp_path)
    assert has_whitening(path)


def test_a_set_tells_what_its_file_is_made_of(tmp_path: Path) -> None:
    one = distilled_set(meta=meta(pixel_space="zca"), zca=whitening())
    one.save(tmp_path / "a.pt")

    assert one.made_of() == {"images": 4 * 60 * 4, "labels": 4 * 8, "whitening": (60 + 60 * 60) * 4}
    assert 0 < (tmp_path / "a.pt").stat().st_size - sum(one.made_of().values()) < 5000


HALVES = {"decoder": "partition", "partition": {"factor": 2, "axes": "time"}, "ipc_decoded": 4}


@pytest.mark.parametrize(("factor", "axes", "parts"), [(2, "both", 4), (3, "both", 9), (3, "time", 3)])
def test_a_partitioned_set_is_stored_small_and_decoded_large(
    factor: int, axes: str, parts: int, tmp_path: Path
) -> None:
    changes = {
        "decoder": "partition",
        "partition": {"factor": factor, "axes": axes},
        "ipc_decoded": 2 * parts,
    }
    distilled_set(meta=meta(**changes)).save(tmp_path / "a.pt")

    loaded = load(tmp_path / "a.pt")

    assert (loaded.meta.ipc, loaded.meta.ipc_decoded, loaded.meta.storage_floats) == (2, 2 * parts, 240)
    assert torch.equal(loaded.images, images())
    decoded = loaded.decode()
    assert decoded.images.shape == (4 * parts, 3, 4, 5)
    assert torch.equal(decoded.images, expand(images(), Partition.parse(changes["partition"])))
    assert decoded.labels.tolist() == [0] * (2 * parts) + [1] * (2 * parts)
    assert torch.equal(loaded.decode().images, decoded.images)


def test_a_file_from_before_decoders_is_read(tmp_path: Path) -> None:
    old = {key: value for key, value in meta().dump().items() if key not in ("decoder", "partition")}

    loaded = load(ddray_file(tmp_path / "old.pt", meta=json.dumps(old)))

    assert loaded.meta == meta()
    assert torch.equal(loaded.decode().images, images())


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "double": ({"images": images().double()}, r"images must be float32 \[N, C, H, W\], got torch\.float64"),
    "flat": ({"images": images().flatten(1)}, r"images must be float32 \[N, C, H, W\]"),
    "none": ({"images": images(0), "labels": torch.zeros(0).long()}, r"got torch\.float32 \[0, 3, 4, 5\]"),
    "shape": ({"images": images(4, (3, 5, 4))}, r"image_shape \(3, 4, 5\), got \(3, 5, 4\)"),
    "nan": ({"images": images().index_fill(0, torch.tensor(1), torch.nan)}, "images must be finite"),
    "infinite": ({"images": images().index_fill(0, torch.tensor(1), torch.inf)}, "images must be finite"),
    "labels dtype": ({"labels": torch.tensor([0, 0, 1, 1]).int()}, r"labels must be int64 \[4\]"),
    "labels count": (
        {"labels": torch.tensor([0, 1, 1])},
        r"labels must be int64 \[4\], got torch\.int64 \[3\]",
    ),
    "label high": ({"labels": torch.tensor([0, 0, 1, 2])}, r"labels must be in 0\.\.1, got 0\.\.2"),
    "label low": ({"labels": torch.tensor([-1, 0, 1, 1])}, r"labels must be in 0\.\.1, got -1\.\.1"),
    "mean": ({"meta": meta(mean=(0.5,))}, "mean and std must hold 3 values"),
    "std": ({"meta": meta(std=(0.2, 0.0, 0.1))}, "mean and std must hold 3 values, std > 0"),
    "zca missing": ({"meta": meta(pixel_space="zca")}, "a set in pixel space zca must hold"),
    "zca too much": ({"zca": whitening()}, "pixel space normalized must hold no ZCA"),
    "zca shape": (
        {"meta": meta(pixel_space="zca"), "zca": whitening(59)},
        "a set in pixel space zca must hold",
    ),
    "zca nan": (
        {"meta": meta(pixel_space="zca"), "zca": {**whitening(), "zca_mean": torch.full((60,), torch.nan)}},
        "zca_mean must be finite float32",
    ),
    "decoder alone": (
        {"meta": meta(decoder="partition")},
        "decoder partition and partition None must both be given, or none",
    ),
    "partition alone": (
        {"meta": meta(**{**HALVES, "decoder": None})},
        "decoder None and partition .* must both be given, or none",
    ),
    "decoded count": (
        {"meta": meta(**{**HALVES, "ipc_decoded": 3})},
        "ipc_decoded must be 2 x 2 parts, got 3",
    ),
    "storage": ({"meta": meta(**HALVES, storage_floats=480)}, "storage_floats must be 240, got 480"),
    "too many parts": (
        {
            "images": images(4, (3, 2, 5)),
            "meta": meta(
                image_shape=(3, 2, 5),
                storage_floats=120,
                decoder="partition",
                partition={"factor": 3},
                ipc_decoded=18,
            ),
        },
        "factor must be at most the image's side of 2 px, got 3",
    ),
    "zca double": (
        {"meta": meta(pixel_space="zca"), "zca": {**whitening(), "zca_matrix": torch.eye(60).double()}},
        "zca_matrix must be finite float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_refused_on_save_and_on_load(
    rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, message = BROKEN[rule]
    path = tmp_path / "bad.pt"
    with pytest.raises(InputError, match=message):
        distilled_set(**changes).save(path)
    assert not path.exists()

    with monkeypatch.context() as patch:
        patch.setattr(DistilledSet, "validate", lambda self: None)
        distilled_set(**changes).save(path)
    with pytest.raises(InputError, match=r"bad\.pt: .*" + message):
        load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ipc": 0}, r"ipc: .*greater than or equal to 1, got 0"),
        ({"pixel_space": "rgb"}, "pixel_space: .*got 'rgb'"),
        ({"colour": 1}, "unknown option 'colour'"),
        ({"decoder": "gan"}, "decoder: .*got 'gan'"),
        ({"partition": {"factor": 4}}, r"partition\.factor: .*got 4"),
        ({"mean": (float("nan"),) * 3}, r"mean\.0: .*finite number"),
    ],
)
def test_a_meta_of_other_rules_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        meta(**changes)


def ddray_file(path: Path, **changes: Any) -> Path:
    """Write a file in our format with some entries replaced; None removes one."""
    contents = {
        "format_version": 1,
        "images": images(),
        "labels": torch.tensor([0, 0, 1, 1]),
        "meta": json.dumps(meta().dump()),
        **changes,
    }
    torch.save({key: value for key, value in contents.items() if value is not None}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 4}, "format_version must be 1, 2, 3, got 4; update ddray"),
        ({"extra": torch.zeros(1)}, r"unknown \['extra'\]"),
        ({"labels": None}, r"missing \['labels'\]"),
        ({"images": [[1.0]]}, "images must be dense tensors"),
        ({"meta": "no json"}, "meta must be a JSON object, got 'no json'"),
        ({"meta": "[1]"}, "meta must be a JSON object"),
        ({"meta": "3"}, "meta must be a JSON object"),
        ({"meta": "[" * 100_000}, "meta must be a JSON object"),
        ({"meta": torch.zeros(2)}, "meta must be a JSON object"),
        ({"meta": "{}"}, r"meta\.dataset: field required"),
        ({"meta": json.dumps({**meta().dump(), "methud": 1})}, r"'meta\.methud' .*did you mean 'method'"),
    ],
)
def test_a_file_of_another_make_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert load(ddray_file(tmp_path / "good.pt")).meta == meta()
    with pytest.raises(InputError, match=message) as caught:
        load(ddray_file(tmp_path / "a.pt", **changes))
    assert "a.pt" in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 100, 0.5, -1])
def test_a_torn_file_is_refused(length: float, tmp_path: Path) -> None:
    distilled_set().save(tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    count = int(length if isinstance(length, int) else length * len(whole))
    (tmp_path / "torn.pt").write_bytes(whole[:count])

    with pytest.raises(InputError, match=r"torn\.pt must be an undamaged distilled set.*copy it again"):
        load(tmp_path / "torn.pt")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a distilled set must be an existing file, got"):
        load(tmp_path / "none.pt")
    with pytest.raises(InputError, match=r"must be ddray's own file, .*, or a folder of pictures by class"):
        load(tmp_path)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = str(target)

    def __reduce__(self) -> Any:
        return open, (self.target, "w")


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_bomb_does_not_go_off(legacy: bool, tmp_path: Path) -> None:
    import pickle

    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Bomb(marker))).close()  # the bomb works
    assert marker.exists()
    marker.unlink()
    torch.save(
        {"format_version": 1, "images": Bomb(marker)},
        tmp_path / "bomb.pt",
        _use_new_zipfile_serialization=not legacy,
    )

    with pytest.raises(InputError, match=r"bomb\.pt must be an undamaged distilled set of tensors"):
        load(tmp_path / "bomb.pt")
    assert not marker.exists()


class TestForeign:
    @pytest.fixture
    def dataset(self, toy: Any) -> Any:
        return toy(counts=(4, 4), shape=(3, 16, 16))

    def test_accuracies_may_be_numpys(self, dataset: Any, tmp_path: Path) -> None:
        first, labels = torch.randn(4, 3, 16, 16), torch.tensor([0, 0, 1, 1])
        path = tmp_path / "res_DM_CIFAR10_ConvNet_2ipc.pt"
        accs = {"ConvNet": [np.float64(0.5), np.float32(0.25), np.mean([0.1, 0.2])]}
        torch.save({"data": [[first, labels]], "accs_all_exps": accs}, path)

        loaded = load(path, ForeignRequest(dataset))

        assert torch.equal(loaded.images, first)
        assert loaded.meta.method == "file:res_DM_CIFAR10_ConvNet_2ipc.pt"
        assert (loaded.meta.dataset, loaded.meta.ipc, loaded.meta.arch) == ("toy", 2, "convnet3")

    def test_a_whitened_one_carries_the_given_whitening(self, dataset: Any, tmp_path: Path) -> None:
        torch.save({"data": [[torch.randn(2, 3, 16, 16), torch.tensor([0, 1])]]}, tmp_path / "res_a.pt")
        space = PixelSpace("zca", zca_mean=torch.zeros(768), zca_matrix=torch.eye(768))

        loaded = load(tmp_path / "res_a.pt", ForeignRequest(dataset, lambda: space))

        assert loaded.meta.pixel_space == "zca"
        assert torch.equal(loaded.zca["zca_matrix"], torch.eye(768))
        loaded.save(tmp_path / "ours.pt")
        assert load(tmp_path / "ours.pt").meta == loaded.meta

    def test_it_needs_a_dataset(self, tmp_path: Path) -> None:
        torch.save({"data": [[torch.randn(2, 3, 16, 16), torch.tensor([0, 1])]]}, tmp_path / "res_a.pt")

        with pytest.raises(InputError, match=r"res_a\.pt does not say which dataset.*add --dataset NAME"):
            load(tmp_path / "res_a.pt")

    @pytest.mark.parametrize(
        ("contents", "message"),
        [
            ({"data": []}, "must be ddray's own file"),
            ({"data": [[torch.zeros(2, 3, 16, 16)]]}, "must be ddray's own file"),
            ({"data": [[torch.zeros(2, 3, 16, 16), 3]]}, "must be ddray's own file"),
            ({"state_dict": {}}, "must be ddray's own file"),
            (torch.zeros(2, 3, 16, 16), "must be ddray's own file"),
            ({"data": [[torch.zeros(2, 768), torch.tensor([0, 1])]]}, "must hold images"),
            ({"data": [[torch.zeros(2, 3, 16, 16), torch.tensor([0])]]}, "must hold images"),
            ({"data": [[torch.zeros(2, 3, 16, 16), torch.tensor([0, -1])]]}, "must hold images"),
            ({"data": [[torch.zeros(0, 3, 16, 16), torch.zeros(0).long()]]}, "must hold images"),
            ({"data": [[torch.zeros(2, 3, 16, 16), torch.tensor([0, 2])]]}, r"labels must be < 2"),
            ({"data": [[torch.full((2, 3, 16, 16), torch.nan), torch.tensor([0, 1])]]}, "must be finite"),
        ],
    )
    def test_a_malformed_one_is_refused(
        self, contents: Any, message: str, dataset: Any, tmp_path: Path
    ) -> None:
        torch.save(contents, tmp_path / "res_bad.pt")

        with pytest.raises(InputError, match=message) as caught:
            load(tmp_path / "res_bad.pt", ForeignRequest(dataset))
        assert "res_bad.pt" in str(caught.value)

    def test_images_without_their_labels_are_refused(self, dataset: Any, tmp_path: Path) -> None:
        torch.save(torch.zeros(2, 3, 16, 16), tmp_path / "images_best.pt")

        with pytest.raises(InputError, match=r"existing file, got .*labels_best\.pt"):
            load(tmp_path / "images_best.pt", ForeignRequest(dataset))

    def test_only_number_scalars_are_let_in(self, dataset: Any, tmp_path: Path) -> None:
        """An object array can contain arbitrary objects, so it is not allowed."""
        torch.save({"data": np.array([Bomb(tmp_path / "x")], dtype=object)}, tmp_path / "res_a.pt")

        with pytest.raises(InputError, match="must be an undamaged distilled set"):
            load(tmp_path / "res_a.pt", ForeignRequest(dataset))
        assert not (tmp_path / "x").exists()
        assert len(numpy_scalars()) == 6


def test_a_set_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        distilled_set().images = images()  # type: ignore[misc]
