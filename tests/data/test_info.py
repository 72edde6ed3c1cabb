from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddray.data.loaders import data_info
from tests.data.data_files import random_images, write_png


def test_what_would_expose_a_misreading_is_shown(tmp_path: Path) -> None:
    root = tmp_path / "set"
    for half, num in (("train", 3), ("test", 1)):
        for label, name in enumerate("ab"):
            for index, image in enumerate(random_images(num + label, (1, 8, 8), label)):
                write_png(root / half / name / f"{index}.png", image)
    write_png(root / "test" / "a" / "odd.png", random_images(1, (1, 9, 8))[0])
    (root / "notes.txt").touch()
    info = data_info(str(root), can_flip=False)
    assert info.per_class == {"train": [3, 4], "test": [2, 2]}
    assert info.size_rule == "that of 7 of 7 train images"
    assert not info.can_flip
    assert info.mean[0] == pytest.approx(0.5, abs=0.05)
    assert info.std[0] == pytest.approx(1 / 12**0.5, abs=0.02)
    left_out, resized = info.warnings
    assert left_out == f"{root}: left out 1 files of another kind: notes.txt"
    assert resized.startswith("1 of 4 images are resized")
    assert data_info(str(root)).warnings == info.warnings


def test_the_command_takes_options_of_content(run_command: Callable[..., dict[str, Any]]) -> None:
    info = run_command("data", "info", "digits", "--image-size", "8", "--can-flip")
    assert (info["image_shape"], info["can_flip"]) == ([1, 8, 8], True)
    assert info["name"] == "digits?can_flip=true&image_size=8"
    assert run_command("data", "info", info["name"], "--no-can-flip")["can_flip"] is False
