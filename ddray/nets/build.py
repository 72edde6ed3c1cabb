"""Building networks from names: deterministic in the seed, and re-drawn in place for a new one."""

import importlib
from contextlib import ExitStack
from functools import lru_cache, partial
from itertools import chain
from typing import Any, Final, Self, cast
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ddray.errors import InputError, one_line
from ddray.nets.convnet import ChainNet
from ddray.nets.cpu_blocks import in_training_pass
from ddray.nets.features import Features, InstanceNorm
from ddray.nets.names import Arch, is_registered, net_factory, parse_arch
from ddray.seeding import derive_seed, forked_global

# Every other family halves the image three times or more, and instance norm needs 2x2 maps at the end.
MIN_SIZE = 16
_BODIES: Final[WeakSet[nn.Module]] = WeakSet()


class Net(nn.Module):
    """A classifier whose embedding and feature maps are open to distillation methods.

    Attributes:
        arch: canonical architecture name.
        image_shape: (C, H, W) it was built for.
        num_classes: K.
        body: the module that maps [N, C, H, W] to `Features`.
    """

    def __init__(
        self, arch: str, image_shape: tuple[int, int, int], num_classes: int, body: nn.Module
    ) -> None:
        super().__init__()
        self.arch, self.image_shape, self.num_classes, self.body = arch, image_shape, num_classes, body

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, K] of `x` [N, C, H, W]."""
        in_blocks = in_training_pass() and x.dtype == torch.float32
        if in_blocks and isinstance(self.body, ChainNet) and self.body.has_blocks:
            return self.body.training_logits(x)
        return self.features(x).logits

    def features(self, x: Tensor) -> Features:
        """Return logits, embedding and feature maps of `x` [N, C, H, W]."""
        features: Features = self.body(x)
        return features

    def embed(self, x: Tensor) -> Tensor:
        """Return the embedding [N, D] of `x` [N, C, H, W]."""
        return self.features(x).embedding

    def head_names(self) -> tuple[str, ...]:
        """Return what the names of the last layers' weights, whose number of classes varies, begin with."""
        return ("body.classifier", "body.head")

    @torch.no_grad()
    def map_bytes(self) -> list[int]:
        """Return the bytes of each map of a blank image; in eval mode, which leaves no trace."""
        device = next(self.parameters()).device
        maps = self.features(torch.zeros(1, *self.image_shape, device=device)).maps
        return [m.numel() * m.element_size() for m in maps]


class ExternalNet(Net):
    """A network that another package or a script offers: any module that maps images to logits.

    Its embedding is what its last linear layer takes. Inner maps it has if it returns `Features`. Its images
    and weights stay in the contiguous format: such modules may flatten maps by `view`.

    Raises:
        InputError: it does not take the images, or returns anything else.
    """

    def __init__(
        self, arch: str, image_shape: tuple[int, int, int], num_classes: int, body: nn.Module
    ) -> None:
        super().__init__(arch, image_shape, num_classes, body)
        outputs: dict[str, Any] = {}
        with ExitStack() as hooks:
            for name, module in body.named_modules():
                if not any(module.children()):
                    note = partial(_note_output, outputs, name)
                    hooks.callback(module.register_forward_hook(note).remove)
            device = next(iter(body.parameters()), torch.zeros(0)).device
            output = self._called(torch.zeros(2, *image_shape, device=device))
        lasts = [name for name, value in outputs.items() if value is output.logits]
        linear = (name for name in lasts if isinstance(body.get_submodule(name), nn.Linear))
        self._head = next(linear, None)
        tensors = [value for value in outputs.values() if isinstance(value, Tensor)]
        self._map_bytes = [tensor.numel() * tensor.element_size() // 2 for tensor in tensors]

    @torch.no_grad()
    def _called(self, blank: Tensor) -> Features:
        """Return what the module returns of two blank images, in eval mode."""
        try:
            output = self.body.eval()(blank)
        except Exception as error:  # whatever a module of others raises
            reason = f"{type(error).__name__}: {one_line(error, 200)}"
            raise InputError(f"net {self.arch} must take images {self.image_shape}, got {reason}") from error
        self.body.train()
        features = output if isinstance(output, Features) else Features(output, output, ())
        logits: Any = features.logits
        if not isinstance(logits, Tensor) or logits.shape != (2, self.num_classes):
            shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise InputError(
                f"net {self.arch} must return logits [N, {self.num_classes}], or ddray.nets.Features, got "
                f"{shape} of 2 images"
            )
        return features

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, K] of `x` [N, C, H, W]."""
        output = self.body(x.contiguous())
        logits: Tensor = output.logits if isinstance(output, Features) else output
        return logits

    def features(self, x: Tensor) -> Features:
        """Return logits, embedding and feature maps, if there are any, of `x` [N, C, H, W].

        Raises:
            InputError: the embedding can't be told.
        """
        inputs: list[Tensor] = []
        with ExitStack() as hooks:
            if self._head is not None:
                layer = self.body.get_submodule(self._head)
                hook = layer.register_forward_pre_hook(lambda module, values: inputs.append(values[0]))
                hooks.callback(hook.remove)
            output = self.body(x.contiguous())
        if isinstance(output, Features):
            return output
        if not inputs:
            raise InputError(
                f"net {self.arch} must end in an nn.Linear, or return ddray.nets.Features, where its "
                "embedding is needed; use another --arch"
            )
        return Features(output, inputs[-1], ())

    def head_names(self) -> tuple[str, ...]:
        """Return what the names of the last layer's weights begin with."""
        return () if self._head is None else (f"body.{self._head}.".replace("..", "."),)

    def map_bytes(self) -> list[int]:
        """Return the bytes of each layer's output of one image."""
        return self._map_bytes

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move the network; a memory format is ignored."""
        kwargs.pop("memory_format", None)
        return super().to(*args, **kwargs) if args or kwargs else self


def _note_output(outputs: dict[str, Any], name: str, module: nn.Module, inputs: Any, output: Any) -> None:
    outputs[name] = output


def build_net(
    arch: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    seed: int,
    device: str | torch.device = "cpu",
) -> Net:
    """Build a freshly initialised network.

    The global random generators are left as they were. On CUDA the weights are drawn on the device, so they
    differ from the CPU's for the same seed.

    Args:
        arch: architecture name with optional suffixes, such as `"convnet3_bn"`.
        image_shape: (C, H, W) of the images it will see.
        num_classes: K.
        seed: decides every initial weight.
        device: where it is initialised and stays.

    Raises:
        InputError: the name is unknown, or the images do not fit the architecture.
    """
    parsed = parse_arch(arch)
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise InputError(f"image_shape must be three positive numbers (C, H, W), got {tuple(image_shape)}")
    if num_classes < 1:
        raise InputError(f"num_classes must be at least 1, got {num_classes}")
    channels, height, width = image_shape
    with forked_global(derive_seed(seed, "net"), device), torch.device(device):
        if parsed.is_external:
            body = _external_body(parsed.name, (channels, height, width), num_classes).to(device)
            return ExternalNet(parsed.name, (channels, height, width), num_classes, body)
        body = _body(parsed, (channels, height, width), num_classes)
    return Net(parsed.name, (channels, height, width), num_classes, body)


def _external_body(name: str, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a fresh module of an external factory."""
    factory: Any = net_factory(name)
    try:
        body = factory(image_shape, num_classes)
    except Exception as error:  # whatever a function of others raises
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        raise InputError(f"net {name} must be made of (image_shape, num_classes), got {reason}") from error
    if not isinstance(body, nn.Module) or body in _BODIES:
        what = "the same one again" if isinstance(body, nn.Module) else type(body).__name__
        raise InputError(f"net {name} must be made as a new nn.Module at each call, got {what}")
    _BODIES.add(body)
    return body


def _body(arch: Arch, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the body of a parsed name; a family's module is imported when it is needed (torchvision)."""
    if not arch.is_convnet and min(image_shape[1:]) < MIN_SIZE:
        raise InputError(
            f"images for {arch.name} must be at least {MIN_SIZE} px, got {image_shape[1]}x{image_shape[2]}; "
            "a ConvNet takes smaller ones"
        )
    family = importlib.import_module(f"ddray.nets.{arch.module}")
    return cast(nn.Module, family.build(arch, image_shape, num_classes))


@torch.no_grad()
def reinitialize(net: Net, seed: int) -> None:
    """Draw fresh weights and buffers in place: the same bytes as `build_net(..., seed=seed)`.

    Parameters keep their identity and memory format, so a compiled network needs no recompilation.
    Gradients are left alone. No copy from the CPU is waited for.
    """
    tensors = list(chain(net.parameters(), net.buffers()))
    device = tensors[0].device
    if type(net.body) is ChainNet and not parse_arch(net.arch).is_external:
        fresh = _twin(net.arch, net.image_shape, net.num_classes, device)
        # A chain's layers draw in their order and nothing is drawn besides, as when it is built.
        with forked_global(derive_seed(seed, "net"), device):
            for layer in fresh.modules():
                if (reset := getattr(layer, "reset_parameters", None)) is not None:
                    reset()
    else:
        with _ScalarsOnDevice():
            fresh = build_net(net.arch, net.image_shape, net.num_classes, seed=seed, device=device)
    for old, new in zip(tensors, chain(fresh.parameters(), fresh.buffers()), strict=True):
        old.copy_(new)


@lru_cache(maxsize=4)
def _twin(arch: str, image_shape: tuple[int, int, int], num_classes: int, device: torch.device) -> Net:
    """Return a network to draw weights in: their order depends on the memory format."""
    return build_net(arch, image_shape, num_classes, seed=0, device=device)


class _ScalarsOnDevice(TorchFunctionMode):
    """Fills scalars, such as batch norm's counters, on their device: copies from the CPU are waited for."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.tensor and args and isinstance(args[0], int | float):
            return torch.full((), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def is_per_sample(net: nn.Module) -> bool:
    """Return whether no layer mixes samples in train() mode, so that a batch may be run in chunks.

    Only batch norm mixes samples; dropout draws per sample and does not count.
    """
    return not any(isinstance(module, _BatchNorm) for module in net.modules())


def training_format(
    net: nn.Module, device: torch.device, *, fused: bool = False, bf16: bool = False
) -> torch.memory_format:
    """Return the memory format of weights and images in which training `net` as a whole is fastest.

    On a CPU as measured: channels_last, but not for shallow nets without pooling, whose large maps are
    flattened (ConvNet-1 without norm: 101 ms against 176), and for instance norms outside `cpu_blocks`.

    On CUDA by rule, not yet measured: contiguous for group, instance and layer norms in float32, whose
    kernels copy channels_last maps (torch 2.11), and for networks that are `fused`, as vmap has no rule for
    a batch norm of channels_last maps. Otherwise channels_last, which the tensor cores take.
    """
    if device.type != "cpu":
        copied = any(isinstance(module, nn.GroupNorm | nn.LayerNorm) for module in net.modules())
        return torch.contiguous_format if fused or (copied and not bf16) else torch.channels_last
    for module in net.modules():
        if isinstance(module, ChainNet) and module.has_blocks:
            return torch.channels_last
        if isinstance(module, InstanceNorm):
            return torch.contiguous_format
        if isinstance(module, ChainNet) and set(module.poolings) == {"none"} and len(module.convs) <= 2:
            return torch.contiguous_format
    return torch.channels_last


def multiply_adds(arch: str, image_shape: tuple[int, int, int]) -> int:
    """Return the multiply-adds of one image's forward pass, with a classifier of one class.

    Raises:
        InputError: the architecture is unknown or does not fit the images.
    """
    return _multiply_adds(arch, image_shape, net_factory(arch) if is_registered(arch) else None)


@lru_cache(maxsize=256)
def _multiply_adds(arch: str, image_shape: tuple[int, int, int], factory: object) -> int:
    """Return `multiply_adds`; a script's `factory` is a key, as another may bear its name later."""
    net = build_net(arch, image_shape, 1, seed=0).eval()  # a script's is tried on two images: not counted
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, *image_shape))
    return int(counter.get_total_flops()) // 2


def num_params(net: nn.Module) -> int:
    """Return the number of trainable parameters."""
    return sum(parameter.numel() for parameter in net.parameters() if parameter.requires_grad)
