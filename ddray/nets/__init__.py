"""Networks by name: the ConvNet family and the architectures it is compared with."""

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
