"""Workers whose GPU can't be used: no row says cuda where none was, and their node gets no more work."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddray.cli import _run
from ddray.cluster.executor import RayExecutor
from ddray.errors import DeviceMissingError
from ddray.runs.executor import Task
from ddray.runs.ledger import Ledger

pytestmark = pytest.mark.ray


class TestOneNode:
    @pytest.fixture(autouse=True)
    def _ray_with_gpus(self, no_ray: None) -> Iterator[None]:
        """A Ray that believes in two GPUs."""
        import ray

        ray.init(num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False, namespace="ddray")
        yield
        ray.shutdown()

    @pytest.mark.parametrize(
        ("arguments", "option"),
        [
            (("tune", "--method", "dm", "--num-samples", "1", "--steps", "2"), "gpus_per_trial"),
            (("bench", "table.yaml"), "gpus_per_unit"),
        ],
    )
    def test_no_row_says_cuda_where_none_was_used(
        self,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        arguments: tuple[str, ...],
        option: str,
    ) -> None:
        """By default a worker gets a GPU of the cluster; the driver itself starts no CUDA."""

        def refuse(*_: Any) -> None:
            raise AssertionError("the driver started CUDA")

        monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
        monkeypatch.setattr(torch.cuda, "is_available", refuse)
        monkeypatch.chdir(tmp_path)
        table = {"name": "t", "dataset": "digits", "methods": ["random"], "ipc": 1, "evaluate": {"seeds": 1}}
        Path("table.yaml").write_text(yaml.safe_dump(table))

        assert _run([*arguments, "--max-concurrent", "1", "--run-dir", "run"], False) == 1

        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f"error: {platform.node()}: torch can't use the GPU of this worker: ")
        config = yaml.safe_load(Path("run/config.yaml").read_text())
        assert (config["device"], config[option]) == ("cuda", 1.0)
        assert not Ledger(tmp_path / "run").rows()


def test_a_node_without_a_working_gpu_gets_no_more_work(no_ray: None, tmp_path: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    log = tmp_path / "nodes"

    def unit() -> str:
        node = str(ray.get_runtime_context().get_node_id())
        with log.open("a") as file:
            file.write(f"{node}\n")
        if log.read_text().split()[0] == node:
            raise DeviceMissingError("host-1: no GPU")
        return node

    node = {"num_cpus": 1, "num_gpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        with RayExecutor(1, 1, address=cluster.address).workers() as workers:
            outcomes = list(workers.run([Task(str(index), unit, ()) for index in range(6)]))
        broken, *others = log.read_text().split()
        assert all(outcome.value not in (None, broken) for outcome in outcomes)
        assert others.count(broken) <= 1, "two may have been started at once"
    finally:
        ray.shutdown()
        cluster.shutdown()
