"""Relations of a class's samples (ESFR, Deng et al., CVPR 2024): their spread, how their channels covary."""

import torch
from torch import Tensor

from ddray.errors import InputError
from ddray.nets import Net


def class_spread(features: Tensor) -> Tensor:
    """Return CC, the sum over classes of sum_i ||f_i - mean f||^2 of features [K, n, d]."""
    return (features - features.mean(1, keepdim=True)).square().sum()


def relations(samples: Tensor, channels: int) -> Tensor:
    """Return M [K, C, C] of pooled maps [K, n, C * P]: (1/n) sum_i z_i z_i', z_i less the mean per place."""
    num_classes, num = samples.shape[:2]
    centred = (samples - samples.mean(1, keepdim=True)).view(num_classes, num, channels, -1)
    rows = centred.transpose(1, 2).reshape(num_classes, channels, -1)  # [K, C, n * P]
    return rows @ rows.mT / num


def gram(samples: Tensor, channels: int) -> Tensor:
    """Return x x' of each pooled map x [C, P]: [N, C * C] of `samples` [N, C * P]."""
    maps = samples.view(len(samples), channels, -1)
    return (maps @ maps.mT).flatten(1)


def relations_of_means(means: Tensor, grams: Tensor, channels: int) -> Tensor:
    """Return M [K, C, C] from class means of pooled maps [K, C * P] and of their `gram` [K, C * C]."""
    maps = means.view(len(means), channels, -1)
    return grams.view(len(means), channels, channels) - maps @ maps.mT


def relation_loss(real: Tensor, synthetic: Tensor) -> Tensor:
    """Return CM, the sum over classes of ||M_real - M_syn||_F^2 of matrices [K, C, C]."""
    return (real - synthetic).square().sum()


def channels_of(net: Net, device: torch.device) -> int:
    """Return the channels C of the network's last map, whose pooled places are its embedding [N, C * P].

    Raises:
        InputError: the embedding is something else.
    """
    was_training = net.training
    with torch.no_grad():
        _, embedded, maps = net.eval().features(torch.zeros(2, *net.image_shape, device=device))
    net.train(was_training)
    channels, height, width = maps[-1].shape[1:]
    if embedded.shape[1] not in (
        channels * places for places in (1, height * width, height // 2 * (width // 2))
    ):
        raise InputError(
            "esfr needs a network whose embedding is its last map, pooled, such as convnet3, got "
            f"{net.arch}; or set method.lambda_cm=0"
        )
    return channels
