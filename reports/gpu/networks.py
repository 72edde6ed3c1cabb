"""Training many networks: the NAS grid and a set's evaluation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from ddray.artifact.distilled_set import TrainSet
from ddray.data import Dataset, PixelSpace
from ddray.evaluation.hard import Hard
from ddray.evaluation.protocol import EvalContext, evaluate_archs
from ddray.nets import Net, build_net
from ddray.ranking.options import NasRecipe
from ddray.ranking.spaces import get_space, sample
from ddray.ranking.training import Mode, train_seeds
from ddray.training.dsa import dsa_for
from ddray.training.embedding import score
from ddray.training.recipe import Recipe
from reports.gpu.lab import Figure, Figures, Lab, attempts, figure

_ARCHS = ("convnet3_bn", "convnet3", "convnet2_w32_nonorm_max", "convnet4_w64_gn")
_NEVER = 10**9  # steps from which a CUDA graph is worth it: none is captured
_GRAPH_THRESHOLD = "ddray.training.engine.WORTHWHILE_STEPS"


def nas(lab: Lab) -> Figures:
    """Train the seeds of architectures in a loop and as one, each eagerly and by CUDA graphs.

    The figures say how far weights are from those of the eager loop.
    """
    train_set = _encoded(lab, lab.pictures(), lab.size(500, 20))
    weights: dict[str, Tensor] = {}
    modes: tuple[Mode, ...] = ("loop", "fused")
    yield from attempts(
        {
            f"{arch} {mode} {kind}": partial(_trained, lab, train_set, arch, mode, kind == "graph", weights)
            for arch in (_ARCHS[:1] if lab.is_tiny else _ARCHS)
            for mode in modes
            for kind in ("eager", "graph")
        }
    )


def _trained(
    lab: Lab,
    train_set: tuple[Tensor, Tensor],
    arch: str,
    mode: Mode,
    graph: bool,
    weights: dict[str, Tensor],
) -> dict[str, Figure]:
    """Return the milliseconds per step and network, capture included; `weights` has the first way's."""
    steps, seeds = lab.size(300, 2), list(range(lab.size(5, 2)))
    recipe, dsa = NasRecipe(epochs=1, batch=lab.size(256, 8)), dsa_for(True)

    def fresh() -> list[Net]:
        return [build_net(arch, (3, 32, 32), 10, seed=seed, device=lab.device) for seed in seeds]

    if arch not in weights:
        train_seeds(fresh(), train_set, recipe, seeds=seeds, dsa=dsa, num_steps=2, mode="loop")  # warm up
    nets = fresh()
    with mock.patch(_GRAPH_THRESHOLD, 1 if graph and lab.on_gpu else _NEVER):
        lab.synchronize()
        begin = time.perf_counter()
        used = train_seeds(nets, train_set, recipe, seeds=seeds, dsa=dsa, num_steps=steps, mode=mode)
        lab.synchronize()
    each = 1000 * (time.perf_counter() - begin) / (steps * len(seeds))
    flat = torch.cat([param.detach().flatten() for net in nets for param in net.parameters()])
    difference = float((flat - weights.setdefault(arch, flat)).abs().max())
    return {"": figure(each, "ms per step and network", mode=used, weights_differ_by=difference)}


def evaluation(lab: Lab) -> Figures:
    """Train networks on sets of 10 and 50 images per class, one by one and as ddray does."""
    dataset = lab.pictures()
    sizes = (10,) if lab.is_tiny else (10, 50)
    yield from attempts({f"{ipc} per class": partial(_networks, lab, dataset, ipc) for ipc in sizes})


def _networks(lab: Lab, dataset: Dataset, ipc: int) -> dict[str, Figure]:
    split, space = dataset.train(), PixelSpace("normalized", dataset.mean, dataset.std)
    rows = slice(0, lab.size(10 * ipc, 20))
    train_set = TrainSet(space.encode(split.images[rows]), split.labels[rows])
    ctx = EvalContext(dataset, dataset.test(), space, lab.device)
    evaluator = Hard(Recipe(epochs=lab.size(100, 2)))
    arch, num = "convnet2_w8" if lab.is_tiny else "convnet3", lab.size(5, 2)

    def loop() -> None:
        for seed in range(num):
            evaluator.evaluate(train_set, ctx, arch=arch, seed=seed)

    def shipped() -> None:
        evaluate_archs(evaluator, train_set, ctx, archs=[arch], num_seeds=num)

    return {"one by one": _per_second(lab, loop, num), "as shipped": _per_second(lab, shipped, num)}


def _per_second(lab: Lab, work: Callable[[], None], num: int) -> Figure:
    rates = [num / seconds for seconds in lab.seconds(work, repeats=3)]
    return figure(statistics.fmean(rates), "networks per second", std=statistics.stdev(rates), n=len(rates))


def grid(lab: Lab) -> Figures:
    """Train a sample of the 720 ConvNets, one of each stratum of cost, and project the whole grid."""
    dataset, space = lab.pictures(), get_space("convnet720")
    train_set = _encoded(lab, dataset, lab.size(500, 20))
    val = _encoded(lab, dataset, lab.size(1000, 20))
    num, steps = lab.size(24, 2), lab.size(400, 1)
    indices = sample(
        space, num, seed=0, image_shape=(3, 32, 32), num_classes=10, max_mflops=5.0 if lab.is_tiny else None
    )
    recipe, seconds = NasRecipe(batch=lab.size(256, 8)), []
    for index in indices:
        lab.synchronize()
        begin = time.perf_counter()
        net: Net = space.build(index, (3, 32, 32), 10, seed=0, device=lab.device)
        mode = train_seeds([net], train_set, recipe, seeds=[0], dsa=dsa_for(True), num_steps=steps)
        score(net, *val, lambda part: part, lab.device)
        lab.synchronize()
        seconds.append(time.perf_counter() - begin)
        yield space.arch_name(index), figure(seconds[-1], "s", mode=mode)
        if len(seconds) > 1:
            minutes = [720 * each / 60 for each in seconds]
            spread = statistics.stdev(minutes)
            yield (
                "720 architectures, one seed, projected",
                figure(statistics.fmean(minutes), "minutes", std=spread, n=len(minutes), steps=steps),
            )


def _encoded(lab: Lab, dataset: Dataset, num: int) -> tuple[Tensor, Tensor]:
    """Return the first `num` images in normalised space, channels last, and labels, on the device."""
    split, space = dataset.train(), PixelSpace("normalized", dataset.mean, dataset.std)
    images = space.encode(split.images[:num]).to(lab.device)
    return images.contiguous(memory_format=torch.channels_last), split.labels[:num].to(lab.device)
