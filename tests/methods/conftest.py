from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ddray.methods.families.diffusion.model import DiffusionModel, save_pipeline
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
