"""NAS-Bench-201 under DC-BENCH's conditions, which DataDAM's Table 5 takes over.

The numbers are those of its code (darts-pt/nasbench201/train_search.py) and of DataDAM's supplement, 2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ddray.data import Dataset, SplitName, carve_val
from ddray.errors import InputError
from ddray.ranking import get_definition
from ddray.ranking.options import NasOptions, NasRecipe
from ddray.ranking.proxies import baseline_proxies
from ddray.ranking.spaces import get_space, resolve_config, sample
from ddray.ranking.sweep import Sweep, choose_architectures, split_of
from ddray.ranking.training import train_seeds
from ddray.seeding import derive

PUBLISHED = NasOptions(
    space="nasbench201",
    sample=100,
    sampling="uniform",
    seeds=5,
    val_images=10_000,
    truth="table",
    truth_column="cifar10_test_200_mean",
)
NUMBERS = {
    **{"epochs": 50, "lr": 0.025, "lr_min": 0.001, "lr_every": "epoch", "momentum": 0.9, "nesterov": False},
    **{"weight_decay": 3e-4, "batch": 64, "clip": 5.0, "augment": "none", "precision": "fp32"},
}


def test_the_recipe_has_dc_benchs_numbers() -> None:
    config = resolve_config(PUBLISHED)
    assert config.recipe.dump() == NUMBERS
    assert config.whole_recipe().epochs == 10
    assert config.space_options() == {"channels": 16, "num_cells": 1, "cell_affine": False}
    net = get_space("nasbench201").build(9930, (3, 32, 32), 10, seed=0)
    affine = [module.affine for module in net.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert affine.count(True) == 1 + 2 * 2 + 1, (
        "stem, two residual blocks, the last: DC-BENCH's cells have none"
    )


def test_a_cell_is_trained_as_by_torchs_own_scheduler() -> None:
    """DC-BENCH's loop, anew: CosineAnnealingLR stepped after each epoch, clipping, no augmentation."""
    recipe = NasRecipe.parse({**NUMBERS, "epochs": 4, "batch": 8})
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 4
    images = torch.randn(20, 3, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
    space = get_space("nasbench201", channels=4)
    ours, plain = (space.build(9930, (3, 16, 16), 4, seed=1) for _ in range(2))
    train_seeds([ours], (images, labels), recipe, seeds=[5], dsa=None)

    plain.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(plain.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4.0, eta_min=0.001)
    order, rates = derive(5, "nas", "order"), []
    for _ in range(4):
        for index in torch.randperm(20, generator=order).split(8):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.zero_grad()
            F.cross_entropy(plain(images[index]), labels[index]).backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), 5)
            optimizer.step()
        scheduler.step()
    assert [recipe.lr_at(step, 12) for step in range(12)] == pytest.approx(rates)
    for trained, expected in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)


def test_early_stopping_has_the_proxys_rates_and_the_whole_set_ten_of_its_own() -> None:
    recipe = NasRecipe.parse(NUMBERS)
    proxy_steps = recipe.num_steps(500)
    assert proxy_steps == 50 * 8
    rates = [recipe.lr_at(step, proxy_steps) for step in range(proxy_steps)]
    assert rates == [rates[8 * epoch] for epoch in range(50) for _ in range(8)]
    assert rates[8] == pytest.approx(0.001 + 0.012 * (1 + math.cos(math.pi / 50)))
    assert len(set(rates)) == 50
    assert "lr_every" not in NasRecipe().dump(), "keys of stored runs stay"


@pytest.fixture
def sweep(toy: Callable[..., Dataset]) -> Sweep:
    """A sweep of 2 cells with DC-BENCH's whole set beside it: 150 images are 3 batches of 64."""
    options = PUBLISHED.model_copy(update={"sample": 2, "val_images": 30, "seeds": 1})
    dataset, config = toy((60, 60, 60)), resolve_config(options)
    train, val = carve_val(dataset.train(), seed=0, fraction=30 / 180)
    proxies = baseline_proxies(["whole"], [], dataset, train, config, split=split_of(options))
    return Sweep(options, config, dataset, train, val, tuple(proxies), (1, 2), "cpu")


def test_the_whole_set_falls_through_ten_rates(sweep: Sweep) -> None:
    task = sweep.tasks(fused=False)[0]
    assert task.num_steps == 10 * 3
    trained, stored = NasRecipe.parse(task.recipe), NasRecipe.parse(task.units[0].spec["recipe"])
    rates = [trained.lr_at(step, 30) for step in range(30)]
    assert rates == [rates[3 * epoch] for epoch in range(10) for _ in range(3)]
    assert (len(set(rates)), stored.epochs) == (10, 50)


def test_rows_name_the_images_that_were_held_out(sweep: Sweep) -> None:
    assert torch.bincount(sweep.val.labels).tolist() == [10, 10, 10]
    assert {task.units[0].spec["split"] for task in sweep.tasks(fused=False)} == {"train-val0-30"}
    assert sweep.describe()["val_images"] == 30
    assert str(split_of(PUBLISHED)) == "train-val0-10000"
    assert SplitName.parse("train-val0-10000") == split_of(PUBLISHED)
    assert split_of(PUBLISHED).fraction(50_000) == 0.2


class Twelve:
    """A space of 12 architectures whose costs lie in the reverse order of their indices."""

    name = "twelve"

    def __len__(self) -> int:
        return 12

    def cost(self, index: int, image_shape: Any, num_classes: int) -> float:
        return 100.0 - index


def test_uniform_cells_are_any_with_equal_chances() -> None:
    shape: dict[str, Any] = {"image_shape": (3, 8, 8), "num_classes": 2}
    draws = [sample(Twelve(), 4, seed=seed, uniform=True, **shape) for seed in range(600)]  # type: ignore[arg-type]
    assert all(len(set(draw)) == 4 and draw == sorted(draw) for draw in draws)
    counts = np.bincount(np.concatenate(draws), minlength=12)
    # 600 draws of 4 in 12: 200 each, with a standard deviation of (600 / 3 * 2 / 3)^.5 = 11.5
    assert (abs(counts - 200) < 4 * 11.5).all(), counts
    pairs = sum(0 in draw and 1 in draw for draw in draws) / 600
    assert pairs == pytest.approx(4 * 3 / (12 * 11), abs=0.05), (
        "strata of 3 never give neighbours that share one"
    )
    cheap = sample(Twelve(), 3, seed=0, uniform=True, max_mflops=91, **shape)  # type: ignore[arg-type]
    assert cheap == [9, 10, 11]


def test_a_hundred_cells_are_drawn_whatever_the_images(toy: Callable[..., Dataset]) -> None:
    options, config = PUBLISHED, resolve_config(PUBLISHED)
    cells = choose_architectures(options, config, toy((4, 4)))
    assert len(set(cells)) == 100
    assert cells == choose_architectures(options, config, toy((4, 4, 4)))
    with pytest.raises(InputError, match="--sampling uniform needs --sample N"):
        NasOptions.parse({"sampling": "uniform"}, prefix="--")


def test_the_published_conditions_are_these() -> None:
    conditions = get_definition("nasbench201").published_options
    assert {name: getattr(PUBLISHED, name) for name in conditions} == conditions
