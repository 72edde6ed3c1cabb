"""States to checkpoint: copies on the CPU, and an optimiser's buffers without its settings."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def cpu_copy(state: Any) -> Any:
    """Return a state (nested mappings and sequences) whose tensors are detached copies on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {name: cpu_copy(value) for name, value in state.items()}
    return [cpu_copy(value) for value in state] if isinstance(state, list | tuple) else state


@torch.no_grad()
def copy_values(net: nn.Module, values: Iterable[Tensor]) -> None:
    """Copy tensors into a network's, which they match in number and order (`net.state_dict().values()`)."""
    for mine, theirs in zip(net.state_dict().values(), values, strict=True):
        mine.copy_(theirs)


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Return copies of an optimiser's buffers by the parameter's number; none before its first step."""
    buffers: dict[int, dict[str, Any]] = cpu_copy(optimizer.state_dict()["state"])
    return buffers


def load_optimizer_state(optimizer: torch.optim.Optimizer, buffers: Mapping[int, Mapping[str, Any]]) -> None:
    """Restore what `optimizer_state` returned; the optimiser keeps its settings."""
    groups, settings = optimizer.param_groups, optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": cpu_copy(buffers), "param_groups": settings})
    optimizer.param_groups = groups  # not copies: a rate may be a tensor that others write to


def velocities(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return copies of SGD's momentum, one per parameter; none before its first step."""
    return [buffers["momentum_buffer"] for buffers in optimizer_state(optimizer).values()]


def load_velocities(optimizer: torch.optim.Optimizer, values: Iterable[Tensor]) -> None:
    """Restore what `velocities` returned."""
    load_optimizer_state(optimizer, {i: {"momentum_buffer": value} for i, value in enumerate(values)})


def images_state(
    images: Tensor, optimizer: torch.optim.SGD, *, name: str = "images", momentum: str = "velocity"
) -> dict[str, Tensor]:
    """Return images, the optimiser's one parameter, and from the first step on their momentum.

    Args:
        images: what is learned.
        optimizer: of the images.
        name: key of the images.
        momentum: key of their momentum.
    """
    buffers = velocities(optimizer)
    return {name: cpu_copy(images), **({momentum: buffers[0]} if buffers else {})}


def load_images_state(
    images: Tensor,
    optimizer: torch.optim.SGD,
    state: Mapping[str, Any],
    *,
    name: str = "images",
    momentum: str = "velocity",
) -> None:
    """Restore what `images_state` returned, among other entries of a method's state."""
    images.detach().copy_(state[name])
    load_velocities(optimizer, [state[momentum]] if momentum in state else [])
