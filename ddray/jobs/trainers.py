"""Trains missing pool entries: supervised networks, their activations, experts, generators, D3HR's stages."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import torch
from torch import Tensor

from ddray.data import Dataset, PixelSpace, Split, SplitName, normalized_space
from ddray.data.packed import PackedImages, resident
from ddray.data.pixels import ENCODE_CHUNK
from ddray.errors import DivergedError, InputError, unknown
from ddray.methods.families import activations
from ddray.methods.families.generative import pool as generators
from ddray.methods.families.ssl import teacher as ssl
from ddray.nets import Net, build_net
from ddray.pool import trajectories
from ddray.pool.local import LocalPool
from ddray.pool.spec import FEATURES, PoolSpec
from ddray.seeding import derive, derive_seed
from ddray.system import numerics
from ddray.system.memory import peak_bytes, reset_peak
from ddray.system.transfer import to_device
from ddray.training.embedding import embed_images
from ddray.training.experts import ExpertRecipe, expert_images, train_expert
from ddray.training.loop import Augmenter, Checkpoints, Training, augmenter, train
from ddray.training.recipe import Recipe
from ddray.training.team import Team

_DIFFUSION_KINDS: Final = ("diffusion", "latents", "inverted", "statistics", "minimax")  # `StageTrainer`'s
_MAX_ENCODED: Final = 200 * 2**20  # bytes as floats up to which a split is encoded once, not by the batch


@dataclass(frozen=True)
class PoolTrainer:
    """Trains missing pool entries, dispatching on their kind.

    Attributes:
        dataset: names and statistics; specs of split `train` are trained on all of its train, supervised ones
            of `train-val<seed>` on that part of it.
        split: the real images for all other splits.
        device: where to compute.
        team: processes that train a supervised network together.
        checkpoints: where a team's training goes on from.
    """

    dataset: Dataset
    split: Split
    device: torch.device
    team: Team | None = None
    checkpoints: Checkpoints | None = None

    def __call__(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Return an entry's tensors and measurements.

        `peak_memory_bytes` are this process's, since the last of the entries that had to be trained for it.
        InputError if the kind is unknown, or the spec does not fit the images or this kind of device;
        DivergedError if a loss is NaN.
        """
        if spec.device != self.device.type:  # random weights differ between kinds of devices
            raise InputError(
                f"pool entry {spec.key[:12]} ({spec.kind}) must be trained on {spec.device}, this process "
                f"computes on {self.device.type}"
            )
        # Entries are shared: they do not depend on what their first user has set.
        with numerics.applied(device=self.device.type):
            reset_peak(self.device)
            tensors, measured = self._trained(spec)
            return tensors, {**measured, "peak_memory_bytes": peak_bytes(self.device)}

    def _trained(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        single_kinds = (
            "supervised",
            FEATURES,
            trajectories.KIND,
            ssl.KIND,
            activations.KIND,
            generators.KIND,
        )
        if spec.kind not in (kinds := (*single_kinds, *_DIFFUSION_KINDS)):
            raise unknown("kind of pool entry", spec.kind, kinds)
        if spec.kind == "supervised":
            return self._supervised(spec)
        if spec.kind == FEATURES:
            return self._features(spec)
        if spec.kind == trajectories.KIND:
            return self._expert(spec)
        if spec.kind == activations.KIND:
            part = SplitName.parse(spec.split)
            split = self.split if part is None else part.carve(self.dataset.train())[0]
            return activations.ActivationTrainer(self.dataset, split, self.device, LocalPool(self))(spec)
        split = self.dataset.train() if spec.split == "train" else self.split
        if spec.kind == ssl.KIND:
            return ssl.SslTrainer(split.images, self.device, self.dataset.name)(spec)
        if spec.kind == generators.KIND:
            return generators.train_generator(self.dataset, split, self.device, spec)
        from ddray.methods.families.diffusion.stages import StageTrainer

        return StageTrainer(self.dataset, split, self.device, LocalPool(self))(spec)

    def _supervised(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Return the weights of a network trained by `spec.recipe`, and its final loss."""
        split, _ = self._parts(spec)
        seed = derive_seed(spec.seed, "pool", spec.kind)
        net = build_net(spec.arch, spec.image_shape, spec.num_classes, seed=seed, device=self.device)
        recipe = Recipe.parse({"schedule": "constant", "augment": "none", **spec.recipe}, prefix="recipe.")
        recipe = recipe.on(split)
        loss = float(self._fit(net, split, recipe, derive(seed, "order")))
        if not math.isfinite(loss):
            raise DivergedError(f"training {spec.arch} for the pool diverged: its loss is {loss}; lower lr")
        weights = {f"weights.{name}": tensor for name, tensor in net.state_dict().items()}
        return weights, {"final_loss": loss, "dataset_name": self.dataset.name}

    def _features(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Return the features of a network of the pool: see `features_spec`."""
        split, unseen = self._parts(spec)
        (entry,) = LocalPool(self).get([PoolSpec.parse(spec.recipe["network"])])
        measured = {"dataset_name": self.dataset.name}
        if "features" in entry.tensors:  # of before they were entries of their own
            return {"features": entry.tensors["features"]}, measured
        net = cast(Net, entry.module()).to(self.device).to(memory_format=torch.channels_last)
        encode, others = normalized_space(self.dataset).encode, None if unseen is None else unseen.images
        features = embed_images(net, split.images, encode, self.device, more_images=others)
        return {"features": features}, measured

    def _parts(self, spec: PoolSpec) -> tuple[Split, Split | None]:
        """Return the images of a spec's split, and the val images that it leaves out."""
        part = SplitName.parse(spec.split)
        return (self.split, None) if part is None else part.carve(self.dataset.train())

    def _expert(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Return the snapshots of an expert trained by `spec.recipe`, and its final loss."""
        kind = trajectories.space_kind(spec)
        split, space = expert_images(kind, self.dataset, spec.split, self.split, self.device)
        recipe = ExpertRecipe.parse(spec.recipe, prefix="recipe.")
        seed = derive_seed(spec.seed, "pool", spec.kind)
        net = build_net(spec.arch, spec.image_shape, spec.num_classes, seed=seed, device=self.device)
        images, augment = self._images(split, recipe.supervised().on(split), space)
        labels, order = split.labels.to(self.device), derive(seed, "order")
        snapshots, loss = train_expert(net, images, labels, recipe, generator=order, augment=augment)
        measured = {"final_loss": loss, "parameters": trajectories.entry_shapes(net)}
        return trajectories.entry_tensors(snapshots, net), {**measured, "dataset_name": self.dataset.name}

    def _fit(self, net: Net, split: Split, recipe: Recipe, order: torch.Generator) -> Tensor:
        """Train a network, alone or as one of a team; return its final loss."""
        labels = split.labels.to(self.device)
        if self.team is None:
            images, augment = self._images(split, recipe, normalized_space(self.dataset))
            return train(net, images, labels, recipe, generator=order, augment=augment)
        space = normalized_space(self.dataset)
        augment = augmenter(
            recipe.augment, can_flip=self.dataset.can_flip, space=space, strategy=recipe.strategy
        )
        images = resident(split.images, self.device)
        training = Training(images, labels, recipe, augment, encode=self._encode(space), team=self.team)
        self.team.join(net)
        return training.run([net], [order], checkpoints=self.checkpoints)

    def _images(self, split: Split, recipe: Recipe, space: PixelSpace) -> tuple[Tensor, Augmenter | None]:
        """Return the training images and the transform of a batch; a large split is encoded by the batch.

        Whitening takes as long as a step of a small network: it is done once.
        """
        augment = augmenter(
            recipe.augment, can_flip=self.dataset.can_flip, space=space, strategy=recipe.strategy
        )
        encode = self._encode(space)
        if space.kind == "zca" and not isinstance(split.images, PackedImages):
            return torch.cat([encode(part) for part in torch.split(split.images, ENCODE_CHUNK)]), augment
        if 4 * split.images.numel() <= _MAX_ENCODED:
            return space.encode(split.images).to(self.device), augment

        def transform(batch: Tensor, generator: torch.Generator) -> Tensor:
            encoded = encode(batch)
            return encoded if augment is None else augment(encoded, generator)

        return resident(split.images, self.device), transform

    def _encode(self, space: PixelSpace) -> Callable[[Tensor], Tensor]:
        """Return what brings a batch as stored into a space, on the device."""
        space = space.to(self.device)

        def encode(batch: Tensor) -> Tensor:
            encoded = space.encode(to_device(batch, self.device))
            return encoded.contiguous(memory_format=torch.channels_last)

        return encode
