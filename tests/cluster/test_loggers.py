"""TensorBoard's files of a trial, readable names, and loggers that are refused."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from ddray.cluster import loggers
from ddray.errors import InputError
from ddray.tuning.options import TuneOptions
from ddray.tuning.trial import METRIC, rung_picture


class Trial:
    """What loggers read of Tune's."""

    def __init__(self, folder: Path, **params: Any) -> None:
        self.config = {"number": 3, "params": params}
        self.evaluated_params, self.local_path = params, str(folder)

    def init_local_path(self) -> None:
        Path(self.local_path).mkdir(parents=True, exist_ok=True)


def search(folder: Path, *log_to: str) -> Any:
    job = SimpleNamespace(run_dir=str(folder), objective="val_accuracy")
    options = SimpleNamespace(log_to=log_to)
    return SimpleNamespace(job=job, options=options, name="dm-digits-ipc1-seed0")


def events(folder: Path) -> list[tuple[int, str, Any]]:
    """Return (step, tag, value or picture) of a folder's event file."""
    (path,) = folder.glob("events.out.tfevents*")
    data, start, values = path.read_bytes(), 0, []
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        event = Event.FromString(data[start + 12 : start + 12 + length])
        start += 16 + length
        for value in event.summary.value:
            is_picture = value.HasField("image")
            values.append(
                (event.step, value.tag, value.image if is_picture else round(value.simple_value, 4))
            )
    return values


def test_a_trial_is_called_by_its_number_and_settings(tmp_path: Path) -> None:
    named = loggers.trial_name(Trial(tmp_path, lr_img=0.123456, arch="convnet3 /w8", layers=[1, 2]))

    assert named == "trial-0003,lr_img=0.123,arch=convnet3_w8,layers=_1,_2_"
    assert len(loggers.trial_name(Trial(tmp_path, name="x" * 300))) == 100


def test_score_loss_and_picture_of_each_rung_stand_at_its_step(tmp_path: Path) -> None:
    boards, one = loggers.Boards(search(tmp_path)), Trial(tmp_path / "events", lr_img=0.5)
    picture = rung_picture(str(tmp_path), 3, 50)
    picture.parent.mkdir(parents=True)
    Image.fromarray(np.full((4, 6), 200, np.uint8)).save(picture)
    result = {"number": 3, METRIC: 0.25, "val_accuracy_percent": 25.0, "rungs": {"1": 0.25}}

    boards.log_trial_result(1, one, {**result, "step": 50, "loss": 1.5})
    boards.log_trial_result(2, one, {**result, "step": 150, "val_accuracy_percent": 31.0, "loss": 0.5})
    boards.log_trial_end(one)  # type: ignore[no-untyped-call]

    logged = events(tmp_path / "events")
    assert [entry for entry in logged if entry[1] in ("val_accuracy_percent", "loss")] == [
        *((50, "val_accuracy_percent", 25.0), (50, "loss", 1.5)),
        *((150, "val_accuracy_percent", 31.0), (150, "loss", 0.5)),
    ]
    assert [(step, image.height, image.width) for step, tag, image in logged if tag == "set"] == [(50, 4, 6)]


def test_a_rank_correlation_is_logged_under_its_name(tmp_path: Path) -> None:
    ranked = search(tmp_path)
    ranked.job.objective = "val_spearman"
    boards, one = loggers.Boards(ranked), Trial(tmp_path / "events")

    boards.log_trial_result(1, one, {"number": 3, METRIC: 0.25, "step": 7})
    boards.log_trial_end(one)  # type: ignore[no-untyped-call]

    assert events(tmp_path / "events") == [(7, "val_spearman", 0.25)]


@pytest.mark.parametrize(
    ("names", "strategy", "message"),
    [
        (("wandb",), "tpe", r"--log-to wandb needs a package that is missing: pip install 'ddray\[wandb\]'"),
        (("mlfow",), "tpe", "--log-to must be one of mlflow, wandb, got 'mlfow'; did you mean 'mlflow'"),
        (("wandb",), "pb2", "--log-to must be left out with strategy pb2"),
    ],
)
def test_loggers_that_can_not_be_are_refused(
    names: tuple[str, ...], strategy: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=message):
        TuneOptions.parse({"log_to": names, "strategy": strategy})


def test_rays_own_loggers_get_the_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, logger in (("wandb", "WandbLoggerCallback"), ("mlflow", "MLflowLoggerCallback")):
        module = ModuleType(f"ray.air.integrations.{name}")
        setattr(module, logger, lambda logger=logger, **options: (logger, options))
        monkeypatch.setitem(sys.modules, module.__name__, module)

    boards, wandb, mlflow = loggers.loggers(search(tmp_path, "wandb", "mlflow"))

    assert isinstance(boards, loggers.Boards)
    assert wandb == ("WandbLoggerCallback", {"project": "ddray", "group": "dm-digits-ipc1-seed0"})
    assert mlflow == ("MLflowLoggerCallback", {"experiment_name": "dm-digits-ipc1-seed0"})
