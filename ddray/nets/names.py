"""Architecture names: a base name and optional suffixes in any order; the canonical name omits defaults.

Other packages offer networks through entry points of the group `ddray.nets`, scripts through `register_net`.
Their names are taken as they are, without suffixes.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from ddray.errors import InputError, did_you_mean, unknown
from ddray.system.registry import Registry

if TYPE_CHECKING:
    from torch import nn

NetFactory = Callable[[tuple[int, int, int], int], "nn.Module"]
"""Returns a fresh network for images of a shape (C, H, W) and a number of classes."""

WIDTH = 128
ACTIVATIONS = {"sigmoid": "_sigmoid", "relu": "_relu", "leakyrelu": "_leakyrelu"}
NORMS = {"none": "_nonorm", "batch": "_bn", "layer": "_ln", "instance": "_in", "group": "_gn"}
POOLINGS = {"none": "_nopool", "max": "_max", "avg": "_avg"}
DOUBLING = "_x2"
_TABLES: dict[str, Mapping[Any, str]] = {
    "doubling": {True: DOUBLING},
    "activation": ACTIVATIONS,
    "norm": NORMS,
    "pooling": POOLINGS,
}
GROUPS = 4


@dataclass(frozen=True)
class Family:
    """What an architecture's name stands for."""

    module: str  # below `ddray.nets`; its `build(arch, image_shape, num_classes)` returns the network's body
    norms: tuple[str, ...] = ("batch", "instance")  # that it can be built with; the first is the default
    drops: bool = False  # whether, in train mode, values before the embedding are dropped at random


# Adding an architecture: its module, and its name here.
_FAMILIES: dict[str, Family] = {
    **{
        f"convnet{depth}": Family("convnet", ("instance", "none", "batch", "layer", "group"))
        for depth in range(1, 7)
    },
    **dict.fromkeys(("resnet10", "resnet10_idc"), Family("torchvision_nets")),
    "resnet10_ap": Family("torchvision_nets", ("instance", "batch")),
    **dict.fromkeys(("resnet18", "resnet18_vico_ap"), Family("torchvision_nets")),
    "resnet18_vico": Family("torchvision_nets", ("instance", "batch")),
    "resnet101": Family("torchvision_nets"),
    "vgg11": Family("convnet", ("instance", "none", "batch")),
    "vgg11_tv": Family("torchvision_nets", ("none",), drops=True),
    "alexnet": Family("convnet", ("none", "batch", "instance")),
    **dict.fromkeys(("lenet", "alexcifar"), Family("classic", ("none",))),
    **dict.fromkeys(("mobilenet_v2", "densenet121", "densenet_cifar"), Family("torchvision_nets")),
    "densenet_idc": Family("torchvision_nets"),
    "efficientnet_b0": Family("torchvision_nets", drops=True),
    "shufflenet_v2": Family("torchvision_nets"),
    **dict.fromkeys(("vit_tiny", "deit_tiny"), Family("vit", ("none",))),
}
# Older names whose initialisation has changed; the new one keeps what is stored from being taken for it.
_OLDER_NAMES: Final = {"resnet18_in": "resnet18_vico", "resnet18_ap": "resnet18_vico_ap"}
_EXTERNAL: Final = Family("build", ("custom",))
_OFFERED: Final = Registry("arch", "ddray.nets", "NET", "ddray.nets")
_REGISTERED: dict[str, NetFactory] = {}
_SUFFIX_FIELDS: dict[str, tuple[str, str | bool]] = {
    suffix: (field, value) for field, table in _TABLES.items() for value, suffix in table.items()
}


@dataclass(frozen=True)
class Arch:
    """A parsed architecture name; only the ConvNet family has more than base and norm."""

    base: str  # one of `arch_names()`
    norm: str  # one of `NORMS`
    width: int = WIDTH  # channels of every block, or of the first
    doubling: bool = False  # whether each block has twice the channels of the one before (KRR-ST)
    activation: str = "relu"  # one of `ACTIVATIONS`
    pooling: str = "avg"  # one of `POOLINGS`

    @property
    def module(self) -> str:
        """The module below `ddray.nets` that builds it."""
        return _family(self.base).module

    @property
    def drops(self) -> bool:
        """Whether, in train mode, values before the embedding are dropped at random (or whole blocks)."""
        return _family(self.base).drops

    @property
    def is_external(self) -> bool:
        """Whether another package, or a script, offers it."""
        return self.base not in _FAMILIES

    @property
    def is_convnet(self) -> bool:
        """Whether this is a member of the ConvNet family."""
        return not self.is_external and self.base.startswith("convnet")

    @property
    def depth(self) -> int:
        """Number of blocks of a ConvNet."""
        return int(self.base.removeprefix("convnet"))

    @property
    def name(self) -> str:
        """The canonical name: width, doubling, activation, norm, pooling in this order, defaults omitted."""
        width = "" if self.width == WIDTH else f"_w{self.width}"
        width += DOUBLING if self.doubling else ""
        activation = "" if self.activation == "relu" else ACTIVATIONS[self.activation]
        norm = "" if self.norm == _family(self.base).norms[0] else NORMS[self.norm]
        pooling = "" if self.pooling == "avg" else POOLINGS[self.pooling]
        return f"{self.base}{width}{activation}{norm}{pooling}"


def arch_names() -> list[str]:
    """Return the base names, in the order in which tables list them; then those that others offer."""
    return [*_FAMILIES, *_external_names()]


def _external_names() -> list[str]:
    return sorted({*_OFFERED.names(), *_REGISTERED} - {*_FAMILIES})


def _family(base: str) -> Family:
    return _FAMILIES.get(base, _EXTERNAL)


def register_net(factory: NetFactory) -> str:
    """Let this process build the networks of a factory by its `__qualname__`, and return that name.

    Raises:
        InputError: it has no such name, or that of a network of ours.
    """
    name = getattr(factory, "__qualname__", None)
    if not callable(factory) or name is None:
        raise InputError(
            "a network must be named, or be a function (image_shape, num_classes) -> nn.Module, got "
            f"{type(factory).__name__}"
        )
    try:
        _parse(name)
    except InputError:
        _REGISTERED[name] = factory
        return str(name)
    raise InputError(f"a network's function must not have the name of one of ours, got {name}; rename it")


def is_registered(arch: str) -> bool:
    """Return whether a network is this process's own: its name says nothing to any other."""
    return arch in _REGISTERED


def net_factory(arch: str) -> NetFactory:
    """Return the factory of an external network; InputError if there is none."""
    return _REGISTERED[arch] if arch in _REGISTERED else _OFFERED.get(arch)


def parse_arch(arch: str) -> Arch:
    """Parse an architecture name: base name and suffixes, such as `"convnet3_w64_bn"`.

    Raises:
        InputError: an unknown base or suffix, a suffix the base does not take, or two of one kind.
    """
    try:
        return _parse(arch)
    except InputError:
        if arch in _external_names():  # read last: entry points take 10 ms
            return Arch(arch, _EXTERNAL.norms[0])
        raise


def _parse(arch: str) -> Arch:
    for older, newer in _OLDER_NAMES.items():
        if f"{arch}_".startswith(f"{older}_"):
            arch = newer + arch.removeprefix(older)
    # The longest base wins: "resnet18_vico_ap" is a base of its own, not a suffix of "resnet18_vico".
    bases = [base for base in _FAMILIES if arch == base or arch.startswith(f"{base}_")]
    if not bases:
        raise unknown("arch", arch, arch_names())
    base = max(bases, key=len)
    values: dict[str, str | int | bool] = {}
    for suffix in arch[len(base) :].split("_")[1:]:
        field, value = _parse_suffix(arch, base, suffix)
        if field in values:
            raise InputError(f"arch must name one {field}, got {arch!r} with two of them")
        values[field] = value
    parsed = replace(Arch(base, _FAMILIES[base].norms[0]), **values)  # type: ignore[arg-type]
    if parsed.norm == "group" and parsed.width % GROUPS:
        raise InputError(f"the width of a _gn arch must be a multiple of {GROUPS}, got {arch!r}")
    return parsed


def _parse_suffix(arch: str, base: str, suffix: str) -> tuple[str, str | int | bool]:
    """Return the field a suffix (without its underscore) sets, and the value."""
    allowed = [NORMS[norm] for norm in _FAMILIES[base].norms] if len(_FAMILIES[base].norms) > 1 else []
    if base.startswith("convnet"):
        if re.fullmatch(r"w[1-9][0-9]{0,4}", suffix):
            return "width", int(suffix[1:])
        allowed = ["_w<width>", DOUBLING, *ACTIVATIONS.values(), *allowed, *POOLINGS.values()]
    if f"_{suffix}" not in allowed:
        rule = f"must be one of {', '.join(allowed)}" if allowed else "is not taken by this arch"
        whole = {*_FAMILIES, *(f"{base}{candidate}" for candidate in allowed)} - {base}
        hint = did_you_mean(f"{base}_{suffix}", whole)
        raise InputError(f"suffix of {base} {rule}, got '_{suffix}' in {arch!r}{hint}")
    return _SUFFIX_FIELDS[f"_{suffix}"]


def check_arch(arch: str) -> str:
    """Return the canonical name of an architecture.

    Raises:
        InputError: the name is unknown; the message holds the nearest known one.
    """
    return parse_arch(arch).name


def with_norm(arch: str, norm: str) -> str:
    """Return the canonical name of `arch` with its norm replaced: `("convnet3", "batch")` -> `"convnet3_bn"`.

    `resnet18` becomes `resnet18_vico`, the one ResNet-18 with instance norm that the papers' code has.

    Raises:
        InputError: an unknown name, or a norm this architecture cannot be built with.
    """
    parsed = parse_arch(arch)
    if norm not in _family(parsed.base).norms:
        raise unknown(f"norm of {parsed.base}", norm, _family(parsed.base).norms)
    return parse_arch(replace(parsed, norm=norm).name).name


def convnet_name(depth: int, width: int, activation: str, norm: str, pooling: str) -> str:
    """Return the canonical name of one ConvNet of 1 to 6 blocks, `width` channels each.

    Raises:
        InputError: a value outside these, or of `ACTIVATIONS`, `NORMS`, `POOLINGS`.
    """
    settings = {"activation": activation, "norm": norm, "pooling": pooling}
    for setting, value in settings.items():
        if value not in _TABLES[setting]:
            raise unknown(setting, value, _TABLES[setting])
    return check_arch(f"convnet{depth}_w{width}{ACTIVATIONS[activation]}{NORMS[norm]}{POOLINGS[pooling]}")


def default_arch(image_shape: tuple[int, int, int]) -> str:
    """Return the field's ConvNet for images (C, H, W): 3 blocks up to 32 px, 4 at 64, 5 at 128, 6 beyond."""
    return f"convnet{3 + bisect_left((32, 64, 128), min(image_shape[1:]))}"


def resolve_arch(arch: str, image_shape: tuple[int, int, int]) -> str:
    """Return the canonical name; `auto` and `auto_<suffix>` take the default ConvNet for the resolution."""
    if arch == "auto" or arch.startswith("auto_"):
        arch = default_arch(image_shape) + arch.removeprefix("auto")
    return check_arch(arch)
