"""Training the architectures of a NAS space by the engine.

On CUDA, the seeds of one architecture are trained as one network where a probe shows that this is faster.
Never on a CPU: 8 fused ConvNets took twice the time of a loop (docs/ray.md, 17).
"""

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.nets import Net, training_format
from ddray.ranking.options import NasRecipe
from ddray.seeding import derive
from ddray.training.dsa import Dsa, DsaPlan
from ddray.training.engine import Batch, Order, Rule, Step, run

log = logging.getLogger(__name__)

Mode = Literal["auto", "loop", "fused"]
_PROBE_STEPS = 6


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
    rule = Rule(F.cross_entropy, optimizer, recipe.clip, bf16=recipe.precision == "bf16")
    order = Order(len(labels), recipe.batch, shuffle=shuffle)

    def fit(trained: Sequence[Net], seeds: Sequence[int], fused: bool, steps: int) -> bool:
        """Do the first `steps` of the training; return whether CUDA graphs did them."""
        step = Step(trained, rule, fused=fused, num_steps=total)
        batches = _batches(images, labels, order, seeds, dsa)
        run(step, islice(batches, steps), lr=partial(recipe.lr_at, num_steps=total))
        step.finish()
        return step.captured

    for net in nets:
        net.to(memory_format=training_format(net, images.device)).train()
    fused = mode == "fused"
    if mode == "auto" and len(nets) > 1 and images.device.type == "cuda":
        fused = _fusing_pays(nets, seeds, partial(fit, steps=min(_PROBE_STEPS, total)))
    if fused:
        captured = fit(nets, seeds, True, total)
    else:
        captured = min([fit([net], [seed], False, total) for net, seed in zip(nets, seeds, strict=True)])
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


def _fusing_pays(
    nets: Sequence[Net], seeds: Sequence[int], fit: Callable[[Sequence[Net], Sequence[int], bool], object]
) -> bool:
    """Return whether fusing is faster, by timing a few steps both ways on copies of the networks."""

    def seconds(num: int, fused: bool) -> float:
        copies = copy.deepcopy(nets[:num])
        torch.cuda.synchronize()
        begin = time.perf_counter()
        fit(copies, seeds[:num], fused)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    try:
        fused = seconds(len(nets), fused=True)
    except RuntimeError as error:  # an operation that can't be vmapped
        log.info("seeds are not fused (%s)", str(error).splitlines()[0])
        return False
    return fused < seconds(1, fused=False) * len(nets)
