"""Networks by name: the ConvNet family and the architectures it is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddray.system.lazy import lazy

if TYPE_CHECKING:
    from ddray.nets.build import (
        Net,
        build_net,
        is_per_sample,
        multiply_adds,
        num_params,
        reinitialize,
        training_format,
    )
    from ddray.nets.features import Features
    from ddray.nets.names import arch_names, check_arch, convnet_name, default_arch, with_norm

__all__ = [
    "Features",
    "Net",
    "arch_names",
    "build_net",
    "check_arch",
    "convnet_name",
    "default_arch",
    "is_per_sample",
    "multiply_adds",
    "num_params",
    "reinitialize",
    "training_format",
    "with_norm",
]
__getattr__ = lazy(
    __name__,
    {
        "build": (
            "Net",
            "build_net",
            "is_per_sample",
            "multiply_adds",
            "num_params",
            "reinitialize",
            "training_format",
        ),
        "features": ("Features",),
        "names": ("arch_names", "check_arch", "convnet_name", "default_arch", "with_norm"),
    },
)
