"""A training that goes on from the end of an epoch."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.nets import build_net
from ddray.seeding import derive
from ddray.training.dsa import dsa_for
from ddray.training.loop import DsaAugment, Training
from ddray.training.recipe import Recipe


class Interrupted(Exception): ...


class Stored:
    """Checkpoints in memory, as bytes; after `limit` of them the process is lost."""

    def __init__(self, limit: int | None = None) -> None:
        self.content, self.limit, self.num = b"", limit, 0

    def load(self) -> dict[str, Any] | None:
        return torch.load(io.BytesIO(self.content), weights_only=True) if self.content else None

    def save(self, state: Callable[[], dict[str, Any]]) -> None:
        buffer = io.BytesIO()
        torch.save(state(), buffer)
        self.content, self.num = buffer.getvalue(), self.num + 1
        if self.num == self.limit:
            raise Interrupted


def trained(recipe: Recipe, checkpoints: Stored | None) -> dict[str, Tensor]:
    images, labels = torch.rand(20, 3, 16, 16, generator=derive(0, "images")), torch.arange(20) % 3
    net = build_net("convnet1_w4_bn", (3, 16, 16), 3, seed=1)
    training = Training(images, labels, recipe, DsaAugment(dsa_for(True)))
    loss = training.run([net], [derive(0, "order")], checkpoints=checkpoints)
    return {**net.state_dict(), "loss": loss}


@pytest.mark.parametrize(
    ("settings", "num"),
    [
        ({"schedule": "vico"}, 5),
        ({"schedule": "cosine"}, 4),
        ({"schedule": "cosine", "optimizer": "adam", "warmup": 5}, 4),  # of 12 steps
    ],
)
def test_a_resumed_training_is_the_undisturbed_one(settings: dict[str, Any], num: int) -> None:
    """Bit for bit, whichever epoch was the last: `vico` begins anew with momentum after the fourth."""
    recipe = Recipe(epochs=num - (settings["schedule"] == "vico"), lr=0.05, batch=8, **settings)
    expected = trained(recipe, None)
    undisturbed = Stored()
    torch.testing.assert_close(trained(recipe, undisturbed), expected, rtol=0, atol=0)
    assert undisturbed.num == num - 1, "the last epoch needs none"
    for last in range(1, num):
        stored = Stored(last)
        with pytest.raises(Interrupted):
            trained(recipe, stored)
        stored.limit = None
        torch.testing.assert_close(trained(recipe, stored), expected, rtol=0, atol=0)
