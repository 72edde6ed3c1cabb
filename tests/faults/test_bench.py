"""A bench whose driver, worker, node or disk fails: every unit runs once; the table is the same."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddray.cluster import executor as executor_module
from ddray.cluster.executor import RayExecutor
from ddray.runs.executor import Task
from ddray.runs.ledger import Ledger
from tests.faults.benches import NUM_UNITS, arguments, bench, check_exactly_once, local_bench, write_spec
from tests.faults.processes import DDRAY, count, finish, ray_workers, stamps, start, wait_for

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The table of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDRAY_HOME", str(folder / "home"))
        local_bench(write_spec(folder), folder / "run")
    return (folder / "run" / "table.csv").read_bytes()


def rows_of(run: Path) -> int:
    return len(list((run / "ledger").glob("*.json")))


@pytest.mark.parametrize(
    "signal_number",
    # test_nas sends SIGTERM by default
    [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)],
)
def test_a_killed_driver_resumes(tmp_path: Path, signal_number: signal.Signals, table: bytes) -> None:
    spec, run = write_spec(tmp_path), tmp_path / "run"
    victim = start([*DDRAY, *arguments(spec, run)])
    wait_for(lambda: rows_of(run) >= 3, victim)
    victim.send_signal(signal_number)
    if signal_number == signal.SIGKILL:
        # Orphans of the killed driver may still be running: don't wait for them.
        victim.wait(timeout=60)
        for pipe in (victim.stdout, victim.stderr):
            assert pipe is not None
            pipe.close()
    else:
        _, errors = victim.communicate(timeout=120)
        assert victim.returncode == 1
        assert "--resume" in errors.strip().splitlines()[-1]
        assert "Traceback" not in errors
    before = stamps(run)
    assert 3 <= len(before) < NUM_UNITS, "too late: the bench was over"
    out = finish([*DDRAY, *arguments(spec, run, "--resume", "--json")])
    assert out["num_failed"] == 0
    check_exactly_once(run, before)
    assert (run / "table.csv").read_bytes() == table


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_driver_killed_at_any_moment_resumes(tmp_path: Path, seed: int, table: bytes) -> None:
    """Up to three kills at random moments with random signals, each followed by an immediate restart."""
    draw = random.Random(seed)
    spec, run = write_spec(tmp_path), tmp_path / "run"
    before: dict[str, int] = {}
    for _ in range(draw.randint(1, 3)):
        victim = start([*DDRAY, *arguments(spec, run, "--resume")])
        moment = draw.randint(0, NUM_UNITS - 1)
        wait_for(
            lambda moment=moment, victim=victim: rows_of(run) >= moment or victim.poll() is not None, None
        )
        time.sleep(draw.uniform(0.0, 3.0))
        victim.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM]))
        victim.communicate(timeout=120)
        now = stamps(run)
        assert before.items() <= now.items()
        before = now
    finish([*DDRAY, *arguments(spec, run, "--resume", "--json")])
    check_exactly_once(run, before)
    assert (run / "table.csv").read_bytes() == table


def test_a_full_disk_ends_the_bench_and_leaves_it_resumable(tmp_path: Path, table: bytes) -> None:
    """A file-size limit makes writing a pool entry or set really fail."""
    spec, run = write_spec(tmp_path), tmp_path / "run"
    command = " ".join([*DDRAY, *arguments(spec, run, "--executor", "local")])
    limited = ["bash", "-c", f"ulimit -f 8; trap '' XFSZ; exec {command}"]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr[-1500:]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: could not write")
    assert "Traceback" not in done.stderr
    assert not list(run.rglob("*.tmp"))
    before = stamps(run)
    local_bench(spec, run, resume=True)
    check_exactly_once(run, before)
    assert (run / "table.csv").read_bytes() == table


class TestTwoNodes:
    """Nodes with one CPU each on this machine, and a head node with none."""

    @pytest.fixture
    def cluster(self, no_ray: None) -> Iterator[Any]:
        from ray.cluster_utils import Cluster

        ray_cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
        )
        try:
            yield ray_cluster
        finally:
            import ray

            ray.shutdown()
            ray_cluster.shutdown()

    def test_a_node_dies_and_another_joins(
        self, cluster: Any, tmp_path: Path, table: bytes, ddray_home: Path
    ) -> None:
        spec, run = write_spec(tmp_path), tmp_path / "run"
        first = cluster.add_node(num_cpus=1)
        cluster.add_node(num_cpus=1)
        outcome: dict[str, Any] = {}

        def body() -> None:
            outcome.update(bench(spec, run, address=cluster.address))

        thread = threading.Thread(target=body)
        thread.start()
        try:
            wait_for(lambda: rows_of(run) >= 2, None)
            before = stamps(run)
            cluster.remove_node(first, allow_graceful=False)
            cluster.add_node(num_cpus=1)
        finally:
            thread.join(timeout=300)
        assert not thread.is_alive()
        assert outcome["num_failed"] == 0
        check_exactly_once(run, before)
        assert (run / "table.csv").read_bytes() == table

    def test_units_wait_while_no_node_fits_them(
        self, cluster: Any, tmp_path: Path, table: bytes, ddray_home: Path
    ) -> None:
        spec, run = write_spec(tmp_path), tmp_path / "run"
        only = cluster.add_node(num_cpus=1)
        outcome: dict[str, Any] = {}

        def body() -> None:
            outcome.update(bench(spec, run, address=cluster.address))

        thread = threading.Thread(target=body)
        thread.start()
        try:
            wait_for(lambda: rows_of(run) >= 2, None)
            cluster.remove_node(only, allow_graceful=False)
            time.sleep(8)  # a worker outlives its node by seconds, and may finish its unit
            before = stamps(run)
            time.sleep(3)
            assert stamps(run) == before, "nothing can run without a node"
            cluster.add_node(num_cpus=1)
        finally:
            thread.join(timeout=300)
        assert not thread.is_alive()
        check_exactly_once(run, before)
        assert (run / "table.csv").read_bytes() == table


@pytest.mark.usefixtures("ray_here")
class TestWorkers:
    def test_a_killed_worker_costs_a_retry_and_nothing_else(self, tmp_path: Path) -> None:
        spec, run = write_spec(tmp_path, steps=150), tmp_path / "run"
        outcome: dict[str, Any] = {}

        def body() -> None:
            outcome.update(bench(spec, run))

        thread = threading.Thread(target=body)
        thread.start()
        try:
            wait_for(lambda: any((run / "checkpoints").glob("*.pt")), None)
            victims = ray_workers("_Worker")
            assert victims, "no worker found"
            for victim in victims:
                os.kill(victim, signal.SIGKILL)
        finally:
            thread.join(timeout=300)
        assert outcome["num_failed"] == 0
        check_exactly_once(run, {})
        retried = [event["key"] for event in Ledger(run).events() if event["event"] == "retry"]
        assert retried
        assert all(count(run, "start", row.key) == 1 for row in Ledger(run).rows())

    def test_shards_of_a_set_run_on_workers(self, tmp_path: Path) -> None:
        spec = tmp_path / "bench.yaml"
        spec.write_text(
            "name: shards\ndataset: digits\nipc: 1\n"
            "methods: [{name: dm, steps: 4, set: {method.batch_real: 8}}]\n"
            "set: {arch: convnet1_w8, compile: 'off', pixel_space: zca}\nevaluate: {epochs: 1, seeds: 1}\n"
        )
        local_bench(spec, tmp_path / "whole")
        spec.write_text(f"{spec.read_text()}shards: 3\n")
        assert bench(spec, tmp_path / "run", max_concurrent=1)["num_failed"] == 0
        rows = {name: Ledger(tmp_path / name).rows("distill")[0] for name in ("run", "whole")}
        assert rows["run"].key == rows["whole"].key
        assert rows["run"].result["sha256"] == rows["whole"].result["sha256"]
        shards = Ledger(tmp_path / "run").rows("shard")
        assert [count(tmp_path / "run", "start", row.key) for row in shards] == [1, 1, 1]

    def test_workers_serve_later_calls(self) -> None:
        with RayExecutor(cpus=0.1, gpus=0, max_workers=1).workers() as workers:

            def process() -> int:
                (outcome,) = workers.run([Task("pid", os.getpid, ())])
                return int(outcome.value)

            first = process()
            assert process() == first
            os.kill(first, signal.SIGKILL)
            assert process() != first, "a dead worker is replaced"

    def test_a_node_that_joins_is_used_while_every_worker_is_busy(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(executor_module, "_LOOK_S", 0.3)
        monkeypatch.setattr(executor_module, "_CAPACITY_S", 0.0)
        widths = itertools.chain([1, 1, 1], itertools.repeat(2))  # the first check is the executor's own
        monkeypatch.setattr(RayExecutor, "capacity", lambda *_: next(widths))

        def busy(path: str) -> bool:
            until = time.monotonic() + 60
            while not os.path.exists(path) and time.monotonic() < until:
                time.sleep(0.05)
            return os.path.exists(path)

        def touch(path: str) -> None:
            Path(path).touch()

        mark = str(tmp_path / "mark")
        tasks = [Task("busy", busy, (mark,)), Task("touch", touch, (mark,))]
        with RayExecutor(cpus=0.1, gpus=0).workers() as workers:
            results = {outcome.key: outcome.value for outcome in workers.run(tasks)}
        assert results["busy"] is True, "the second task had to wait for the end of the first"
