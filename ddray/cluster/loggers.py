"""What a search's trials look like in TensorBoard, W&B and MLflow: Ray's loggers, with readable names."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Final

from ray.tune.logger import LoggerCallback, TBXLoggerCallback

from ddray.tuning.trial import ACCURACY_PERCENT, METRIC, rung_picture

if TYPE_CHECKING:
    from ddray.tuning.search import Search

_MAX_NAME: Final = 100


def loggers(search: Search) -> list[LoggerCallback]:
    """Return TensorBoard's logger, and those that the search's options name.

    W&B and MLflow find their servers as always: WANDB_PROJECT, MLFLOW_TRACKING_URI and so on.
    """
    chain: list[LoggerCallback] = [Boards(search)]
    for name in search.options.log_to:
        if name == "wandb":
            from ray.air.integrations.wandb import WandbLoggerCallback

            project = os.environ.get("WANDB_PROJECT", "ddray")
            chain.append(WandbLoggerCallback(project=project, group=search.name))
        else:
            from ray.air.integrations.mlflow import MLflowLoggerCallback

            chain.append(MLflowLoggerCallback(experiment_name=search.name))
    return chain


def trial_name(trial: Any) -> str:
    """Return the name of a trial's run: its number, and its settings, such as `trial-0003,lr_img=0.5`."""
    values = trial.config["params"].items()
    settings = (f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values)
    text = ",".join([f"trial-{trial.config['number']:04d}", *settings])
    return re.sub(r"[^\w.,=+-]+", "_", text)[:_MAX_NAME]


class Boards(TBXLoggerCallback):
    """TensorBoard's logger: the score (an accuracy in percent), the loss, and the set's picture, per rung."""

    def __init__(self, search: Search) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._run_dir, self._objective = search.job.run_dir, search.job.objective

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """Log a rung, at its step."""
        if trial not in self._trial_writer:
            self.log_trial_start(trial)
        writer, step = self._trial_writer[trial], int(result.get("step", 0))
        scalars: dict[str, Any] = {
            name: result[name] for name in (ACCURACY_PERCENT, "loss") if name in result
        }
        if ACCURACY_PERCENT not in result:
            scalars[self._objective] = result[METRIC]
        for name, value in scalars.items():
            writer.add_scalar(name, value, global_step=step)
        picture = rung_picture(self._run_dir, int(result["number"]), step)
        if picture.is_file():
            import numpy as np
            from PIL import Image

            with Image.open(picture) as image:
                writer.add_image("set", np.asarray(image.convert("RGB")), global_step=step, dataformats="HWC")
        self._trial_result[trial] = scalars
        writer.flush()
