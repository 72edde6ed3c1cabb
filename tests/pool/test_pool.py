from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.errors import InputError, StorageError
from ddray.nets import build_net
from ddray.pool import files as pool_files
from ddray.pool.files import ENTRY, TENSORS, PoolFiles
from ddray.pool.local import LocalPool
from ddray.pool.spec import SUPERVISED_RECIPE, PoolSpec, supervised_specs
from ddray.system.files import home


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

    def __call__(self, pool_spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        self.calls.append(pool_spec)
        net = build_net(pool_spec.arch, pool_spec.image_shape, pool_spec.num_classes, seed=pool_spec.seed + 1)
        weights = {f"weights.{name}": tensor for name, tensor in net.state_dict().items()}
        return {**weights, "features": torch.arange(6.0).view(3, 2).T}, {"final_loss": 0.5}


def names(ddray_home: Path) -> list[str]:
    """Names in the pool's folder except locks."""
    return sorted(path.name for path in (ddray_home / "pool").iterdir() if path.suffix != ".lock")


def times_trained(ddray_home: Path, pool_spec: PoolSpec) -> int:
    return int(json.loads((ddray_home / "pool" / pool_spec.key / ENTRY).read_text())["times_trained"])


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


def test_a_supervised_recipe_is_the_same_with_what_it_does_anyway() -> None:
    plain = {"schedule": "constant", "augment": "none", "strategy": None, "cutmix": 0.0}

    assert spec(recipe={"epochs": 2, **plain}) == spec(recipe={"epochs": 2})
    for name, value in {"schedule": "cosine", "augment": "dsa", "strategy": "crop", "cutmix": 0.5}.items():
        assert spec(recipe={"epochs": 2, **plain, name: value}).recipe == {"epochs": 2, name: value}
    ssl = spec(kind="ssl", recipe={"epochs": 2, "augment": "none"})
    assert ssl.recipe == {"epochs": 2, "augment": "none"}


def test_the_specs_of_a_pool_differ_in_their_seeds(toy: Any) -> None:
    dataset = toy()
    specs = supervised_specs(
        dataset, split="train", arch="convnet1_w8", device="cpu", recipe={"epochs": 3}, seed=5, num=3
    )

    assert [pool_spec.seed for pool_spec in specs] == [5, 6, 7]
    assert specs[0].recipe == {**SUPERVISED_RECIPE, "epochs": 3}
    assert (specs[0].dataset, specs[0].num_classes) == (dataset.fingerprint, 3)
    assert specs[0].model_copy(update={"seed": 6}) == specs[1]


def test_networks_that_see_mirrored_images_are_others(digits: Any) -> None:
    common: dict[str, Any] = {"split": "train", "arch": "convnet1_w8", "device": "cpu", "recipe": {}}
    flipped = digits.with_options(can_flip=True)
    keys = {supervised_specs(dataset, **common, seed=0, num=1)[0].key for dataset in (digits, flipped)}

    assert flipped.fingerprint == digits.fingerprint
    assert len(keys) == 2


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
    assert b.meta["times_trained"] == 1
    assert torch.equal(later.tensors["features"], torch.tensor([[0.0, 2.0, 4.0], [1.0, 3.0, 5.0]]))
    assert names(ddray_home) == sorted([spec().key, spec(seed=1).key])
    assert PoolFiles(ddray_home / "pool").list_keys() == names(ddray_home)


def test_an_entry_gives_its_network_with_its_weights_in_eval_mode() -> None:
    (entry,) = LocalPool(Trainer()).get([spec(arch="convnet1_w8_bn")])
    expected = build_net("convnet1_w8_bn", (1, 8, 8), 3, seed=1).eval()
    images = torch.rand(2, 1, 8, 8)

    net = entry.module()

    assert not net.training
    assert torch.equal(net(images), expected(images))


def test_tensors_are_maps_of_the_file_and_writing_to_them_changes_no_other(ddray_home: Path) -> None:
    first, second = (LocalPool(Trainer()).get([spec()])[0] for _ in range(2))
    path = ddray_home / "pool" / spec().key / TENSORS

    assert str(path) in Path("/proc/self/maps").read_text()
    first.tensors["features"].zero_()
    assert second.tensors["features"].sum() == 15
    assert LocalPool(Trainer()).get([spec()])[0].tensors["features"].sum() == 15


def damage(kind: str, folder: Path) -> None:
    """Damage an entry in one of the ways that occur in practice."""
    entry, tensors = folder / ENTRY, folder / TENSORS
    if kind == "no entry":
        entry.unlink()
    elif kind == "no tensors":
        tensors.unlink()
    elif kind == "empty entry":
        entry.write_bytes(b"")
    elif kind == "torn entry":
        entry.write_bytes(entry.read_bytes()[:-20] + b"\xff")
    elif kind == "another's entry":
        entry.write_text(entry.read_text().replace(folder.name, "0" * 64))
    elif kind == "empty tensors":
        tensors.write_bytes(b"")
    elif kind == "torn tensors":
        tensors.write_bytes(tensors.read_bytes()[:100])
    elif kind == "a bit":
        flipped = bytearray(tensors.read_bytes())
        flipped[-1] ^= 1
        tensors.write_bytes(flipped)


DAMAGES = ("no entry", "no tensors", "empty entry", "torn entry", "another's entry", "empty tensors")


@pytest.mark.parametrize("kind", [*DAMAGES, "torn tensors", "a bit"])
def test_a_damaged_entry_is_set_aside_said_and_trained_again(
    kind: str, ddray_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    LocalPool(Trainer()).get([spec(), spec(seed=1)])
    folder = ddray_home / "pool" / spec().key
    damage(kind, folder)
    damaged = {path.name: path.read_bytes() for path in folder.iterdir()}
    trainer = Trainer()

    entry, _ = LocalPool(trainer).get([spec(), spec(seed=1)])

    assert trainer.calls == [spec()]
    assert entry.meta["times_trained"] == times_trained(ddray_home, spec()) == 2
    assert times_trained(ddray_home, spec(seed=1)) == 1
    assert entry.tensors["features"].sum() == 15
    (line,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert spec().key[:12] in line
    assert f"set aside as {spec().key}.corrupt-1" in line
    aside = ddray_home / "pool" / f"{spec().key}.corrupt-1"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == damaged
    assert LocalPool(trainer).get([spec()])[0].meta == entry.meta
    assert len(trainer.calls) == 1


def test_an_entry_damaged_twice_is_kept_twice(ddray_home: Path) -> None:
    for count in (1, 2, 3):
        LocalPool(Trainer()).get([spec()])
        assert times_trained(ddray_home, spec()) == count
        damage("torn tensors" if count == 1 else "torn entry", ddray_home / "pool" / spec().key)
    LocalPool(Trainer()).get([spec()])

    key = spec().key
    assert names(ddray_home) == [key, f"{key}.corrupt-1", f"{key}.corrupt-2", f"{key}.corrupt-3"]
    assert PoolFiles(ddray_home / "pool").list_keys() == [key]


def test_the_count_outlives_the_entry_and_a_lost_lock_file(ddray_home: Path) -> None:
    LocalPool(Trainer()).get([spec()])
    shutil.rmtree(ddray_home / "pool" / spec().key)
    LocalPool(Trainer()).get([spec()])
    assert times_trained(ddray_home, spec()) == 2

    (ddray_home / "pool" / f"{spec().key}.lock").unlink()
    damage("a bit", ddray_home / "pool" / spec().key)
    LocalPool(Trainer()).get([spec()])
    assert times_trained(ddray_home, spec()) == 3


def test_an_entry_of_an_earlier_version_without_a_hash_is_read(ddray_home: Path) -> None:
    LocalPool(Trainer()).get([spec()])
    path = ddray_home / "pool" / spec().key / ENTRY
    entry = json.loads(path.read_text())
    path.write_text(json.dumps({name: entry[name] for name in ("key", "spec", "final_loss")}))
    trainer = Trainer()

    assert LocalPool(trainer).get([spec()])[0].tensors["features"].sum() == 15
    assert trainer.calls == []
    damage("torn tensors", path.parent)
    assert LocalPool(trainer).get([spec()])[0].meta["times_trained"] == 2


def test_the_hash_is_computed_once_per_process(ddray_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    LocalPool(Trainer()).get([spec()])
    hashed: list[Path] = []
    sha256 = pool_files.file_sha256
    monkeypatch.setattr(pool_files, "file_sha256", lambda path: hashed.append(path) or sha256(path))
    LocalPool(Trainer()).get([spec()])
    assert hashed == []

    monkeypatch.setattr(pool_files, "_sound", set())
    for _ in range(2):
        LocalPool(Trainer()).get([spec()])
    assert hashed == [ddray_home / "pool" / spec().key / TENSORS]


def test_an_entry_that_may_not_be_read_is_no_damage(
    ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    LocalPool(Trainer()).get([spec()])

    def refuse(folder: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(pool_files, "_described", refuse)
    with pytest.raises(InputError, match=f"pool entry .*{spec().key} must be readable: Permission denied"):
        LocalPool(Trainer()).get([spec()])
    assert names(ddray_home) == [spec().key]


def test_nothing_is_said_when_all_are_there(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        LocalPool(Trainer()).get([spec(), spec(seed=1)])
        assert caplog.messages == [
            f"pool network {number} of 2 (supervised, {spec().arch})" for number in (1, 2)
        ]
        caplog.clear()
        LocalPool(Trainer()).get([spec(), spec(seed=1)])
        assert caplog.records == []


def test_a_trainer_that_fails_leaves_nothing_and_the_next_one_may_try(ddray_home: Path) -> None:
    def fail(pool_spec: PoolSpec) -> Any:
        raise KeyError("diverged")

    with pytest.raises(KeyError):
        LocalPool(fail).get([spec()])
    assert names(ddray_home) == []
    assert LocalPool(Trainer()).get([spec()])[0].meta["times_trained"] == 1


def test_what_a_killed_trainer_left_half_written_is_removed(ddray_home: Path) -> None:
    files = PoolFiles(ddray_home / "pool")
    gone = subprocess.Popen(["true"])
    gone.wait()
    drafts = {}
    for name, pool_spec, owner in (
        ("dead", spec(), f"{pool_files._host()}-{gone.pid}.aa"),
        ("alive", spec(), f"{pool_files._host()}-{os.getppid()}.aa"),
        ("of another entry", spec(seed=1), f"{pool_files._host()}-{gone.pid}.aa"),
        ("elsewhere", spec(), f"some_other_machine-{gone.pid}.aa"),
        ("elsewhere, silent", spec(), f"some_other_machine-{gone.pid}.bb"),
        ("of an earlier version, silent", spec(), "cc"),
    ):
        drafts[name] = files.folder / f".{pool_spec.key}.{owner}.tmp"
        drafts[name].mkdir(parents=True)
        (drafts[name] / TENSORS).write_bytes(b"half")
        if "silent" in name:
            for path in (drafts[name] / TENSORS, drafts[name]):
                os.utime(path, (1.0, 1.0))

    LocalPool(Trainer()).get([spec()])

    assert {name for name, draft in drafts.items() if draft.exists()} == {
        "alive",
        "of another entry",
        "elsewhere",
    }


def test_a_draft_outlives_whoever_takes_the_lock_meanwhile(ddray_home: Path) -> None:
    """Drafts of cluster clients, which do not own the lock themselves."""
    files = PoolFiles(ddray_home / "pool")
    draft = files.draft(spec().key, {"a": torch.ones(2)}, {"spec": spec().dump()}, times_trained=1)

    lock = files.lock(spec().key)
    files.publish(spec().key, draft, lock)
    lock.release()

    meta = files.read(spec().key)
    assert meta is not None
    assert meta["times_trained"] == 1


def test_of_many_threads_one_trains_and_all_get_its_entry(ddray_home: Path) -> None:
    trainer, entries, errors = Trainer(), [], []
    gate = threading.Barrier(6)

    def work() -> None:
        try:
            gate.wait()
            entries.extend(LocalPool(trainer).get([spec()]))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert len(trainer.calls) == 1
    assert len(entries) == 6
    assert len({json.dumps(entry.meta, sort_keys=True) for entry in entries}) == 1


def test_who_waits_for_one_entry_trains_the_next(ddray_home: Path) -> None:
    """While the first entry is locked elsewhere, the second is trained; then the first is taken over."""
    lock = PoolFiles(ddray_home / "pool").lock(spec().key)

    class Releasing(Trainer):
        def __call__(self, pool_spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            if pool_spec == spec(seed=1):
                lock.release()  # like a trainer that died
            return super().__call__(pool_spec)

    trainer = Releasing()
    LocalPool(trainer).get([spec(), spec(seed=1)])

    assert trainer.calls == [spec(seed=1), spec()]


def test_an_entrys_seconds_are_without_waiting_for_the_one_below_it(ddray_home: Path) -> None:
    lock = PoolFiles(ddray_home / "pool").lock(spec().key)
    timer = threading.Timer(1.0, lock.release)

    class Nested(Trainer):
        def __call__(self, pool_spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            if pool_spec == spec(seed=1):
                timer.start()
                LocalPool(self).get([spec()])
            return super().__call__(pool_spec)

    (entry,) = LocalPool(Nested()).get([spec(seed=1)])

    timer.join()
    assert 0 < entry.meta["wall_s"] < 0.5


def test_where_locks_do_not_hold_the_first_entry_stays(
    ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_files.fcntl, "flock", lambda handle, how: None)

    class Overtaken(Trainer):
        def __call__(self, pool_spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            tensors, measured = super().__call__(pool_spec)
            LocalPool(Trainer()).get([pool_spec])
            return tensors, {**measured, "final_loss": 99.0}

    (entry,) = LocalPool(Overtaken()).get([spec()])

    assert entry.meta["final_loss"] == 0.5
    assert names(ddray_home) == [spec().key]
    with PoolFiles(ddray_home / "pool").lock(spec().key) as lock:
        assert lock.times_trained == 1  # the one that lost is not counted


def test_a_full_disk_is_a_storage_error_and_leaves_nothing(
    ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch
    from safetensors import SafetensorError

    def fail(tensors: Any, path: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", fail)
        with pytest.raises(StorageError, match=f"could not write .*{spec().key}: .*No space left on device"):
            LocalPool(Trainer()).get([spec()])
    assert names(ddray_home) == []
    assert LocalPool(Trainer()).get([spec()])[0].meta["times_trained"] == 1


def test_a_folder_that_cannot_be_made_is_a_storage_error(ddray_home: Path) -> None:
    ddray_home.write_text("a file")
    with pytest.raises(StorageError, match=r"could not write .*\.lock: Not a directory"):
        LocalPool(Trainer()).get([spec()])


def test_what_is_computed_elsewhere_needs_no_device_here(ddray_home: Path) -> None:
    """A head without a GPU drives workers that have one; memory is theirs, as the trainer says."""
    gpu = spec(device="cuda")
    pool = LocalPool(lambda _: ({"weights.x": torch.ones(1)}, {"peak_memory_bytes": 7}))
    assert pool.get([gpu])[0].meta["peak_memory_bytes"] == 7
