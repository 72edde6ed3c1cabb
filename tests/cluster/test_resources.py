"""How many GPUs the workers of tune, bench and nas get."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from ddray.cluster import resources
from ddray.cluster.resources import with_gpus
from ddray.config import Config
from ddray.errors import InputError
from ddray.ranking.options import NasOptions
from ddray.runs.folder import open_run, read_config
from ddray.tables.options import BenchOptions
from ddray.tuning.options import TuneOptions

KINDS = [(TuneOptions, "gpus_per_trial"), (BenchOptions, "gpus_per_unit"), (NasOptions, "gpus_per_worker")]
each_command = pytest.mark.parametrize(("kind", "name"), KINDS)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many GPUs this machine seems to have, for a local Ray that has not started."""

    def have(num: int) -> None:
        monkeypatch.setattr(resources, "num_gpus", lambda: num)
        monkeypatch.delitem(sys.modules, "ray", raising=False)

    return have


@each_command
def test_the_default_is_a_gpu_where_there_is_one(
    kind: Any, name: str, gpus: Any, caplog: pytest.LogCaptureFixture
) -> None:
    gpus(4)
    with caplog.at_level(logging.INFO, logger="ddray"):
        options = with_gpus(kind())
    assert getattr(options, name) == options.gpus == 1.0
    assert caplog.messages == [
        f"GPUs: 4, one per {name.removeprefix('gpus_per_')}; --{name.replace('_', '-')} 0 computes on the CPU"
    ]
    assert with_gpus(kind(**{name: 0})).gpus == 0, "an explicit 0 stays 0"
    assert with_gpus(kind(**{name: 0.25})).gpus == 0.25
    gpus(0)
    assert with_gpus(kind()).gpus == 0


@each_command
def test_more_gpus_than_can_be_used_or_than_there_are_is_refused(kind: Any, name: str, gpus: Any) -> None:
    gpus(8)
    option = "--" + name.replace("_", "-")
    with pytest.raises(InputError, match=f"{option}: must be <= 1, because .* one GPU .* got 2"):
        kind.pick({name: 2})
    gpus(0)
    for share in (1, 0.5):
        with pytest.raises(InputError, match=f"{option} must be 0 where there is no GPU .* got {share}"):
            with_gpus(kind(**{name: share}))


@each_command
def test_a_resumed_run_keeps_what_it_was_begun_with(kind: Any, name: str, gpus: Any) -> None:
    gpus(0)  # whatever the machine has now
    assert with_gpus(kind(), {"device": "cuda", name: 0.5}).gpus == 0.5
    assert with_gpus(kind(), {"device": "cuda"}).gpus == 1
    gpus(4)
    assert with_gpus(kind(), {"device": "cpu"}).gpus == 0
    assert with_gpus(kind(**{name: 0.25}), {"device": "cuda", name: 0.5}).gpus == 0.25


def test_another_share_of_a_gpu_resumes_a_run_and_another_device_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = {"device": "cuda", "gpus_per_trial": 0.5, "steps": 3}
    open_run(folder, config, command="tune", resume=False)
    assert read_config(folder)["gpus_per_trial"] == 0.5
    open_run(folder, {**config, "gpus_per_trial": 1.0}, command="tune", resume=True)
    with pytest.raises(InputError, match="device"):
        open_run(folder, {"device": "cpu", "steps": 3}, command="tune", resume=True)


def test_local_units_ask_the_machine_and_not_a_cluster(gpus: Any) -> None:
    gpus(2)
    local: Config = with_gpus(BenchOptions(executor="local"))
    assert isinstance(local, BenchOptions)
    assert (local.gpus, local.device) == (1.0, "cuda")
