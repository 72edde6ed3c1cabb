"""States to checkpoint: copies on the CPU, and an optimiser's buffers without its settings."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def cpu_copy(state: Any) -> Any:
    """Return a state (nested mappings and sequences) whose tensors are detached copies on the CPU."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Mapping):
        return {name: cpu_copy(value) for name, value in state.items()}
    return [cpu_copy(value) for value in state] if isinstance(state, list | tuple) else state


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Return copies of an optimiser's buffers by the parameter's number; none before its first step."""
    buffers: dict[int, dict[str, Any]] = cpu_copy(optimizer.state_dict()["state"])
    return buffers


def load_optimizer_state(optimizer: torch.optim.Optimizer, buffers: Mapping[int, Mapping[str, Any]]) -> None:
    """Restore what `optimizer_state` returned; the optimiser keeps its settings."""
    groups, settings = optimizer.param_groups, optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": cpu_copy(buffers), "param_groups": settings})
    optimizer.param_groups = groups  # not copies: a rate may be a tensor that others write to


def images_state(
    images: Tensor, optimizer: torch.optim.SGD, *, name: str = "images", momentum: str = "velocity"
) -> dict[str, Tensor]:
    """Return images as `name`, and from the first step on their momentum as `momentum`.

    Args:
        images: the optimiser's one parameter.
        optimizer: of the images.
        name: key of the images.
        momentum: key of their momentum.
    """
    buffers = optimizer_state(optimizer).get(0, {})
    state = {name: cpu_copy(images)}
    return {**state, momentum: buffers["momentum_buffer"]} if buffers else state


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
    load_optimizer_state(optimizer, {0: {"momentum_buffer": state[momentum]}} if momentum in state else {})
