"""A schedule: the ordered steps, with a rate each, that networks are trained by (DD, Wang et al. 2018).

Step i is plain SGD on the rows `order[i]` of the set at the rate `rates[i]`, from the initialisation that the
set was distilled for: `th_{i+1} = th_i - rates[i] grad CE(f(x[order[i]]; th_i), y[order[i]])`.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from ddray.config import Config

Rows = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
Rate = Annotated[float, Field(gt=0)]


class Schedule(Config):
    """The steps of a training, in their order."""

    order: tuple[Rows, ...] = Field(min_length=1)
    """Per step, the rows of the stored images, from 0."""
    rates: tuple[Rate, ...]
    """A learning rate per step."""
    init: Literal["random", "fixed"] = "random"
    """random: a fresh network each time, of the distribution distilled for; fixed: one network."""
    init_seed: int | None = None
    """Seed of the fixed network."""

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if len(self.rates) != len(self.order):
            raise ValueError(
                f"rates must be one per step of order, {len(self.order)} in all, got {len(self.rates)}"
            )
        if (self.init == "fixed") != (self.init_seed is not None):
            raise ValueError(f"init_seed must go with init fixed only, got {self.init_seed} with {self.init}")
        return self

    @property
    def num_rows(self) -> int:
        """The number of images that a set needs for it."""
        return 1 + max(max(rows) for rows in self.order)
