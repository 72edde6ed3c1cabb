"""Pools when trainers, drivers and the service die: nothing is trained twice or lost for good."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from ddray.cluster import pool as pool_module
from ddray.cluster.pool import ClusterPool, Lease, PoolAddress, PoolService, Served, pool_service
from ddray.pool.files import ENTRY, PoolFiles
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolSpec
from ddray.runs.ledger import Ledger
from tests.faults.processes import DDRAY, finish, start, wait_for
from tests.faults.search import search, trials

KEY = "a" * 64


def spec(seed: int = 0) -> PoolSpec:
    return PoolSpec(
        kind="supervised",
        dataset="f" * 8,
        split="train",
        transform="normalized",
        arch="convnet1_w8",
        recipe={"epochs": 2},
        seed=seed,
        image_shape=(1, 8, 8),
        num_classes=3,
    )


def quick(pool_spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    return {"features": torch.full((2, 2), float(pool_spec.seed))}, {"by": os.getpid()}


def entries(home: Path) -> dict[str, dict[str, Any]]:
    """Return key -> entry.json of the existing entries."""
    files = PoolFiles(home / "pool")
    return {key: json.loads((files.folder / key / ENTRY).read_text()) for key in files.list_keys()}


class TestService:
    """The service itself, with a fake clock and without Ray."""

    @pytest.fixture
    def clock(self) -> list[float]:
        return [0.0]

    @pytest.fixture
    def service(self, tmp_path: Path, clock: list[float]) -> PoolService:
        return PoolService(str(tmp_path), lease_s=10.0, put=lambda value: value, clock=lambda: clock[0])

    def draft(self, folder: Path, value: float = 1.0) -> str:
        facts = {"spec": {}, "value": value}
        return str(PoolFiles(folder).draft(KEY, {"t": torch.tensor([value])}, facts, times_trained=1))

    def test_one_client_is_given_the_lease_and_the_others_the_entry(
        self, service: PoolService, tmp_path: Path
    ) -> None:
        assert service.ask(KEY) == Lease(1, 1)
        assert service.ask(KEY) is None
        assert service.publish(KEY, 1, self.draft(tmp_path))
        served = service.ask(KEY)
        assert isinstance(served, Served)
        assert (served.meta["value"], served.is_whole) == (1.0, True)
        assert served.arrays["t"].tolist() == [1.0]
        assert service.ask(KEY) is served
        assert PoolFiles(tmp_path).lock(KEY).times_trained == 1

    def test_a_silent_trainer_loses_its_lease_and_its_late_entry_is_refused(
        self, service: PoolService, tmp_path: Path, clock: list[float]
    ) -> None:
        assert service.ask(KEY) == Lease(1, 1)
        clock[0] = 9.0
        assert service.beat(KEY, 1)
        clock[0] = 18.9
        assert service.ask(KEY) is None
        clock[0] = 19.0
        assert service.ask(KEY) == Lease(2, 1)
        assert not service.beat(KEY, 1)
        assert not service.publish(KEY, 1, self.draft(tmp_path, 66.0))
        service.give_up(KEY, 1)
        assert service.ask(KEY) is None  # the second trainer's lease is still valid
        assert service.publish(KEY, 2, self.draft(tmp_path, 2.0))
        assert not service.publish(KEY, 1, self.draft(tmp_path, 66.0))
        assert not service.publish(KEY, 2, self.draft(tmp_path, 66.0))
        served = service.ask(KEY)
        assert isinstance(served, Served)
        assert served.meta["value"] == 2.0

    def test_a_lease_that_lapsed_counts_again_while_nobody_has_taken_over(
        self, service: PoolService, tmp_path: Path, clock: list[float]
    ) -> None:
        files = PoolFiles(tmp_path)
        assert service.ask(KEY) == Lease(1, 1)
        clock[0] = 10.0
        service.lapse()
        lock = files.try_lock(KEY)
        assert lock is not None  # processes that use only the files get the lock
        assert not service.beat(KEY, 1)
        assert not service.publish(KEY, 1, self.draft(tmp_path))
        lock.release()
        assert service.beat(KEY, 1)
        assert files.try_lock(KEY) is None
        assert service.publish(KEY, 1, self.draft(tmp_path))

    def test_a_lapsed_lease_is_refused_if_the_entry_is_there(
        self, service: PoolService, tmp_path: Path, clock: list[float]
    ) -> None:
        files = PoolFiles(tmp_path)
        service.ask(KEY)
        clock[0] = 10.0
        service.lapse()
        with files.lock(KEY) as lock:
            files.publish(KEY, Path(self.draft(tmp_path, 2.0)), lock)
        assert not service.publish(KEY, 1, self.draft(tmp_path, 66.0))
        served = service.ask(KEY)
        assert isinstance(served, Served)
        assert served.meta["value"] == 2.0

    def test_leases_lapse_though_nobody_asks(self, tmp_path: Path) -> None:
        """A client that falls back to the files waits for the lock and no longer asks the service."""
        service = PoolService(str(tmp_path), lease_s=0.2, put=lambda value: value)
        service.watch()
        assert service.ask(KEY) == Lease(1, 1)
        deadline = time.monotonic() + 20
        while (lock := PoolFiles(tmp_path).try_lock(KEY)) is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        lock.release()

    def test_time_that_the_service_took_itself_is_on_nobodys_lease(
        self, service: PoolService, tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def hash_for_long(key: str) -> None:
            clock[0] += 60.0

        service.ask(KEY)
        monkeypatch.setattr(service._files, "find", hash_for_long)
        service.ask("b" * 64)
        monkeypatch.undo()
        service.lapse()
        assert PoolFiles(tmp_path).try_lock(KEY) is None

    def test_a_token_never_comes_again(self, service: PoolService) -> None:
        for token in (1, 2, 3):
            assert service.ask(KEY) == Lease(token, 1)
            service.give_up(KEY, token)
            assert not service.beat(KEY, token)

    def test_a_process_outside_of_the_cluster_is_waited_for(
        self, service: PoolService, tmp_path: Path
    ) -> None:
        files = PoolFiles(tmp_path)
        lock = files.lock(KEY)
        assert service.ask(KEY) is None
        files.publish(KEY, Path(self.draft(tmp_path)), lock)
        lock.release()
        assert isinstance(service.ask(KEY), Served)

    def test_it_keeps_others_out_as_long_as_a_lease_stands(
        self, service: PoolService, tmp_path: Path, clock: list[float]
    ) -> None:
        files = PoolFiles(tmp_path)
        service.ask(KEY)
        clock[0] = 11.0
        service.ask(KEY)
        assert files.try_lock(KEY) is None
        service.give_up(KEY, 2)
        lock = files.try_lock(KEY)
        assert lock is not None
        lock.release()

    def test_a_damaged_entry_is_set_aside_and_leased(
        self, service: PoolService, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        service.ask(KEY)
        service.publish(KEY, 1, self.draft(tmp_path))
        service.ask(KEY)
        PoolFiles(tmp_path).tensors_path(KEY).write_bytes(b"half")
        service.forget(KEY)
        assert service.ask(KEY) == Lease(2, 2)
        assert f"set aside as {KEY}.corrupt-1" in caplog.text


_WAITING = """
import sys, time
from pathlib import Path
import torch
from ddray.pool.local import LocalPool
from tests.faults.test_pool import spec

def train(pool_spec):
    with open(sys.argv[1], "a") as log:
        log.write(f"{pool_spec.seed}\\n")
    time.sleep(float(sys.argv[2]))
    return {"features": torch.zeros(1)}, {}

LocalPool(train).get([spec(seed) for seed in range(3)])
"""


def process(log: Path, seconds: float) -> subprocess.Popen[str]:
    return start([sys.executable, "-c", _WAITING, str(log), str(seconds)])


def test_two_processes_share_the_work_and_train_each_entry_once(tmp_path: Path, ddray_home: Path) -> None:
    log = tmp_path / "log"
    pair = [process(log, 1.0) for _ in range(2)]
    for one in pair:
        _, errors = one.communicate(timeout=200)
        assert one.returncode == 0, errors
    assert sorted(log.read_text().split()) == ["0", "1", "2"]
    assert [entry["times_trained"] for entry in entries(ddray_home).values()] == [1, 1, 1]


def test_a_killed_trainer_is_taken_over_at_once(tmp_path: Path, ddray_home: Path) -> None:
    log, other = tmp_path / "log", tmp_path / "other"
    log.touch()
    victim = process(log, 600.0)
    wait_for(lambda: log.read_text() == "0\n", victim)
    heir = process(other, 0.1)
    try:
        wait_for(lambda: len(entries(ddray_home)) == 2, heir)
        time.sleep(0.5)
        assert spec(0).key not in entries(ddray_home)  # the victim holds it
        victim.send_signal(signal.SIGKILL)
        _, errors = heir.communicate(timeout=60)
    finally:
        for one in (victim, heir):
            one.kill()
            one.communicate()
    assert heir.returncode == 0, errors
    assert [entry["times_trained"] for entry in entries(ddray_home).values()] == [1, 1, 1]
    assert other.read_text().split() == ["1", "2", "0"]


@pytest.fixture
def address(tmp_path: Path, ddray_home: Path) -> PoolAddress:
    return PoolAddress(f"faults-{tmp_path.name}", str(ddray_home / "pool"), lease_s=1.0)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_here")
class TestCluster:
    @pytest.fixture
    def hanging(self, address: PoolAddress, tmp_path: Path) -> Iterator[int]:
        """The process id of a worker that holds a lease."""
        log = tmp_path / "pid"

        def train(pool_spec: PoolSpec) -> Any:
            log.write_text(str(os.getpid()))
            time.sleep(600)

        @ray.remote(num_cpus=0, max_retries=0)
        def hang() -> None:
            ClusterPool(train, address).get([spec()])

        with pool_service(address):
            reference = hang.remote()
            wait_for(lambda: log.exists() and log.read_text() != "", None, 60)
            yield int(log.read_text())
            ray.cancel(reference, force=True)

    def test_a_killed_trainer_is_taken_over(
        self, hanging: int, address: PoolAddress, ddray_home: Path
    ) -> None:
        pool = ClusterPool(quick, address)
        pool_entries: list[Any] = []
        thread = threading.Thread(target=lambda: pool_entries.extend(pool.get([spec()])))
        thread.start()
        time.sleep(2.5)  # longer than a lease: heartbeats renew it
        assert entries(ddray_home) == {}
        os.kill(hanging, signal.SIGKILL)
        thread.join(timeout=60)
        assert [entry.meta["by"] for entry in pool_entries] == [os.getpid()]
        assert pool_entries[0].meta["times_trained"] == 1

    def test_a_stopped_trainer_is_taken_over_and_its_late_entry_refused(
        self, address: PoolAddress, ddray_home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Like a machine that hangs: no heartbeat arrives, then it wakes up."""
        gate = threading.Event()

        class Silent(ClusterPool):
            def _beating(self, key: str, token: int) -> Any:
                return threading.Lock()  # does nothing for a while

        def slow(pool_spec: PoolSpec) -> Any:
            gate.wait(60)
            return {"features": torch.full((2, 2), 66.0)}, {}

        late: list[Any] = []
        with pool_service(address):
            thread = threading.Thread(target=lambda: late.extend(Silent(slow, address).get([spec()])))
            thread.start()
            wait_for(lambda: (ddray_home / "pool" / f"{spec().key}.lock").exists(), None, 60)
            (entry,) = ClusterPool(quick, address).get([spec()])
            gate.set()
            thread.join(timeout=60)
        assert entry.tensors["features"].sum() == 0
        assert late[0].tensors["features"].sum() == 0
        assert "finished too late" in caplog.text
        assert entries(ddray_home)[spec().key]["times_trained"] == 1
        assert not list((ddray_home / "pool").glob("*.tmp"))

    def test_without_its_service_the_files_go_on_and_nothing_is_trained_again(
        self, address: PoolAddress, ddray_home: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        seeds: list[int] = []

        def train(pool_spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            seeds.append(pool_spec.seed)
            if pool_spec.seed == 1:
                ray.kill(ray.get_actor(address.name, namespace="ddray"))
                time.sleep(0.5)
            return quick(pool_spec)

        with pool_service(address):
            pool_entries = ClusterPool(train, address).get([spec(seed) for seed in range(3)])

        assert seeds == [0, 1, 2]
        assert [int(entry.tensors["features"].sum()) for entry in pool_entries] == [0, 4, 8]
        assert "the pool's service is gone" in caplog.text
        assert len(entries(ddray_home)) == 3
        with caplog.at_level(logging.WARNING):
            again = ClusterPool(train, address).get([spec(1)])
        assert (seeds, again[0].meta) == ([0, 1, 2], pool_entries[1].meta)

    def test_a_slow_service_is_waited_for(
        self,
        address: PoolAddress,
        ddray_home: Path,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A lease granted to an abandoned call would belong to nobody."""
        monkeypatch.setattr(pool_module, "_PATIENCE_S", 0.2)
        with pool_service(address):
            actor: Any = ray.get_actor(address.name, namespace="ddray")
            actor.__ray_call__.remote(lambda service: time.sleep(2))
            (entry,) = ClusterPool(quick, address).get([spec()])
            served = ray.get(actor.ask.remote(spec().key))
        assert entry.meta["by"] == os.getpid()
        assert served.meta == entry.meta
        assert "waiting on" in caplog.text
        assert "is gone" not in caplog.text

    def test_a_cluster_and_a_process_share_the_files(self, address: PoolAddress, ddray_home: Path) -> None:
        gate = threading.Event()
        begun = threading.Event()

        def slow(pool_spec: PoolSpec) -> Any:
            begun.set()
            gate.wait(60)
            return quick(pool_spec)

        def never(pool_spec: PoolSpec) -> Any:
            raise AssertionError("trained twice")

        with pool_service(address):
            outside = threading.Thread(target=lambda: LocalPool(slow).get([spec()]))
            outside.start()
            begun.wait(60)
            pool_entries: list[Any] = []
            inside = threading.Thread(
                target=lambda: pool_entries.extend(ClusterPool(never, address).get([spec()]))
            )
            inside.start()
            time.sleep(1.0)
            assert pool_entries == []
            gate.set()
            for thread in (outside, inside):
                thread.join(timeout=60)
        assert len(pool_entries) == 1
        assert entries(ddray_home)[spec().key]["times_trained"] == 1

    def test_trials_share_what_is_declared_and_what_a_neighbour_trained(
        self, tmp_path: Path, ddray_home: Path
    ) -> None:
        layers = {
            "evaluate": {"epochs": 2, "seeds": 1},
            "arch": "convnet2_w8",
            "method": {"feature_epochs": 1},
        }
        run = tmp_path / "run"
        out = search(
            run,
            "feature_epochs: {choice: [1, 2]}",
            method="kcenter",
            layers={**layers, "method": {"feature_epochs": 1}},
            strategy="random",
            num_samples=5,
            max_concurrent=None,
        )
        assert out["num_failed"] == 0
        feature_epochs = {row.spec["params"]["feature_epochs"] for row in trials(run)}
        pool_entries = entries(ddray_home).values()
        assert all(entry["times_trained"] == 1 for entry in pool_entries)
        assert {entry["spec"]["kind"] for entry in pool_entries} == {"features"}
        searched = [entry for entry in pool_entries if entry["spec"]["split"] == "train-val0"]
        assert {
            entry["spec"]["recipe"]["network"]["recipe"]["epochs"] for entry in searched
        } == feature_epochs
        assert len(searched) == len(feature_epochs) == 2
        # The winner and the paper's point, on one fresh seed.
        finals = [entry for entry in pool_entries if entry["spec"]["split"] == "train"]
        assert len(finals) == len({out["best"]["config"]["feature_epochs"], 1})


_POOLED = """
from ddray.config import Config
from ddray.methods.toolkit import kcenter_order, per_class, selection_method, supervised_specs, take
class PooledConfig(Config):
    epochs: int = 1
def specs(ctx, config):
    return supervised_specs(
        ctx.dataset, split="train", arch=ctx.arch, device=ctx.device.type, recipe={"epochs": config.epochs},
        seed=0, num=3)
def choose(ctx, config):
    entries = ctx.pool.get(specs(ctx, config))
    num = len(ctx.dataset.train())
    assert num == 1438 and all(entry.module() is not None for entry in entries), num
    pixels = ctx.split.images.flatten(1).float()
    index = per_class(ctx.split.labels, 10, ctx.ipc, lambda rows: kcenter_order(pixels[rows], ctx.ipc))
    return take(ctx, index)
METHOD = selection_method(PooledConfig, choose)
METHOD.pool_specs = lambda self, ctx: specs(ctx, self._config)
"""


@pytest.mark.ray
def test_a_driver_killed_while_the_pool_is_trained_resumes(
    tmp_path: Path, ddray_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The method comes from a user's package; its networks are trained on all of train."""
    package = tmp_path / "site"
    info = package / "pooled-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pooled\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ddray.methods]\npooled = pooled\n")
    (package / "pooled.py").write_text(_POOLED)
    monkeypatch.setenv("PYTHONPATH", f"{package}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    space, run = tmp_path / "space.yaml", tmp_path / "run"
    space.write_text("{}\n")
    arguments = [
        *(*DDRAY, "tune", "--method", "pooled", "--space", str(space)),
        *("--strategy", "random", "--num-samples", "1", "--max-concurrent", "1", "--final-sets", "1"),
        *("--set", "arch=convnet2_w16", "--set", "evaluate.epochs=2", "--set", "evaluate.seeds=1"),
        *("--set", "method.epochs=8", "--run-dir", str(run), "--json"),
    ]
    victim = start(arguments)
    try:
        wait_for(lambda: len(entries(ddray_home)) >= 1, victim)
    finally:
        victim.kill()
        victim.communicate()
    before = {key: (ddray_home / "pool" / key / ENTRY).stat().st_mtime_ns for key in entries(ddray_home)}
    assert Ledger(run).rows() == []

    out = finish([*arguments, "--resume"])

    assert (out["num_trials"], out["num_failed"]) == (1, 0)
    pool_entries = entries(ddray_home)
    assert len(pool_entries) == 3
    assert all(entry["times_trained"] == 1 for entry in pool_entries.values())
    after = {key: (ddray_home / "pool" / key / ENTRY).stat().st_mtime_ns for key in pool_entries}
    assert before.items() <= after.items()
    assert not list((ddray_home / "pool").glob("*.tmp"))
