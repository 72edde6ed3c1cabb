"""ViT-Tiny and DeiT-Tiny (arXiv:2010.11929, arXiv:2012.12877) on torchvision's VisionTransformer.

Width 192, 12 layers, 3 heads, MLP 768, no dropout; patches of 4 px up to 32 px, 8 up to 64, 16 above.
torchvision has no DeiT: `deit_tiny` adds the distillation token and a second head; its embedding is the mean
of both tokens, and its logits the mean of both heads. As in torchvision, heads start at zero: the first
logits are 0.
"""

import math

import torch
from torch import Tensor, nn
from torchvision import models

from ddray.errors import InputError
from ddray.nets.features import Features
from ddray.nets.names import Arch

DIM, NUM_LAYERS, NUM_HEADS, MLP_DIM = 192, 12, 3, 768
MAP_EVERY = 3


class VisionTransformer(nn.Module):
    """A vision transformer that returns `Features`; the maps are the patch tokens after every third layer.

    Raises:
        InputError: the images are not square, or do not divide into patches.
    """

    def __init__(self, arch: Arch, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        patch = 4 if height <= 32 else 8 if height <= 64 else 16
        if height != width or height % patch:
            raise InputError(
                f"images for {arch.base} must be square with sides divisible by {patch}, got {height}x{width}"
            )
        self._side = height // patch
        vit = models.VisionTransformer(
            height, patch, NUM_LAYERS, NUM_HEADS, DIM, MLP_DIM, num_classes=num_classes
        )
        self.patches = nn.Conv2d(channels, DIM, patch, patch)
        nn.init.trunc_normal_(self.patches.weight, std=math.sqrt(1 / (channels * patch**2)))
        nn.init.zeros_(self.patches.bias)  # type: ignore[arg-type]
        # One token per head: class, and for DeiT distillation (at 0 as torchvision's class token).
        num_heads = 2 if arch.base == "deit_tiny" else 1
        self.tokens = nn.Parameter(torch.zeros(1, num_heads, DIM))
        self.positions = nn.Parameter(torch.empty(1, num_heads + self._side**2, DIM).normal_(std=0.02))
        self.layers = vit.encoder.layers
        self.norm = vit.encoder.ln
        self.heads = nn.ModuleList(nn.Linear(DIM, num_classes) for _ in range(num_heads))
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Features:
        """Return the features of `x` [N, C, H, W]."""
        num_tokens = self.tokens.shape[1]
        patches = self.patches(x).flatten(2).transpose(1, 2)
        sequence = torch.cat([self.tokens.expand(x.shape[0], -1, -1), patches], 1) + self.positions
        maps: list[Tensor] = []
        for index, layer in enumerate(self.layers, 1):
            sequence = layer(sequence)
            if index % MAP_EVERY == 0:
                tokens = sequence[:, num_tokens:].transpose(1, 2)
                maps.append(tokens.unflatten(2, (self._side, self._side)))
        final = self.norm(sequence[:, :num_tokens])
        each = [head(final[:, index]) for index, head in enumerate(self.heads)]
        return Features(torch.stack(each).mean(0), final.mean(1), tuple(maps))


build = VisionTransformer
