"""D3HR: taming diffusion for dataset distillation with high representativeness (Zhao et al., ICML 2025).

Algorithm 1: real images are encoded and taken up to level T by DDIM inversion (Eq 3); a class's latents there
are one Gaussian (Sec 4.3); of many groups of `ipc` draws from it the most representative one is chosen (Sec
4.4, Eq 5-9), taken down by DDIM (Eq 2) and decoded. The generator, the latents, their inversion and the
statistics are pool entries; a run itself does group sampling, class by class, and decoding in batches.

**Deviations** (paper | authors' code | ours)

- Eq 3 as printed has alpha_(t+1) where its root is meant | the root | the root (DDIMInverseScheduler).
- level: 31 steps of 50 up and down | inverted to timestep 600, sampled from 620 | both at 600.
- guidance: not given | 4, null label K | the same (DiTPipeline's own call takes 1000 whatever K is). With 4,
  inversion and sampling are not each other's inverse; with 1 they are, up to the step size.
- posterior: the latent | one sample | `paper` the mode, `repo` a sample.
- inversion: Eq 3, whose noise is predicted from the latent before the step | the same | the same; with
  `fixed_point` iterations, from the latent after it, so that a DDIM step leads back.
- score: Eq 5-8, squared, summed over dimensions, weights 1:1:.5 | norms of the mean and unbiased deviation
  errors plus .1 of a skewness | by preset.
- skewness: Eq 8, of each dimension over the ipc latents of the group, about the class's mean and in its
  deviations | each dimension is standardised over the group's latents, the cubes are summed over the
  dimensions, with n = D in the factor: a number per latent | by preset.
- candidates: m = 1e5 ImageNet, 1e6 Tiny-ImageNet, 5e6 CIFAR | 1,000 m, the same draws for every class | by
  preset, at any resolution; datasets that the paper does not use take m of the one of their size (up to 32
  px, up to 64, above).
- terms that ipc leaves undefined (skewness below 3; in the code's form deviation and skewness at 1: NaN) are
  dropped.
- generator: DiT-XL/2, fine-tuned 400 epochs per dataset | - | any DiTPipeline folder, or one trained here.
- preset `d4m` is in the style of D4M (Su et al., CVPR 2024) and reproduces none of its numbers: centres of
  mini-batch k-means on a class's latents, noised to 35 of 50 steps and denoised with guidance 8. D4M: Stable
  Diffusion 1.5 at 512 px, the class's name and a negative prompt as text, latents left over by the last
  mini-batch used for the last class alone | the generator above at the data's resolution, its class label for
  text, all latents.
- soft labels (`evaluate --protocol soft`): Table A1 | half a cosine, CutMix, other rates and batches | recipe
  `paper` or `repo`, by preset.
"""

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.distillation.method import DistillContext, Target
from ddray.distillation.shards import parts_of
from ddray.methods.families.diffusion import stages
from ddray.methods.families.diffusion.decoder import STATISTICS, D3HRConfig, Sampler
from ddray.methods.families.diffusion.groups import group_sample, group_scores
from ddray.methods.families.diffusion.model import check_levels
from ddray.methods.families.diffusion.source import resolve_source
from ddray.methods.families.diffusion.train import default_recipe
from ddray.methods.families.factory import make_method
from ddray.methods.families.selection import centroids, minibatch_centroids
from ddray.methods.families.state import cpu_copy
from ddray.pool.spec import PoolSpec
from ddray.seeding import derive_seed
from ddray.system.transfer import to_device

__all__ = ["METHOD", "D3HRConfig", "group_sample", "group_scores"]

_WRITTEN_PER_STEP: Final = 32 * 2**20
# m by dataset (Appendix B).
_CANDIDATES: Final = {"imagenet": 10**5, "tiny_imagenet": 10**6, "cifar10": 5 * 10**6, "cifar100": 5 * 10**6}


def preset(name: str, target: Target) -> dict[str, Any]:
    """Return the settings of `paper` (Appendix B) or `repo` (authors' code)."""
    size = max(target.image_shape[1:])
    similar = "cifar10" if size <= 32 else "tiny_imagenet" if size <= 64 else "imagenet"
    candidates = _CANDIDATES.get(target.dataset, _CANDIDATES[similar])
    method: dict[str, Any] = {"num_candidates": candidates, "generator": default_recipe(target.image_shape)}
    if name == "repo":
        method |= {
            "num_candidates": 1000 * candidates,
            "shared_draws": True,
            "form": "repo",
            "lambda_skew": 0.1,
            "encoding": "sample",
            "precision": "float16",
        }
    evaluate = {"epochs": 1000, "augment": "dsa"}
    # A checkpoint holds all results so far: limit writes to 32 MiB per step on average.
    floats = 2 * target.ipc * target.num_classes * math.prod(target.image_shape)
    every = max(1, math.ceil(4 * floats / _WRITTEN_PER_STEP))
    return {"steps": 0, "checkpoint_every": every, "evaluate": evaluate, "method": method}


def plan_stages(ctx: DistillContext, config: D3HRConfig) -> tuple[Mapping[str, Any], list[PoolSpec]]:
    """Return where the generator comes from, and the specs of latents, inversion and statistics.

    K-means needs only the clean latents, so theirs is then the only spec. Everything that depends on the
    generator is checked here, before anything is computed.

    Raises:
        InputError: the given folder can't be read, or does not fit images, classes or steps.
    """
    source = resolve_source(ctx, config)
    check_levels(config.levels(), source.num_train_timesteps)
    base = stages.base_spec(ctx.dataset, ctx.split_name, ctx.device)
    latents = stages.latents_spec(base, source.recipe, encoding=config.encoding, precision=config.precision)
    if config.sampling == "kmeans":
        return source.recipe, [latents]
    inverted = stages.inverted_spec(latents, config.levels(), mapping=config.mapping, ids=source.ids)
    return source.recipe, [latents, inverted, stages.statistics_spec(inverted)]


def pool_specs(ctx: DistillContext, config: D3HRConfig) -> list[PoolSpec]:
    """Return the last stage needed, whose spec contains every stage before it, and a generator to sample."""
    source, specs = plan_stages(ctx, config)
    samples = "spec" in source and config.store == "images"
    return [*([PoolSpec.parse(source["spec"])] if samples else []), specs[-1]]


class D3HR:
    """Group sampling of inverted latents; the pool computes and stores missing earlier stages."""

    def __init__(self, ctx: DistillContext, config: D3HRConfig) -> None:
        self._ctx, self._config = ctx, config
        self._source, specs = plan_stages(ctx, config)
        self._fingerprint = specs[0].parents[0]
        tensors = ctx.pool.get([specs[-1]])[0].tensors
        trained = [PoolSpec.parse(self._source["spec"])] if "spec" in self._source else []
        stages.forget_parts([*trained, *specs])
        num_classes, batch = ctx.dataset.num_classes, config.batch
        if config.sampling == "kmeans":
            self._clean = tensors["latents"]
            mean, variance = stages.class_statistics(self._clean, ctx.whole.labels, num_classes)
        else:
            mean, variance = tensors["mean"].clone(), tensors["variance"].clone()
        self._statistics = {"mean": mean, "variance": variance}
        self._labels = torch.arange(ctx.classes.start, ctx.classes.stop).repeat_interleave(ctx.ipc)
        present = slice(ctx.classes.start * ctx.ipc, ctx.classes.stop * ctx.ipc)
        total = num_classes * ctx.ipc
        batches = (slice(start, min(total, start + batch)) for start in range(0, total, batch))
        # The networks' bits depend on how many images are decoded together.
        self._batches = list(parts_of(batches, present, exact=True))
        # Images stay on the CPU: a batch of them waits for the device once, after its many passes.
        self._images = torch.zeros(len(self._labels), *ctx.dataset.image_shape)
        self._latents = torch.zeros(len(self._labels), mean.shape[1], device=ctx.device)
        self._score = torch.zeros((), device=ctx.device)
        self._space = ctx.space.to(ctx.device)
        self._step = self.num_steps = 0
        self._sampling_s: list[float] = []
        if config.store == "statistics":
            return
        self.num_steps = len(ctx.classes) + len(self._batches)
        self._sampler = Sampler(
            **self._statistics,
            model=stages.load_generator(self._source, ctx.pool),
            config=config,
            class_names=ctx.dataset.class_names,
            seed=ctx.seed,
            device=ctx.device,
        )

    def step(self) -> dict[str, Tensor]:
        """Choose a class's latents, or sample and decode a batch of images."""
        num_classes = len(self._ctx.classes)
        if self._step < num_classes:
            begin = time.perf_counter()
            self._choose(self._step)
            self._sampling_s.append(time.perf_counter() - begin)
        else:
            self._decode(self._step - num_classes)
        self._step += 1
        return {"loss": self._score.clone()}

    def _choose(self, position: int) -> None:
        """Choose the latents of a class; the loss is its score per dimension, averaged over classes."""
        ctx, config, label = self._ctx, self._config, self._ctx.classes[position]
        rows = slice(position * ctx.ipc, (position + 1) * ctx.ipc)
        if config.sampling == "kmeans":  # centres of the class's clean latents, with noise of level T (D4M)
            class_latents = self._clean[ctx.whole.labels == label]
            seed, batch = derive_seed(ctx.seed, "distill", "centres", label), config.km_expand * ctx.ipc
            if batch:
                centres = minibatch_centroids(class_latents, ctx.ipc, seed, batch=batch)
            else:
                centres = centroids(class_latents, ctx.ipc, seed)
            centres = centres[torch.arange(ctx.ipc) % len(centres)]  # the noise tells copies apart
            noise = torch.randn(centres.shape, generator=ctx.generator("noise", label))
            noisy = self._sampler.model.add_noise(centres, noise, config.levels())
            self._latents[rows] = to_device(noisy, ctx.device)
        else:
            self._latents[rows], score = self._sampler.choose(label, ctx.ipc)
            self._score = (self._score * position + score) / (position + 1)

    @property
    def measures(self) -> dict[str, float]:
        """Mean seconds per class of choosing its latents (Tables A2-A4); a set of statistics' full storage.

        The seconds are of the classes that this process chose. The full storage is in floats, with the
        generator's networks, which such a set needs before it can be trained on (Fig A2).
        """
        measured: dict[str, float] = {}
        if self._sampling_s:
            measured["sampling_seconds_per_class"] = statistics.fmean(self._sampling_s)
        num_weights = stages.generator_floats(self._fingerprint)
        if self._config.store == "statistics" and num_weights is not None:
            floats = sum(tensor.numel() for tensor in self._statistics.values())
            measured["storage_with_generator_floats"] = floats + num_weights
        return measured

    def _decode(self, batch_index: int) -> None:
        """Sample and decode a batch of the chosen latents."""
        ctx, part = self._ctx, self._batches[batch_index]
        latents, labels = part.padded(self._latents[part.here]), part.padded(self._labels[part.here])
        pixels = self._sampler.decode(latents, labels, ctx.dataset.image_shape)
        self._images[part.here] = part.without_blanks(self._space.encode(pixels)).cpu()

    def snapshot(self) -> DistilledSet:
        """Return the set: its images (blank if not decoded yet) or its statistics."""
        distilled = self._ctx.make_set(self._images, self._labels)
        meta = distilled.meta.model_copy(update={"generator": self._fingerprint})
        if self._config.store == "images":
            return replace(distilled, meta=meta)
        floats = sum(tensor.numel() for tensor in self._statistics.values())
        meta = meta.model_copy(update={"decoder": "d3hr", "storage_floats": floats})
        images, labels = distilled.images[:0], distilled.labels[:0]
        return replace(distilled, images=images, labels=labels, meta=meta, compact=cpu_copy(self._statistics))

    def state_dict(self) -> dict[str, Any]:
        """Return the decoded images and the chosen latents still to be decoded, without blanks."""
        num_chosen, num_decoded = self._counts()
        return {
            "step": self._step,
            "latents": cpu_copy(self._latents[num_decoded:num_chosen]),
            "images": cpu_copy(self._images[:num_decoded]),
            "score": cpu_copy(self._score),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = int(state["step"])
        num_chosen, num_decoded = self._counts()
        self._latents[num_decoded:num_chosen] = state["latents"]
        self._images[:num_decoded] = state["images"]
        self._score = state["score"].to(self._ctx.device, copy=True)

    def _counts(self) -> tuple[int, int]:
        """Return how many latents are chosen, and how many of them are decoded."""
        num_classes = len(self._ctx.classes)
        decoded = self._batches[: max(0, self._step - num_classes)]
        num_chosen = min(self._step, num_classes) * self._ctx.ipc
        return num_chosen, decoded[-1].here.stop if decoded else 0


def coupling_of(config: D3HRConfig, arch: str) -> str | None:
    """Return why there is nothing to shard: a set of statistics is that of the pool, without any step."""
    return "store=statistics stores what the pool has, in no step" if config.store == "statistics" else None


METHOD: Final = make_method(
    D3HRConfig, preset, D3HR, specs_of=pool_specs, has_steps=False, coupling=coupling_of
)
DECODER: Final = STATISTICS
