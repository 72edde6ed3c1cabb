"""The 720 ConvNets of the DataDAM supplement (section 2.3): depth x width x activation x norm x pooling."""

from itertools import product
from typing import Any, Final

from ddray.config import read_yaml
from ddray.errors import InputError
from ddray.nets import Net, build_net, convnet_name
from ddray.nets.names import Arch, parse_arch
from ddray.ranking.spaces import Device, Shape, SpaceDefinition
from ddray.system.shipped import shipped


class ConvNet720:
    """The grid, in the order of `search_spaces/nas/convnet720.yaml`: the last factor varies fastest."""

    name = "convnet720"

    def __init__(self) -> None:
        factors = read_yaml(shipped("search_spaces", "nas", "convnet720.yaml"))
        self._points = [dict(zip(factors, values, strict=True)) for values in product(*factors.values())]

    def __len__(self) -> int:
        return len(self._points)

    def choices(self, index: int) -> dict[str, Any]:
        """Return depth, width, activation, norm and pooling of an architecture."""
        if not 0 <= index < len(self):
            raise InputError(f"indices of {self.name} must be in 0..{len(self) - 1}, got {index}")
        return dict(self._points[index])

    def arch_name(self, index: int) -> str:
        """Return the canonical name, such as `convnet3_w64_bn_max`."""
        return convnet_name(**self.choices(index))

    def describe(self, index: int) -> dict[str, Any]:
        """Return index, name, choices, and parameters and FLOPs in millions for 3x32x32 and 10 classes."""
        name = self.arch_name(index)
        params, flops = convnet_size(parse_arch(name), (3, 32, 32), 10)
        sizes = {"params_m": params / 1e6, "flops_m": flops / 1e6}
        return {"index": index, "name": name, **self.choices(index), **sizes}

    def build(
        self, index: int, image_shape: Shape, num_classes: int, *, seed: int, device: Device = "cpu"
    ) -> Net:
        """Build an architecture by its name."""
        return build_net(self.arch_name(index), image_shape, num_classes, seed=seed, device=device)

    def cost(self, index: int, image_shape: Shape, num_classes: int) -> float:
        """Return the multiply-adds of one image's forward pass, in millions."""
        return convnet_size(parse_arch(self.arch_name(index)), image_shape, num_classes)[1] / 1e6


def convnet_size(arch: Arch, image_shape: Shape, num_classes: int) -> tuple[int, int]:
    """Return parameters and FLOPs (per image) of a ConvNet without building it.

    FLOPs are counted as for NAS-Bench-201 (`ddray.nets.nasbench201.cell_net_size`), biases included.

    Raises:
        InputError: the image is too small for the depth.
    """
    channels, height, width = image_shape
    params = flops = 0
    for block in range(arch.depth):
        if block == 0 and channels == 1:  # padded by 3 instead of 1
            height, width = height + 4, width + 4
        weights = (9 * channels + 1) * arch.width
        channels = arch.width
        params += weights + 2 * channels * {"none": 0, "layer": height * width}.get(arch.norm, 1)
        flops += weights * height * width
        if arch.pooling != "none":
            height, width = height // 2, width // 2
    if min(height, width) < 1:
        raise InputError(
            f"{arch.name} halves the image {arch.depth} times, so its sides must be at least "
            f"{2**arch.depth} px, got {image_shape[1]}x{image_shape[2]}"
        )
    linear = (channels * height * width + 1) * num_classes
    return params + linear, flops + linear


SPACE: Final = SpaceDefinition(
    ConvNet720,
    # No recipe is published (one follow-up: 200 epochs): ours.
    recipe={"epochs": 200, "lr": 0.01, "weight_decay": 5e-4, "batch": 256},
    published=("datadam", "Table 4"),
    # The text states no more than that all are trained on the whole set: the epochs are the space's own.
    published_options={
        **{"sample": None, "max_mflops": None, "epochs": None, "val_images": None},
        **{"truth": "whole", "truth_column": None, "truth_epochs": None},
    },
    published_in_text={"datadam": {"spearman": 0.72}},
)
