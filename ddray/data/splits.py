"""Names of the parts of train, as keys and files have them."""

import re
from dataclasses import dataclass
from typing import Final, Self

from ddray.data.dataset import Split, carve_val

_PATTERN: Final = re.compile(r"train(?:-val(\d+))?")


@dataclass(frozen=True)
class SplitName:
    """All of train, written `train`, or what is left of it without a val tenth, written `train-val<seed>`.

    Attributes:
        val_seed: seed of the val tenth that is left out; None for all of train.
    """

    val_seed: int | None = None

    def __str__(self) -> str:
        return "train" if self.val_seed is None else f"train-val{self.val_seed}"

    @classmethod
    def parse(cls, name: str) -> Self | None:
        """Return the split that a name stands for; None for any other name."""
        match = _PATTERN.fullmatch(name)
        return None if match is None else cls(None if match[1] is None else int(match[1]))

    def carve(self, train: Split) -> tuple[Split, Split | None]:
        """Return this part of train, and the val tenth that it leaves out."""
        return (train, None) if self.val_seed is None else carve_val(train, seed=self.val_seed)
