"""Losses against numbers of an earlier build; floats with a tolerance: bytes differ across CPUs."""

from __future__ import annotations

import json

import pytest

from tests.golden.regenerate import DRAWN, FOLDER, METHODS, STEPS, losses, mean_squares


def test_every_golden_file_is_checked() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted((*METHODS, *DRAWN))


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_what_they_were(method: str) -> None:
    expected = json.loads((FOLDER / f"{method}.json").read_text(encoding="utf-8"))["losses"]

    assert len(expected) == STEPS
    assert losses(method) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", DRAWN)
def test_drawn_images_are_what_they_were(method: str) -> None:
    expected = json.loads((FOLDER / f"{method}.json").read_text(encoding="utf-8"))["mean_squares"]

    assert len(expected) == 10
    assert mean_squares(method) == pytest.approx(expected, rel=1e-4)
