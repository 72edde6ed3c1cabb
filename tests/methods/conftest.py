from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddray.methods.families.diffusion.model import DiffusionModel, save_pipeline
from ddray.methods.families.matching.batches import ClassBatches
from tests.methods.diffusion_models import BASE, untrained


@pytest.fixture
def dit(tmp_path: Path) -> str:
    save_pipeline(untrained((3, 16, 16)), tmp_path / "dit")
    return str(tmp_path / "dit")


@pytest.fixture
def d3hr(planned: Any, toy: Any) -> Any:
    """Distils toy images with D3HR; returns the set, or the context and the method."""

    def go(ipc: int = 2, seed: int = 0, *, whole: bool = True, **method: Any) -> Any:
        _, ctx, distiller = planned("d3hr", toy(), ipc=ipc, seed=seed, method={**BASE, **method})
        distiller.setup(ctx)
        if not whole:
            return ctx, distiller
        for _ in range(distiller.num_steps):
            distiller.step()
        return distiller.snapshot()

    return go


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts images that are encoded and inverted."""
    counts = {"encode": 0, "invert": 0}
    for name in counts:
        real = getattr(DiffusionModel, name)

        def count(self: Any, images: Any, *args: Any, _name: str = name, _real: Any = real) -> Any:
            counts[_name] += len(images)
            return _real(self, images, *args)

        monkeypatch.setattr(DiffusionModel, name, count)
    return counts


@pytest.fixture
def read_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many real images `ClassBatches` has read at a time."""
    sizes: list[int] = []
    take_parts = ClassBatches.take_parts

    def counted_parts(self: Any, index: Any, parts: Any, *wholes: Any) -> Any:
        rows = list(parts)
        sizes.extend(part.stop - part.start for part in rows)
        return take_parts(self, index, rows, *wholes)

    monkeypatch.setattr(ClassBatches, "take_parts", counted_parts)
    return sizes
