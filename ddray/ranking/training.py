"""Training the architectures of a NAS space by the engine.

On CUDA, the seeds of one architecture are trained as one network where a probe shows that this is faster.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.nets import Net, training_format
from ddray.ranking.options import NasRecipe
from ddray.seeding import derive
from ddray.system.numerics import current
from ddray.training.dsa import Dsa, DsaPlan
from ddray.training.engine import Batch, Order, Rule, Step, run
from ddray.training.fusing import PROBE_STEPS, fusing_pays

Mode = Literal["auto", "loop", "fused"]


def train_seeds(
    nets: Sequence[Net],
    train_set: tuple[Tensor, Tensor],
    recipe: NasRecipe,
    *,
    seeds: Sequence[int],
    dsa: Dsa | None,
    num_steps: int | None = None,
    shuffle: bool = True,
    mode: Mode = "auto",
) -> str:
    """Train networks of one architecture with different weights in place; they end in eval mode.

    `train_set` is images, float32 [N, C, H, W] in channels_last, and labels, int64 [N] or soft [N, K], on the
    networks' device. `seeds`, one per network, determine batch order and augmentation (`dsa` None: there is
    none). `num_steps` defaults to the recipe's epochs. `shuffle` False reproduces an unshuffled loader
    (`--compat dcbench`). `mode`: `loop` one network after another, `fused` all at once, `auto` by a probe on
    CUDA, else `loop`. The mode taken is returned, with `+graph` where a CUDA graph ran.
    """
    images, labels = train_set
    total = num_steps or recipe.num_steps(len(labels))
    settings: dict[str, Any] = {"momentum": recipe.momentum, "weight_decay": recipe.weight_decay}
    optimizer = partial(torch.optim.SGD, **settings, nesterov=recipe.nesterov and recipe.momentum > 0)
    rule = Rule(F.cross_entropy, optimizer, recipe.clip)
    order, rate = Order(len(labels), recipe.batch, shuffle=shuffle), partial(recipe.lr_at, num_steps=total)
    device, bf16 = images.device, current().precision == "bf16"

    def fit(trained: Sequence[Net], fused: bool, seeds: Sequence[int], steps: int) -> bool:
        """Do the first `steps` of the training; return whether CUDA graphs did them."""
        form = training_format(trained[0], device, fused=fused, bf16=bf16)
        for net in trained:
            net.to(memory_format=form).train()
        step = Step(trained, rule, fused=fused, num_steps=total)
        formed = images if device.type == "cpu" else images.contiguous(memory_format=form)
        run(step, islice(_batches(formed, labels, order, seeds, dsa), steps), lr=rate)
        step.finish()
        return step.captured

    fused = mode == "fused"
    if mode == "auto" and len(nets) > 1 and device.type == "cuda":
        fused = fusing_pays(nets, lambda nets, fused: fit(nets, fused, seeds[: len(nets)], PROBE_STEPS))
    if fused:
        captured = fit(nets, True, seeds, total)
    else:
        captured = min([fit([net], False, [seed], total) for net, seed in zip(nets, seeds, strict=True)])
    for net in nets:
        net.to(memory_format=torch.channels_last).eval()
    return ("fused" if fused else "loop") + ("+graph" if captured else "")


def _batches(
    images: Tensor, labels: Tensor, order: Order, seeds: Sequence[int], dsa: Dsa | None
) -> Iterator[Batch]:
    """Yield images [S * B, C, H, W] and labels for networks of S seeds, each with its own order and draws."""
    orders = [order.indices(derive(seed, "nas", "order"), images.device) for seed in seeds]
    generators = [derive(seed, "nas", "augment") for seed in seeds]
    for rows in zip(*orders, strict=True):
        index = torch.cat(rows)
        batch = images.index_select(0, index)
        if dsa is not None:
            plans = [dsa.draw(len(rows[0]), generator, shared_op=True) for generator in generators]
            choices = torch.cat([plan.choices for plan in plans])
            batch = dsa.apply(batch, DsaPlan(choices, torch.cat([plan.params for plan in plans])))
        yield batch, labels.index_select(0, index)
