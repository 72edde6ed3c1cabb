"""How a task of a run ended."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """How a task ended.

    Attributes:
        key: the task's key.
        value: what the function returned; None if it failed.
        error: why it failed; None if it did not.
        attempts: how often it was tried.
    """

    key: str
    value: Any
    error: Exception | None
    attempts: int
