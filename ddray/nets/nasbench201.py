"""The cell network of NAS-Bench-201 (Dong and Yang, ICLR 2020, arXiv:2001.00326), and its size.

A cell is a graph of four nodes; each of its six edges does one of five operations, and a node sums its
inputs. Around it stand a conv3x3-BN stem to C channels, three stages of N cells at C, 2C and 4C channels,
a residual block that halves the map before the second and the third, then BN-ReLU, global average pooling and
a linear layer. Convolutions have no bias; those of cells and residual blocks are ReLU-conv-BN. With C = 16,
N = 5 and affine BN the parameters and FLOPs of every cell are the benchmark's own. Layers keep PyTorch's
default initialisation.

`Skeleton.mixture` reproduces what DC-BENCH's public harness (https://github.com/justincui03/dc_benchmark,
darts-pt) trains instead of a cell: every edge sums all operations, weighted by a softmax over the one-hot
choice. `softmax_truncated` adds its second fault: its one-hot rows are only as wide as the highest operation
the cell uses, so the operations beyond it drop out.

**Deviations**
- Maps with odd sides, which the benchmark does not have: the shortcut's 2x2 pooling, rounding down, would not
  fit the convolutions beside it. Here it rounds up.
- What can't reach a cell's output is built, as its parameters count, but not run.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddray.errors import InputError, unknown
from ddray.nets.build import MIN_SIZE, Net
from ddray.nets.features import Features
from ddray.seeding import derive_seed, forked_global

OPS: Final = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
# (from node, to node) in the order of an arch_str, where all edges into a node precede those out of it.
EDGES: Final = ((0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
OUTPUT: Final = 3
NUM_STAGES: Final = 3
MIXTURES: Final = ("softmax", "softmax_truncated")

_KERNELS: Final = {"nor_conv_1x1": 1, "nor_conv_3x3": 3}
_EXAMPLE: Final = (
    "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"
)
_ARCH_STR: Final = re.compile(r"\|(\w+)~0\|\+\|(\w+)~0\|(\w+)~1\|\+\|(\w+)~0\|(\w+)~1\|(\w+)~2\|")

_WeightedOps = tuple[tuple[str, float], ...]
"""What one edge sums: operations (`none` left out) and their weights."""
_Move = tuple[int, str, float]
"""What a node sums: the node from which, the operation, its weight."""


@dataclass(frozen=True)
class Skeleton:
    """The network around a cell; a value out of range is an InputError."""

    channels: int = 16  # C, of the first stage
    num_cells: int = 5  # N, per stage
    cell_affine: bool = True  # whether BN inside cells has weight and bias (the benchmark's; not DC-BENCH's)
    mixture: str | None = None  # or one of `MIXTURES`: a fault of DC-BENCH's harness to reproduce

    def __post_init__(self) -> None:
        for field, value in (("channels", self.channels), ("num_cells", self.num_cells)):
            if value < 1:
                raise InputError(f"{field} of a cell network must be at least 1, got {value}")
        if self.mixture is not None and self.mixture not in MIXTURES:
            raise unknown("mixture", self.mixture, MIXTURES)

    @property
    def suffix(self) -> str:
        """What it adds to an architecture's name, as `_c16_n5`; BN and mixture only where unusual."""
        affine = "" if self.cell_affine else "_noaffine"
        return f"_c{self.channels}_n{self.num_cells}{affine}{f'_{self.mixture}' if self.mixture else ''}"


BENCHMARK: Final = Skeleton()
"""The network that the benchmark trained."""


def parse_arch_str(text: str) -> tuple[str, ...]:
    """Return the operations of a cell `"|op~0|+|op~0|op~1|+|op~0|op~1|op~2|"`, one per edge of `EDGES`.

    Raises:
        InputError: another form, or an unknown operation.
    """
    match = _ARCH_STR.fullmatch(text)
    if match is None:
        raise InputError(f"arch_str must have the form {_EXAMPLE}, got {text!r}")
    return _checked(match.groups())


def to_arch_str(ops: Sequence[str]) -> str:
    """Return the benchmark's text for a cell: the inverse of `parse_arch_str`.

    Raises:
        InputError: another number of operations, or an unknown one.
    """
    edges = list(zip(EDGES, _checked(ops), strict=True))
    nodes = (
        "".join(f"{op}~{source}|" for (source, target), op in edges if target == node)
        for node in range(1, OUTPUT + 1)
    )
    return "+".join(f"|{node}" for node in nodes)


def _checked(ops: Sequence[str]) -> tuple[str, ...]:
    if len(ops) != len(EDGES):
        raise InputError(f"a cell has {len(EDGES)} operations, one per edge, got {len(ops)}")
    for op in ops:
        if op not in OPS:
            raise unknown("operation of a cell", op, OPS)
    return tuple(ops)


def _weighted(ops: Sequence[str], mixture: str | None) -> tuple[_WeightedOps, ...]:
    """Return what each edge of `EDGES` sums."""
    if mixture is None:
        return tuple(() if op == "none" else ((op, 1.0),) for op in ops)
    width = len(OPS) if mixture == "softmax" else 1 + max(OPS.index(op) for op in ops)
    total = math.e + width - 1
    return tuple(
        tuple((candidate, (math.e if candidate == op else 1.0) / total) for candidate in OPS[1:width])
        for op in ops
    )


def cell_net_size(
    ops: Sequence[str], image_shape: tuple[int, int, int], num_classes: int, skeleton: Skeleton = BENCHMARK
) -> tuple[int, int]:
    """Return parameters and FLOPs (per image) of a cell network without building it.

    FLOPs are counted as the benchmark does (get_model_infos in https://github.com/D-X-Y/AutoDL-Projects):
    multiply-adds of convolutions and linear layers, plus one for each bias that is added; norms, activations
    and poolings are free. `ops` has one of `OPS` per edge of `EDGES`.
    """
    kernels = [_KERNELS[op] for edge in _weighted(ops, skeleton.mixture) for op, _ in edge if op in _KERNELS]
    cell_weights = sum(kernel**2 for kernel in kernels)  # per pair of channels
    cell_affine = 2 * len(kernels) if skeleton.cell_affine else 0  # per channel
    (image_channels, height, width), channels = image_shape, skeleton.channels
    params, flops = 2 * channels, 0
    stem = 9 * image_channels * channels
    reduction = 0
    for stage in range(NUM_STAGES):
        if stage:
            # conv3x3 C -> 2C, conv3x3 2C -> 2C and conv1x1 C -> 2C, each on the halved map; two norms.
            reduction = (18 + 36 + 2) * channels**2
            params += 8 * channels
            channels, height, width = 2 * channels, (height + 1) // 2, (width + 1) // 2
        cells = skeleton.num_cells * cell_weights * channels**2
        weights = (reduction or stem) + cells
        params += weights + skeleton.num_cells * cell_affine * channels
        flops += weights * height * width
    linear = (channels + 1) * num_classes
    return params + 2 * channels + linear, flops + linear


def build_cell_net(
    arch_str: str,
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    name: str = "nasbench201",
    skeleton: Skeleton = BENCHMARK,
    seed: int,
    device: str | torch.device = "cpu",
) -> Net:
    """Build a freshly initialised cell network, as `build_net` builds others.

    Maps are the stages' outputs, the last one after BN-ReLU; the embedding is the pooled last map [N, 4C].
    `Net.arch` is `name`, what the cell is called, with the skeleton's suffix: `nasbench201_9930_c16_n5`.

    Raises:
        InputError: not an arch_str, or images or classes that no network fits.
    """
    ops = parse_arch_str(arch_str)
    if len(image_shape) != 3 or image_shape[0] < 1 or min(image_shape[1:]) < MIN_SIZE:
        raise InputError(
            f"images for a cell network must be (C, H, W) with sides of at least {MIN_SIZE} px, "
            f"got {tuple(image_shape)}; a ConvNet takes smaller ones"
        )
    if num_classes < 1:
        raise InputError(f"num_classes must be at least 1, got {num_classes}")
    with forked_global(derive_seed(seed, "net"), device), torch.device(device):
        body = CellNet(ops, image_shape[0], num_classes, skeleton)
    return Net(f"{name}{skeleton.suffix}", image_shape, num_classes, body)


class CellNet(nn.Module):
    """A cell network that returns `Features`; `ops` has one of `OPS` per edge of `EDGES`."""

    def __init__(self, ops: Sequence[str], image_channels: int, num_classes: int, skeleton: Skeleton) -> None:
        super().__init__()
        edges = _weighted(ops, skeleton.mixture)
        channels = skeleton.channels
        self.stem = _conv_norm(image_channels, channels, 3)
        self.reductions, self.stages = nn.ModuleList(), nn.ModuleList()
        for stage in range(NUM_STAGES):
            if stage:
                self.reductions.append(Reduction(channels))
                channels *= 2
            cells = (Cell(edges, channels, affine=skeleton.cell_affine) for _ in range(skeleton.num_cells))
            self.stages.append(nn.Sequential(*cells))
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Features:
        """Return the features of `x` [N, C, H, W]."""
        maps: list[Tensor] = []
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            x = stage(self.reductions[index - 1](x) if index else x)
            maps.append(x)
        maps[-1] = F.relu(self.norm(x), inplace=True)
        embedding = maps[-1].mean((2, 3))
        return Features(self.classifier(embedding), embedding, tuple(maps))


class Reduction(nn.Module):
    """The residual block between stages: [N, C, H, W] -> [N, 2C, H/2, W/2], odd sides rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _conv_norm(channels, 2 * channels, 3, stride=2)
        self.second = _conv_norm(2 * channels, 2 * channels, 3)
        self.shortcut = nn.Conv2d(channels, 2 * channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Halve the map of `x` and double its channels."""
        residual: Tensor = self.second(F.relu(self.first(F.relu(x)), inplace=True))
        shortcut: Tensor = self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True))
        return residual + shortcut


class Cell(nn.Module):
    """A cell: [N, C, H, W] -> [N, C, H, W]; `edges` is what each of `EDGES` sums, `affine` is of its BN."""

    def __init__(self, edges: Sequence[_WeightedOps], channels: int, *, affine: bool) -> None:
        super().__init__()
        self.convs = nn.ModuleDict()
        for (source, target), weighted in zip(EDGES, edges, strict=True):
            for op, _ in weighted:
                if op in _KERNELS:
                    conv = _conv_norm(channels, channels, _KERNELS[op], affine=affine)
                    self.convs[f"{source}_{target}_{op}"] = conv
        self._plan = _plan(edges, affine)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output node for the input node `x`."""
        nodes = {0: x}
        rectified: dict[int, Tensor] = {}  # shared by the convolutions out of a node
        for node, moves in self._plan:
            total: Tensor | None = None
            for source, op, weight in moves:
                if op == "skip_connect":
                    output = nodes[source]
                elif op == "avg_pool_3x3":
                    output = F.avg_pool2d(nodes[source], 3, 1, 1, count_include_pad=False)
                else:
                    if source not in rectified:
                        rectified[source] = F.relu(nodes[source])
                    output = self.convs[f"{source}_{node}_{op}"](rectified[source])
                output = output if weight == 1 else output * weight
                total = output if total is None else total + output
            nodes[node] = torch.zeros_like(x) if total is None else total
        return nodes[OUTPUT]


def _plan(edges: Sequence[_WeightedOps], affine: bool) -> tuple[tuple[int, tuple[_Move, ...]], ...]:
    """Return the nodes that reach the output, in order, each with the operations that can add to it."""
    moves: dict[int, list[_Move]] = {node: [] for node in range(1, OUTPUT + 1)}
    for (source, target), weighted in zip(EDGES, edges, strict=True):
        for op, weight in weighted:
            # A node that nothing reaches is zero, and stays so except for the shift of an affine BN.
            if source == 0 or moves[source] or (affine and op in _KERNELS):
                moves[target].append((source, op, weight))
    needed = {OUTPUT}
    for node in reversed(moves):
        if node in needed:
            needed |= {source for source, _, _ in moves[node]}
    return tuple((node, tuple(moves[node])) for node in moves if node in needed)


def _conv_norm(
    in_channels: int, out_channels: int, kernel: int, *, stride: int = 1, affine: bool = True
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(out_channels, affine=affine),
    )
