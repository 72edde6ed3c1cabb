"""Convolutional generators, discriminators and encoders: residual blocks as BigGAN's, and small plain ones.

Weights start from N(0, .02) in all of them. Images are in [-1, 1]; a generator makes squares of 4 * 2^n
pixels and returns their middle.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import is_parametrized

_BASE: Final = 4  # side that generators start from
_INIT: Final = 0.02
_SETTLING: Final = 30  # power iterations

Shape = tuple[int, int, int]


def _ready(layer: nn.Module, *, spectral: bool) -> nn.Module:
    """Return a layer with its initial weights, spectrally normalised or not."""
    nn.init.normal_(layer.weight, std=_INIT)  # type: ignore[arg-type]
    return spectral_norm(layer) if spectral else layer


def _conv(channels: int, outputs: int, side: int = 3, *, spectral: bool) -> nn.Module:
    return _ready(nn.Conv2d(channels, outputs, side, padding=side // 2), spectral=spectral)


def _linear(inputs: int, outputs: int, *, spectral: bool) -> nn.Module:
    return _ready(nn.Linear(inputs, outputs), spectral=spectral)


def _embedding(num: int, dim: int, *, spectral: bool) -> nn.Module:
    return _ready(nn.Embedding(num, dim), spectral=spectral)


@torch.no_grad()
def folded_state(net: nn.Module, samples: Sequence[tuple[Tensor, Tensor]] = ()) -> dict[str, Tensor]:
    """Return a network's state with its spectral norms as part of plain weights, for one without them.

    Averaged weights have no singular vectors of their own: power iterations find them first. Batches of
    `samples`, noise [N, d] and labels [N], give batch norms their means and variances; without any, these
    are what training has left. The network is left in eval mode.
    """
    layers = {name: part for name, part in net.train().named_modules() if is_parametrized(part, "weight")}
    for layer in layers.values():
        for _ in range(_SETTLING):
            layer.weight  # noqa: B018 - each reading is an iteration
    if samples:
        for norm in (part for part in net.modules() if isinstance(part, nn.BatchNorm2d)):
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
    for noise, labels in samples:
        net(noise, labels)
    net.eval()
    state = {name: value for name, value in net.state_dict().items() if "parametrizations." not in name}
    return state | {f"{name}.weight": layer.weight.detach().clone() for name, layer in layers.items()}


def halvings(shape: Shape) -> int:
    """Return n >= 1, with which 4 * 2^n pixels cover the longer side of `shape` (C, H, W)."""
    return max(1, math.ceil(math.log2(max(shape[1:]) / _BASE)))


def middle(images: Tensor, shape: Shape) -> Tensor:
    """Return the middle of square images, of the size of `shape` (C, H, W)."""
    top, left = ((images.shape[axis] - shape[axis - 1]) // 2 for axis in (2, 3))
    return images[:, :, top : top + shape[1], left : left + shape[2]]


class ConditionalNorm(nn.Module):
    """Batch norm whose gain and bias are the class's: (1 + gain_y) x^ + bias_y."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.gain = _embedding(num_classes, channels, spectral=False)
        self.bias = _embedding(num_classes, channels, spectral=False)

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        gain, bias = (layer(labels)[:, :, None, None] for layer in (self.gain, self.bias))
        result: Tensor = self.norm(maps) * (1 + gain) + bias
        return result


class UpBlock(nn.Module):
    """A generator's residual block, which doubles the side."""

    def __init__(self, channels: int, outputs: int, num_classes: int, *, spectral: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList([ConditionalNorm(n, num_classes) for n in (channels, outputs)])
        self.first = _conv(channels, outputs, spectral=spectral)
        self.second = _conv(outputs, outputs, spectral=spectral)
        self.skip = _conv(channels, outputs, 1, spectral=spectral)

    def forward(self, maps: Tensor, labels: Tensor) -> Tensor:
        inner = self.first(_doubled(F.relu(self.norms[0](maps, labels))))
        inner = self.second(F.relu(self.norms[1](inner, labels)))
        result: Tensor = inner + _doubled(self.skip(maps))  # a 1x1 convolution commutes with it
        return result


def _doubled(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2, mode="nearest")


class DownBlock(nn.Module):
    """A residual block without norm, which halves the side or keeps it; the first one begins without ReLU."""

    def __init__(self, channels: int, outputs: int, *, halves: bool, is_first: bool, spectral: bool) -> None:
        super().__init__()
        self._is_first, self._halves = is_first, halves
        self.first = _conv(channels, outputs, spectral=spectral)
        self.second = _conv(outputs, outputs, spectral=spectral)
        has_skip = halves or channels != outputs
        self.skip = _conv(channels, outputs, 1, spectral=spectral) if has_skip else nn.Identity()

    def forward(self, maps: Tensor) -> Tensor:
        inner = self.second(F.relu(self.first(maps if self._is_first else F.relu(maps))))
        result: Tensor = inner + self.skip(maps)
        return F.avg_pool2d(result, 2) if self._halves else result


class Trunk(nn.Module):
    """Residual blocks down to about 8 x 8 pixels, then two more; as BigGAN's discriminator of CIFAR-10.

    Returns the maps after the first block and the features [N, channels], summed over places.
    """

    def __init__(self, shape: Shape, width: int, *, spectral: bool) -> None:
        super().__init__()
        self.channels = 4 * width
        num = halvings(shape)
        self.blocks = nn.ModuleList(
            DownBlock(
                self.channels if index else shape[0],
                self.channels,
                halves=index < num - 1,
                is_first=index == 0,
                spectral=spectral,
            )
            for index in range(num + 1)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        first = maps = self.blocks[0](images)
        for block in list(self.blocks)[1:]:
            maps = block(maps)
        return first, F.relu(maps).sum((2, 3))


class ProjectionHead(nn.Module):
    """The logit of features and a class: a linear one plus <embedding of the class, features>."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = _linear(channels, 1, spectral=True)
        self.embedding = _embedding(num_classes, channels, spectral=True)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = self.linear(features)[:, 0] + (self.embedding(labels) * features).sum(1)
        return result


class ResidualDiscriminator(nn.Module):
    """Trunk and projection head, all of their weights spectrally normalised: logits [N]."""

    def __init__(self, shape: Shape, num_classes: int, width: int) -> None:
        super().__init__()
        self.trunk = Trunk(shape, width, spectral=True)
        self.head = ProjectionHead(self.trunk.channels, num_classes)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        logits: Tensor = self.head(self.trunk(images)[1], labels)
        return logits


class ResidualGenerator(nn.Module):
    """Noise [N, d] and labels [N] to images [N, C, H, W], by blocks with conditional batch norm."""

    def __init__(self, shape: Shape, num_classes: int, *, width: int, noise_dim: int, spectral: bool) -> None:
        super().__init__()
        self._shape, self._channels = shape, 4 * width
        self.linear = _linear(noise_dim, self._channels * _BASE**2, spectral=spectral)
        self.blocks = nn.ModuleList(
            UpBlock(self._channels, self._channels, num_classes, spectral=spectral)
            for _ in range(halvings(shape))
        )
        self.norm = nn.BatchNorm2d(self._channels)
        self.last = _conv(self._channels, shape[0], spectral=spectral)

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        maps = self.linear(noise).view(-1, self._channels, _BASE, _BASE)
        maps = maps.contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            maps = block(maps, labels)
        return middle(torch.tanh(self.last(F.relu(self.norm(maps)))), self._shape)


class Encoder(nn.Module):
    """Images to mean and logarithm of the variance [N, d] of their latent units."""

    def __init__(self, shape: Shape, width: int, noise_dim: int) -> None:
        super().__init__()
        self.trunk = Trunk(shape, width, spectral=False)
        self.last = _linear(self.trunk.channels, 2 * noise_dim, spectral=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = self.last(self.trunk(images)[1]).chunk(2, dim=1)
        return mean, log_variance


class PlainGenerator(nn.Module):
    """Noise and one-hot labels to images in [-1, 1], by two transposed convolutions (DCGAN's layers)."""

    def __init__(self, shape: Shape, num_classes: int, *, width: int, noise_dim: int) -> None:
        super().__init__()
        self._shape, self._num_classes = shape, num_classes
        self._side, self._width = math.ceil(max(shape[1:]) / 4), width
        self.linear = _linear(noise_dim + num_classes, width * self._side**2, spectral=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(width), nn.BatchNorm2d(width // 2)])
        first, last = (
            nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
            for inputs, outputs in ((width, width // 2), (width // 2, shape[0]))
        )
        self.first, self.last = (_ready(layer, spectral=False) for layer in (first, last))

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        inputs = torch.cat([noise, F.one_hot(labels, self._num_classes).to(noise.dtype)], 1)
        maps = self.linear(inputs).view(-1, self._width, self._side, self._side)
        maps = self.first(F.relu(self.norms[0](maps.contiguous(memory_format=torch.channels_last))))
        return middle(torch.tanh(self.last(F.relu(self.norms[1](maps)))), self._shape)


class PlainDiscriminator(nn.Module):
    """Images and a map for every class, 1 in that of the label, to logits [N]; two strided convolutions."""

    def __init__(self, shape: Shape, num_classes: int, width: int) -> None:
        super().__init__()
        self._num_classes = num_classes
        activation: Callable[[], nn.Module] = lambda: nn.LeakyReLU(0.2)  # noqa: E731
        first = nn.Conv2d(shape[0] + num_classes, width // 2, 4, stride=2, padding=1)
        second = nn.Conv2d(width // 2, width, 4, stride=2, padding=1)
        rows, columns = (side // 4 for side in shape[1:])
        self.layers = nn.Sequential(
            *(_ready(first, spectral=False), activation()),
            *(_ready(second, spectral=False), nn.BatchNorm2d(width), activation()),
            *(nn.Flatten(), _linear(width * rows * columns, 1, spectral=False)),
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        classes = F.one_hot(labels, self._num_classes).to(images.dtype)[:, :, None, None]
        maps = torch.cat([images, classes.expand(-1, -1, *images.shape[2:])], 1)
        logits: Tensor = self.layers(maps.contiguous(memory_format=torch.channels_last))[:, 0]
        return logits


class ClassPerceptrons(nn.Module):
    """A perceptron for each of K classes: uniform noise to pixels in [0, 1] by ReLUs and a sigmoid.

    Args:
        shape: (C, H, W) of the images.
        num_classes: K.
        noise_dim: inputs.
        hidden: widths of the hidden layers.
    """

    def __init__(self, shape: Shape, num_classes: int, *, noise_dim: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape
        widths = (noise_dim, *hidden, math.prod(shape))
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(widths):
            bound = inputs**-0.5  # as PyTorch's linear layers begin
            for parameters, size in ((self.weights, (inputs, outputs)), (self.biases, (1, outputs))):
                parameters.append(torch.empty(num_classes, *size).uniform_(-bound, bound))

    def forward(self, noise: Tensor, classes: Tensor | None = None) -> Tensor:
        """Return the pixels [k, n, C * H * W] of noise [k, n, d], of all classes or those listed [k]."""
        values = noise
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if classes is not None:
                weight, bias = weight.index_select(0, classes), bias.index_select(0, classes)
            values = torch.baddbmm(bias, values, weight)
            values = F.relu(values) if layer + 1 < len(self.weights) else torch.sigmoid(values)
        return values
