"""Statistics of a network's activations: watched in a forward pass, and of the real images as pool entries.

A pool entry of kind `activations` has a network's statistics on one epoch of real images, float64, under
`<layer>.<statistic>`: layers in the order of `modules()`, statistics in that of `statistics_of`. They are
means over batches, weighted by the batches' sizes (G-VBSM: a variance is the mean of the batches' variances);
of first and second moments that is the whole split's. Its parent is the network, whose spec its recipe has.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from ddray.config import Config
from ddray.data import Dataset, Split, normalized_space
from ddray.data.packed import resident
from ddray.errors import InputError
from ddray.pool.spec import ModelPool, PoolEntry, PoolSpec
from ddray.seeding import derive
from ddray.system.transfer import to_device
from ddray.training.crops import padded_crop, random_resized_crop

KIND: Final = "activations"
Statistic = Literal["channel", "patch", "covariance"]


class ActivationRecipe(Config):
    """What of a network's activations is measured, and on which views of the real images."""

    layers: Literal["convolutions", "norms"]
    """The inputs of convolutions, or the outputs of batch norms."""
    statistics: tuple[Statistic, ...] = Field(min_length=1)
    """`channel`: mean and variance of every channel; `patch`: of every place of a grid of patches;
    `covariance`: mean and second moments of the channels' means over each image's pixels."""
    patch: int = Field(default=4, ge=1)
    """Side of a patch in pixels of the map."""
    batch: int = Field(default=64, ge=1)
    """Real images per batch."""
    crop: Literal["none", "pad", "resized"] = "none"
    """Views: the images as they are; padded by `padding` and cropped, or resized crops; both mirrored."""
    padding: int = Field(default=0, ge=0)
    """Pixels of the padding."""


def watched_layers(net: nn.Module, layers: Literal["convolutions", "norms"]) -> list[nn.Module]:
    """Return a network's convolutions or batch norms, in the order of `modules()`."""
    kind = nn.Conv2d if layers == "convolutions" else nn.BatchNorm2d
    return [module for module in net.modules() if isinstance(module, kind)]


@contextmanager
def watching(
    layers: Sequence[nn.Module], note: Callable[[int, Tensor], None], *, outputs: bool = False
) -> Iterator[None]:
    """Call `note(index, maps)` with the input of each layer of the forward passes made inside.

    With `outputs`, with the output: a later layer may overwrite it, so `note` reduces it at once.
    """

    def before(index: int, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        note(index, inputs[0])

    def after(index: int, layer: nn.Module, inputs: Any, output: Tensor) -> None:
        note(index, output)

    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hook = partial(after if outputs else before, index)
            register = layer.register_forward_hook if outputs else layer.register_forward_pre_hook
            hooks.enter_context(register(hook))
        yield


def channel_statistics(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [C] of the channels of maps [N, C, H, W]."""
    return maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)


def patch_statistics(maps: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [P] of each place of a grid of patches of maps [N, C, H, W].

    A map is resized (bilinear) up to multiples of `side`; a place's statistics are over the batch, the
    channels and the patch's side x side pixels. Places are in rows.
    """
    rows, columns = (_stretch(size, side) for size in maps.shape[2:])
    maps = maps if rows is None else to_device(rows.to(maps.dtype), maps.device) @ maps
    maps = maps if columns is None else maps @ to_device(columns.to(maps.dtype), maps.device).T
    parts = torch.unflatten(torch.unflatten(maps, 2, (-1, side)), 4, (-1, side))  # [N, C, h, side, w, side]
    axes = (0, 1, 3, 5)
    return parts.mean(axes).flatten(), parts.var(axes, unbiased=False).flatten()


@lru_cache(maxsize=64)
def _stretch(size: int, side: int) -> Tensor | None:
    """Return the matrix [size', size] that resizes an axis to the next multiple of `side`; None: it is one.

    As `F.interpolate`, whose gradient on CUDA adds in any order. Float64, on the CPU.
    """
    target = side * -(-size // side)
    if target == size:
        return None
    eye = torch.eye(size, dtype=torch.float64)[None]
    return F.interpolate(eye, target, mode="linear", align_corners=False)[0].T.contiguous()


def moments(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean [C] and second moments [C, C], float64, of the channels' means over the pixels of maps."""
    rows = maps.mean((2, 3)).double()
    return rows.mean(0), rows.T @ rows / len(rows)


def covariance_of(mean: Tensor, second: Tensor) -> Tensor:
    """Return the biased covariance [C, C] of the moments of a distribution."""
    return second - mean[:, None] * mean


def statistics_of(maps: Tensor, recipe: ActivationRecipe) -> list[Tensor]:
    """Return the statistics of a layer's maps [N, C, H, W], two tensors for each kind that a recipe names."""
    compute: dict[Statistic, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
        "channel": channel_statistics,
        "patch": partial(patch_statistics, side=recipe.patch),
        "covariance": moments,
    }
    return [tensor for kind in recipe.statistics for tensor in compute[kind](maps)]


def view(
    images: Tensor,
    generator: torch.Generator,
    *,
    crop: Literal["none", "pad", "resized"],
    padding: int,
    fill: Tensor,
    flip: bool,
) -> Tensor:
    """Return a view of each image [N, C, H, W] by a draw of its own, as `ActivationRecipe.crop` says.

    `fill`, broadcast to [N, C, 1, 1], is what surrounds a padded image, `flip` whether views may be mirrored.
    """
    if crop == "none":
        return images
    if crop == "resized":
        return random_resized_crop(images, generator, flip=flip)
    return padded_crop(images, generator, padding=padding, fill=fill, flip=flip)


def entering(average: Tensor, statistic: Tensor) -> Tensor:
    """Return a tensor with the value of `average` and, with weight 1, the gradient of `statistic`."""
    return average.detach().clone() + (statistic - statistic.detach())


def update_average(average: Tensor, statistic: Tensor, decay: float) -> None:
    """Let a running average move, in place: E <- decay E + (1 - decay) s."""
    average.mul_(decay).add_(statistic.detach(), alpha=1 - decay)


@torch.no_grad()
def load_averages(averages: Sequence[Sequence[Tensor]], values: Sequence[Sequence[Tensor]]) -> None:
    """Copy stored values, a list for each layer, into running averages."""
    for layer, stored in zip(averages, values, strict=True):
        for average, value in zip(layer, stored, strict=True):
            average.copy_(value)


def activation_spec(network: PoolSpec, recipe: ActivationRecipe) -> PoolSpec:
    """Return the spec of the statistics of a pool network's activations on the split it was trained on."""
    fields = {"network": network.dump(), **recipe.dump()}
    return network.model_copy(update={"kind": KIND, "recipe": fields, "seed": 0, "parents": (network.key,)})


def layer_statistics(entry: PoolEntry, device: torch.device, dtype: torch.dtype) -> list[list[Tensor]]:
    """Return an entry's statistics, a list for each layer, on a device."""
    places = sorted(tuple(map(int, name.split("."))) for name in entry.tensors)
    layers: list[list[Tensor]] = [[] for _ in {layer for layer, _ in places}]
    for layer, number in places:
        layers[layer].append(to_device(entry.tensors[f"{layer}.{number}"].to(dtype), device))
    return layers


class WatchedNet:
    """A network with the real statistics of its layers, and running averages of the set's.

    Attributes:
        averages: a list for each layer, batch norms and convolutions in the order of `modules()`.
    """

    def __init__(self, net: nn.Module, entry: PoolEntry, recipe: ActivationRecipe, decay: float) -> None:
        self._net, self._recipe, self._decay = net, recipe, decay
        self._layers = [module for module in net.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))]
        parameter = next(net.parameters())
        convolutions = iter(layer_statistics(entry, parameter.device, parameter.dtype))
        self._real = [
            [*map(_buffer, (layer.running_mean, layer.running_var))]
            if isinstance(layer, nn.BatchNorm2d)
            else next(convolutions)
            for layer in self._layers
        ]
        self.averages = [[torch.zeros_like(value) for value in values] for values in self._real]

    def __call__(
        self, views: Tensor, generator: torch.Generator, skip: float = 0.0
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the logits of a batch [N, C, H, W], and the distance of each layer, 0 of those left out.

        Convolutions are left out with probability `skip`; their averages stay.
        """
        drawn = (torch.rand(len(self._layers), generator=generator) < skip).tolist()
        distances = [torch.zeros((), device=views.device) for _ in self._layers]

        def note(index: int, maps: Tensor) -> None:
            is_norm = isinstance(self._layers[index], nn.BatchNorm2d)
            if is_norm or not drawn[index]:
                batch = channel_statistics(maps) if is_norm else statistics_of(maps, self._recipe)
                distances[index] = self._distance(index, batch)

        with watching(self._layers, note):
            logits: Tensor = self._net(views)
        return logits, distances

    def _distance(self, index: int, batch: Sequence[Tensor]) -> Tensor:
        """Return the sum of ||real - entering||_2 over a layer's statistics; their averages move first."""
        total = torch.zeros((), device=batch[0].device, dtype=batch[0].dtype)
        for real, average, value in zip(self._real[index], self.averages[index], batch, strict=True):
            update_average(average, value, self._decay)
            total = total + (real - entering(average, value)).norm()
        return total


def _buffer(value: Tensor | None) -> Tensor:
    if value is None:
        raise InputError("teacher_archs must have batch norms with running statistics")
    return value


@dataclass(frozen=True)
class ActivationTrainer:
    """Measures the entries of kind `activations` on a split's real images; `pool` provides their networks."""

    dataset: Dataset
    split: Split
    device: torch.device
    pool: ModelPool

    def __call__(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Return the statistics to store, and the number of images that they are of.

        Raises:
            InputError: the network has no such layers.
        """
        fields = dict(spec.recipe)
        network = PoolSpec.parse(fields.pop("network"))
        recipe = ActivationRecipe.parse(fields, prefix="recipe.")
        net = self.pool.get([network])[0].module().to(self.device).to(memory_format=torch.channels_last)
        layers = watched_layers(net, recipe.layers)
        if not layers:
            raise InputError(f"arch must have {recipe.layers} for their activations, {spec.arch} has none")
        sums: dict[str, Tensor] = {}
        seen = [0] * len(layers)

        def note(index: int, maps: Tensor) -> None:
            seen[index] += len(maps)
            for number, tensor in enumerate(statistics_of(maps, recipe)):
                name, share = f"{index}.{number}", len(maps) / len(self.split)
                sums[name] = sums.get(name, torch.zeros_like(tensor.double())) + share * tensor.double()

        with torch.no_grad(), watching(layers, note, outputs=recipe.layers == "norms"):
            for batch in self._views(spec, recipe):
                net(batch)
        if set(seen) != {len(self.split)}:
            raise InputError(
                f"arch must use each of its {recipe.layers} once for their statistics, {spec.arch} does not"
            )
        return sums, {"num_images": len(self.split), "dataset_name": self.dataset.name}

    def _views(self, spec: PoolSpec, recipe: ActivationRecipe) -> Iterator[Tensor]:
        """Yield one epoch of views [n, C, H, W] of the real images, in random order."""
        generator = derive(spec.seed, "pool", KIND)
        images, space = resident(self.split.images, self.device), normalized_space(self.dataset)
        blank = torch.zeros(1, self.dataset.image_shape[0], 1, 1)
        fill = to_device(space.encode(blank), self.device)
        order = torch.randperm(len(self.split), generator=generator)
        for index in torch.split(order, recipe.batch):
            batch = space.encode(to_device(images[to_device(index, images.device)], self.device))
            views = view(
                batch,
                generator,
                crop=recipe.crop,
                padding=recipe.padding,
                fill=fill,
                flip=self.dataset.can_flip,
            )
            yield views.contiguous(memory_format=torch.channels_last)
