"""Boost-SSDD's outer step and the linear probe against plain implementations, in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import Split, normalized_space
from ddray.distillation.method import DistillContext
from ddray.evaluation.linear import embeddings, train_probe
from ddray.evaluation.protocol import EvalContext
from ddray.jobs.context import make_context, make_distiller
from ddray.jobs.plan import resolve
from ddray.nets import build_net
from ddray.pool.spec import PoolEntry, PoolSpec
from ddray.training.recipe import ProbeConfig
from tests.benchmarks.conftest import best_of, random_dataset

pytestmark = pytest.mark.benchmark

NUM_REAL = 2500


class UntrainedTeacher:
    """A pool with an untrained teacher, which is as fast as a trained one."""

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        (spec,) = specs
        net = build_net(spec.arch, spec.image_shape, spec.num_classes, seed=0)
        features = torch.randn(NUM_REAL, 512, generator=torch.Generator().manual_seed(0))
        weights = {f"weights.{name}": tensor for name, tensor in net.state_dict().items()}
        return [PoolEntry({"spec": spec.dump()}, {**weights, "features": features})]


def ready() -> tuple[Any, DistillContext]:
    """Return Boost-SSDD set up for CIFAR-100 at N=100, with a pool of two inner networks."""
    dataset = random_dataset(100, NUM_REAL // 100, name="cifar100")
    quick = {"steps": 100, "compile": "off", "method": {"pool_size": 2, "inner_steps_max": 1}}
    plan = resolve("boost_ssdd", dataset, budget=100, layers=[quick])
    ctx = make_context(plan, dataset.train(), split_name="train", device=torch.device("cpu"))
    ctx = replace(ctx, pool=UntrainedTeacher())
    distiller = make_distiller(plan)
    distiller.setup(ctx)
    return distiller, ctx


def plain_step(loop: Any, ctx: DistillContext, cached: Tensor | None = None) -> Callable[[], None]:
    """Return a naive step: the teacher on every batch, view by view, an explicit inverse.

    With `cached` representations of the real images the teacher is not run.
    """
    teacher = build_net("resnet18", (3, 32, 32), 1, seed=0).eval()
    net = build_net(ctx.arch, (3, 32, 32), 512, seed=1)
    inner = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    parameters = {name: p.detach().clone().requires_grad_() for name, p in loop.parameters.items()}
    outer = torch.optim.AdamW(parameters.values(), lr=1e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)

    def pairs() -> tuple[list[Tensor], Tensor]:
        small = (parameters["image_coefficients"] @ parameters["image_bases"].flatten(1)).view(-1, 3, 16, 16)
        images = F.interpolate(small, scale_factor=2, mode="bilinear")
        coefficients = torch.cat(
            [parameters["target_coefficients"][None], parameters["view_coefficients"]]
        ).flatten(0, 1)
        return [images.rot90(turn, (2, 3)) for turn in range(4)], coefficients @ parameters["target_bases"]

    def run() -> None:
        net.eval()
        index = torch.randperm(NUM_REAL, generator=generator)[:1024]
        real = ctx.space.encode(ctx.split.images[index])
        with torch.no_grad():
            targets = teacher.embed(real) if cached is None else cached[index]
            t = net.embed(real)
        views, y = pairs()
        s = torch.cat([net.embed(view) for view in views])
        s, t = (torch.cat([f, torch.ones(len(f), 1)], 1) for f in (s, t))
        gram = s @ s.T
        penalty = 1e-6 * gram.trace().detach()
        loss = F.mse_loss(t @ s.T @ torch.linalg.inv(gram + penalty * torch.eye(len(s))) @ y, targets)
        for p, gradient in zip(
            parameters.values(), torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            p.grad = gradient
        outer.step()
        net.train()
        with torch.no_grad():
            views, y = pairs()
        inner.zero_grad()
        F.mse_loss(net(torch.cat(views)), y).backward()
        inner.step()

    return run


@pytest.mark.slow  # near its bar, or a minute long: needs an otherwise idle machine
def test_outer_step_against_a_plain_one(figures: dict[str, Any]) -> None:
    """Bar: >= 2 times as fast on a CPU (m = 114, 4 views, 1,024 real images)."""
    distiller, ctx = ready()
    loop = distiller._engine
    assert loop.parameters["image_coefficients"].shape == (114, 200)
    # Every outer step trains an inner network for one step, as most outer steps of a run do.
    loop.inner.fill(loop._draw())
    for slot in loop.inner._slots:
        slot.trained = -(10**6)
    # The teacher dominates a plain step: the comparison with cached features shows the gain of the rest.
    loops = plain_step(loop, ctx), plain_step(loop, ctx, distiller.representations)
    ours, base, cached = best_of(distiller.step, *loops, rounds=3)
    figures.update({"plain_seconds": base, "ours_seconds": ours, "times_faster": base / ours})
    figures.update({"cached_seconds": cached, "times_faster_than_cached": cached / ours})
    assert base / ours >= 2.0, figures


@pytest.mark.slow  # near its bar, or a minute long: needs an otherwise idle machine
def test_linear_evaluation_of_one_backbone(figures: dict[str, Any]) -> None:
    """Bar: embeddings once, then the probe's 5,000 steps in <= 60 s for MNIST-sized targets."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (60_000, 1, 28, 28), generator=generator, dtype=torch.uint8)
    split = Split(images, torch.arange(60_000) % 10)
    dataset = replace(
        random_dataset(10, 1),
        image_shape=(1, 28, 28),
        mean=(0.13,),
        std=(0.31,),
        load_train=lambda: split,
        load_test=lambda: split,
    )
    ctx = EvalContext(dataset, split, normalized_space(dataset), torch.device("cpu"))
    net = build_net("convnet3_x2_bn", (1, 28, 28), 512, seed=0).eval()
    begin = time.perf_counter()
    some = embeddings(net, Split(split.images[:600], split.labels[:600]), ctx)
    per_image = (time.perf_counter() - begin) / 600
    features = some.repeat(100, 1)
    assert features.shape == (60_000, 8192)
    begin = time.perf_counter()
    train_probe(features, split.labels, 10, ProbeConfig(), torch.Generator().manual_seed(0))
    seconds = time.perf_counter() - begin
    figures.update({"probe_seconds": seconds, "embedding_seconds_per_image": per_image})
    assert seconds <= 60, seconds
