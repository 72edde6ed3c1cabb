from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.errors import InputError, StorageError
from ddray.nets import build_net
from ddray.pool import LocalPool, PoolSpec, home


def spec(**changes: Any) -> PoolSpec:
    values: dict[str, Any] = {
        "kind": "supervised",
        "dataset": "f" * 8,
        "split": "train",
        "transform": "normalized",
        "arch": "convnet1_w8",
        "recipe": {"epochs": 2},
        "seed": 0,
        "image_shape": (1, 8, 8),
        "num_classes": 3,
    }
    return PoolSpec.parse({**values, **changes})


class Trainer:
    """Trains nothing, counts its calls."""

    def __init__(self) -> None:
        self.calls: list[PoolSpec] = []

    def __call__(self, wanted: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        self.calls.append(wanted)
        net = build_net(wanted.arch, wanted.image_shape, wanted.num_classes, seed=wanted.seed + 1)
        weights = {f"weights.{name}": tensor for name, tensor in net.state_dict().items()}
        return {**weights, "features": torch.arange(6.0).view(3, 2).T}, {"final_loss": 0.5}


def test_home_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DDRAY_HOME", str(tmp_path / "x"))
    assert home() == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDRAY_HOME", "here")
    assert home() == tmp_path / "here"
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.delenv("DDRAY_HOME")
    assert home() == Path("/somewhere/.cache/ddray")


def test_the_key_depends_on_every_field() -> None:
    changes: list[dict[str, Any]] = [
        {"kind": "ssl"},
        {"dataset": "g"},
        {"split": "train-val0"},
        {"transform": "zca"},
        {"arch": "convnet1_w16"},
        {"recipe": {"epochs": 3}},
        {"seed": 1},
        {"image_shape": (1, 8, 9)},
        {"num_classes": 4},
        {"device": "cuda"},
        {"parents": ("a",)},
    ]

    assert {name for change in changes for name in change} == set(PoolSpec.model_fields)
    assert len({spec().key, *(spec(**change).key for change in changes)}) == len(changes) + 1
    assert spec().key == spec().key


def test_what_is_missing_is_trained_once_and_given_in_order(ddray_home: Path) -> None:
    trainer = Trainer()
    pool = LocalPool(trainer)

    a, b, again = pool.get([spec(), spec(seed=1), spec()])
    (later,) = LocalPool(trainer).get([spec(seed=1)])

    assert [call.seed for call in trainer.calls] == [0, 1]
    assert a.meta["spec"]["seed"] == again.meta["spec"]["seed"] == 0
    assert later.meta == b.meta
    assert b.meta["final_loss"] == 0.5
    assert b.meta["key"] == spec(seed=1).key
    assert torch.equal(later.tensors["features"], torch.tensor([[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]))
    assert sorted(path.name for path in (ddray_home / "pool").iterdir()) == sorted(
        [spec().key, spec(seed=1).key]
    )


def test_an_entry_gives_its_network_with_its_weights_in_eval_mode() -> None:
    (entry,) = LocalPool(Trainer()).get([spec(arch="convnet1_w8_bn")])
    wanted = build_net("convnet1_w8_bn", (1, 8, 8), 3, seed=1).eval()
    images = torch.rand(2, 1, 8, 8)

    net = entry.module()

    assert not net.training
    assert torch.equal(net(images), wanted(images))


@pytest.mark.parametrize("name", ["entry.json", "tensors.safetensors"])
@pytest.mark.parametrize("held", [None, b"", b"\xff{half"])
def test_a_damaged_entry_is_refused_with_the_folder_to_remove(
    name: str, held: bytes | None, ddray_home: Path
) -> None:
    LocalPool(Trainer()).get([spec()])
    path = ddray_home / "pool" / spec().key / name
    path.unlink() if held is None else path.write_bytes(held)

    with pytest.raises(
        InputError, match=f"pool entry .*{spec().key} must be undamaged: .*; remove the folder"
    ):
        LocalPool(Trainer()).get([spec()])


def test_a_trainer_that_fails_leaves_nothing(ddray_home: Path) -> None:
    def fail(wanted: PoolSpec) -> Any:
        raise KeyError("diverged")

    with pytest.raises(KeyError):
        LocalPool(fail).get([spec()])
    assert not ddray_home.exists() or list((ddray_home / "pool").iterdir()) == []


def test_of_two_trainers_the_first_wins_and_the_second_takes_its_entry(ddray_home: Path) -> None:
    """Both find nothing, both train; the slower one finds the other's entry in its place."""

    class Overtaken(Trainer):
        def __call__(self, wanted: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            tensors, measured = super().__call__(wanted)
            LocalPool(Trainer()).get([wanted])
            return tensors, {**measured, "final_loss": 99.0}

    (entry,) = LocalPool(Overtaken()).get([spec()])

    assert entry.meta["final_loss"] == 0.5
    assert [path.name for path in (ddray_home / "pool").iterdir()] == [spec().key]


def test_of_many_threads_all_get_the_same_whole_entry(ddray_home: Path) -> None:
    gate = threading.Barrier(6)
    found: list[Any] = []
    errors: list[BaseException] = []

    class Waiting(Trainer):
        def __call__(self, wanted: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            made = super().__call__(wanted)
            gate.wait()
            return made

    def work() -> None:
        try:
            found.extend(LocalPool(Waiting()).get([spec()]))
        except BaseException as error:
            errors.append(error)

    for _ in range(5):
        found.clear()
        threads = [threading.Thread(target=work) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len({json.dumps(entry.meta, sort_keys=True) for entry in found}) == 1
        assert [path.name for path in (ddray_home / "pool").iterdir()] == [spec().key]
        for path in (ddray_home / "pool" / spec().key).iterdir():
            path.unlink()
        (ddray_home / "pool" / spec().key).rmdir()


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(
    ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def fail(tensors: Any, path: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(StorageError, match=f"could not write .*{spec().key}: .*No space left on device"):
        LocalPool(Trainer()).get([spec()])
    assert list((ddray_home / "pool").iterdir()) == []
