"""The ConvNet family of the dataset-condensation code base (DC, arXiv:2006.05929; "VICO").

A ConvNet-D is D blocks of conv3x3 (padding 1, bias) -> norm -> activation -> 2x2 pooling, flattened into one
linear layer; layers keep PyTorch's default initialisation. Blocks have one width, or (`_x2`, KRR-ST's inner
networks) each twice the channels of the one before. A one-channel image is padded by 3 instead of 1 in
the first convolution, whatever its size: the authors' code tests the channels, which turns 28 px into 32.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from ddray.errors import InputError
from ddray.nets.features import Features, Flatten, norm_layer
from ddray.nets.names import Arch

LEAKY_SLOPE = 0.01


class ConvNet(nn.Module):
    """A ConvNet that returns `Features`; the embedding is the flattened output of the last pooling.

    Args:
        arch: the parsed name: depth, width, doubling, activation, norm and pooling.
        image_shape: (C, H, W) of the images.
        num_classes: K.

    Raises:
        InputError: the image is too small for the depth.
    """

    def __init__(self, arch: Arch, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        self._activation = arch.activation
        self.pooling = arch.pooling
        self._in_place = arch.norm != "layer"
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        channels, height, width = image_shape
        for block in range(arch.depth):
            padding = 3 if block == 0 and image_shape[0] == 1 else 1
            out_channels = arch.width * 2**block if arch.doubling else arch.width
            self.convs.append(nn.Conv2d(channels, out_channels, 3, padding=padding))
            channels, height, width = out_channels, height + 2 * padding - 2, width + 2 * padding - 2
            self.norms.append(norm_layer(arch.norm, (channels, height, width)))
            if arch.pooling != "none":
                if min(height, width) < 2:
                    raise InputError(
                        f"{arch.name} halves the image {arch.depth} times, so its sides must be at least "
                        f"{2**arch.depth} px, got {image_shape[1]}x{image_shape[2]}; take a smaller depth"
                    )
                height, width = height // 2, width // 2
        self.flatten = Flatten()
        self.classifier = nn.Linear(channels * height * width, num_classes)

    def forward(self, x: Tensor) -> Features:
        """Return the features of `x` [N, C, H, W]."""
        maps: list[Tensor] = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = self._activate(norm(conv(x)))
            maps.append(x)
            x = self._pool(x)
        embedding = self.flatten(x)
        return Features(self.classifier(embedding), embedding, tuple(maps))

    def _activate(self, x: Tensor) -> Tensor:
        """Apply the activation in place, which conv and norm allow; but not on a LayerNorm's view."""
        inplace = self._in_place
        if self._activation == "sigmoid":
            return x.sigmoid_() if inplace else x.sigmoid()
        if self._activation == "leakyrelu":
            return F.leaky_relu(x, LEAKY_SLOPE, inplace=inplace)
        return F.relu(x, inplace=inplace)

    def _pool(self, x: Tensor) -> Tensor:
        """Halve the map, or leave it."""
        if self.pooling == "avg":
            return F.avg_pool2d(x, 2)
        return F.max_pool2d(x, 2) if self.pooling == "max" else x


build = ConvNet
