"""An executor whose workers are as on other machines."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

from ddray.runs.executor import LocalExecutor, Task


class Elsewhere(LocalExecutor):
    """Workers on other machines: what is shared with them is a copy."""

    def share(self, value: Any) -> Any:
        """Return a copy of the value."""
        return pickle.loads(pickle.dumps(value))

    def _start(self, task: Task, attempt: int) -> None:
        super()._start(replace(task, arguments=tuple(map(self.share, task.arguments))), attempt)
