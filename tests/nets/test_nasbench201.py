"""The cell network against a naive forward pass in float64, and its size against the benchmark's figures."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor, nn

from ddray.errors import InputError
from ddray.nets import Net, num_params
from ddray.nets.nasbench201 import (
    BENCHMARK,
    OPS,
    Skeleton,
    build_cell_net,
    cell_net_size,
    parse_arch_str,
    to_arch_str,
)

CELL_1 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_3x3~1|skip_connect~2|"
CELL_9930 = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"
ALL_OPS = "|nor_conv_1x1~0|+|skip_connect~0|nor_conv_3x3~1|+|none~0|avg_pool_3x3~1|nor_conv_1x1~2|"
NOTHING = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
# No edge into node 1: what follows it is a shift of BN, or nothing.
EMPTY_NODE = "|none~0|+|none~0|nor_conv_3x3~1|+|skip_connect~0|avg_pool_3x3~1|nor_conv_1x1~2|"
# Nodes 1 and 2 have inputs but no way out.
NO_WAY_OUT = "|nor_conv_3x3~0|+|nor_conv_1x1~0|nor_conv_3x3~1|+|avg_pool_3x3~0|none~1|none~2|"
ONLY_SHIFTS = "|none~0|+|none~0|nor_conv_1x1~1|+|none~0|nor_conv_3x3~1|avg_pool_3x3~2|"
CELLS = (CELL_1, ALL_OPS, NOTHING, EMPTY_NODE, NO_WAY_OUT, ONLY_SHIFTS)
SMALL = Skeleton(channels=4, num_cells=2)
PROXY = Skeleton(num_cells=1, cell_affine=False)


def images(shape: tuple[int, int, int], num: int = 3) -> Tensor:
    return torch.randn(num, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def small_net(cell: str, shape: tuple[int, int, int] = (3, 16, 16), skeleton: Skeleton = SMALL) -> Net:
    """A network in float64 whose affine maps are away from the identity."""
    net = build_cell_net(cell, shape, 5, skeleton=skeleton, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return net


def naive_average(x: Tensor, kernel: int, stride: int, padding: int, size: tuple[int, int]) -> Tensor:
    """Average over the part of each window that lies inside the map."""
    height, width = x.shape[2:]
    rows = []
    for i in range(size[0]):
        top = i * stride - padding
        row = []
        for j in range(size[1]):
            left = j * stride - padding
            bottom, right = min(top + kernel, height), min(left + kernel, width)
            row.append(x[:, :, max(top, 0) : bottom, max(left, 0) : right].mean((2, 3)))
        rows.append(torch.stack(row, -1))
    return torch.stack(rows, -2)


class Naive:
    """The network by its definition: every edge, zeros included, with the weights of a built one."""

    def __init__(self, net: Net, weights: list[dict[str, float]], skeleton: Skeleton) -> None:
        self.state = dict(net.body.state_dict(keep_vars=True))
        self.weights, self.skeleton = weights, skeleton

    def conv_norm(self, x: Tensor, prefix: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{prefix}.0.weight"]
        x = torch.nn.functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        return self.norm(x, f"{prefix}.1")

    def norm(self, x: Tensor, prefix: str) -> Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        x = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        if f"{prefix}.weight" not in self.state:
            return x
        scale, shift = (self.state[f"{prefix}.{name}"].view(1, -1, 1, 1) for name in ("weight", "bias"))
        return x * scale + shift

    def operation(self, x: Tensor, op: str, prefix: str) -> Tensor:
        if op == "none":
            return x * 0
        if op == "skip_connect":
            return x
        if op == "avg_pool_3x3":
            return naive_average(x, 3, 1, 1, (x.shape[2], x.shape[3]))
        return self.conv_norm(x.clamp(min=0), prefix)

    def cell(self, x: Tensor, prefix: str) -> Tensor:
        nodes = [x]
        edges = iter(self.weights)
        for target in (1, 2, 3):
            total = torch.zeros_like(x)
            for source in range(target):
                for op, weight in next(edges).items():
                    name = f"{prefix}.convs.{source}_{target}_{op}"
                    total = total + weight * self.operation(nodes[source], op, name)
            nodes.append(total)
        return nodes[3]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        x = self.conv_norm(x, "stem")
        maps = []
        for stage in range(3):
            if stage:
                prefix = f"reductions.{stage - 1}"
                inner = self.conv_norm(x.clamp(min=0), f"{prefix}.first", stride=2)
                inner = self.conv_norm(inner.clamp(min=0), f"{prefix}.second")
                pooled = naive_average(x, 2, 2, 0, (inner.shape[2], inner.shape[3]))
                weight = self.state[f"{prefix}.shortcut.weight"][:, :, 0, 0]
                x = inner + torch.einsum("nchw,oc->nohw", pooled, weight)
            for index in range(self.skeleton.num_cells):
                x = self.cell(x, f"stages.{stage}.{index}")
            maps.append(x)
        maps[-1] = self.norm(x, "norm").clamp(min=0)
        embedding = maps[-1].flatten(2).mean(2)
        logits = embedding @ self.state["classifier.weight"].T + self.state["classifier.bias"]
        return logits, embedding, maps


def assert_same_values_and_gradients(net: Net, naive: Naive, shape: tuple[int, int, int]) -> None:
    x = images(shape).requires_grad_()
    actual, expected = net.features(x), naive(x)
    tolerance = {"rtol": 1e-8, "atol": 1e-8}
    torch.testing.assert_close(actual.logits, expected[0], **tolerance)
    torch.testing.assert_close(actual.embedding, expected[1], **tolerance)
    assert len(actual.maps) == 3
    for actual_tensor, expected_tensor in zip(actual.maps, expected[2], strict=True):
        torch.testing.assert_close(actual_tensor, expected_tensor, **tolerance)
    inputs = [x, *net.parameters()]
    grads = [
        torch.autograd.grad(logits.square().sum(), inputs, materialize_grads=True)
        for logits in (actual.logits, expected[0])
    ]
    for actual_tensor, expected_tensor in zip(*grads, strict=True):
        torch.testing.assert_close(actual_tensor, expected_tensor, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_forward_and_gradients_equal_the_naive_ones(cell: str, affine: bool) -> None:
    skeleton = replace(SMALL, cell_affine=affine)
    plain: list[dict[str, float]] = [{op: 1.0} for op in parse_arch_str(cell)]
    net = small_net(cell, skeleton=skeleton)
    assert_same_values_and_gradients(net, Naive(net, plain, skeleton), (3, 16, 16))


def test_odd_sides_and_one_channel_equal_the_naive_ones() -> None:
    skeleton = Skeleton(channels=4, num_cells=1)
    net = small_net(ALL_OPS, (1, 17, 18), skeleton)
    weights: list[dict[str, float]] = [{op: 1.0} for op in parse_arch_str(ALL_OPS)]
    assert_same_values_and_gradients(net, Naive(net, weights, skeleton), (1, 17, 18))


@pytest.mark.parametrize(
    ("cell", "width"),  # of the one-hot rows when one_hot is called without a number of classes
    [
        (ALL_OPS, 5),
        (CELL_9930, 4),
        ("|nor_conv_1x1~0|+|none~0|skip_connect~1|+|none~0|none~1|nor_conv_1x1~2|", 3),
        ("|none~0|+|none~0|skip_connect~1|+|skip_connect~0|none~1|none~2|", 2),
        (NOTHING, 1),
    ],
)
def test_mixtures_are_what_a_softmax_over_one_hot_rows_trains(cell: str, width: int) -> None:
    x = images((3, 16, 16))
    for mixture, columns in (("softmax", 5), ("softmax_truncated", width)):
        skeleton = Skeleton(channels=4, num_cells=1, cell_affine=False, mixture=mixture)
        op_indices = torch.tensor([OPS.index(op) for op in parse_arch_str(cell)])
        rows = (
            nn.functional.one_hot(op_indices, 5)
            if mixture == "softmax"
            else nn.functional.one_hot(op_indices)
        )
        assert rows.shape == (6, columns)
        weights = [dict(zip(OPS, row.tolist(), strict=False)) for row in rows.double().softmax(1)]
        net = small_net(cell, skeleton=skeleton)
        assert_same_values_and_gradients(net, Naive(net, weights, skeleton), (3, 16, 16))
        # What it trains is not the cell: the same weights in the cell give something else.
        plain = [{op: 1.0} for op in parse_arch_str(cell)]
        differs = not torch.allclose(net(x), Naive(net, plain, skeleton)(x)[0], atol=1e-3)
        assert differs is (columns > 1)


def test_weights_of_a_mixture_are_e_to_one() -> None:
    """With skips chosen everywhere a cell's first edge gives e/(e+4) of its input, and so on."""
    chosen_weight, other_weight = math.e / (math.e + 4), 1 / (math.e + 4)
    skeleton = Skeleton(channels=2, num_cells=1, cell_affine=False, mixture="softmax")
    net = build_cell_net(to_arch_str(["skip_connect"] * 6), (3, 16, 16), 5, skeleton=skeleton, seed=0)
    cell = net.body.stages[0][0]
    for conv in cell.convs.values():
        conv[0].weight.data.zero_()
    x = torch.ones(2, 2, 6, 6)  # which average pooling keeps
    first = chosen_weight + other_weight
    second = first + first**2
    torch.testing.assert_close(cell(x), (first + first**2 + first * second) * x)


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 32, 32), (1, 28, 28), (3, 17, 30), (4, 64, 64)])
@torch.no_grad()
def test_shapes_and_finite_values(shape: tuple[int, int, int]) -> None:
    net = build_cell_net(ALL_OPS, shape, 7, skeleton=PROXY, seed=0, name="nasbench201_3")
    assert (net.arch, net.image_shape, net.num_classes) == ("nasbench201_3_c16_n1_noaffine", shape, 7)
    x = images(shape, 2).float()
    for training in (True, False):
        logits, embedding, maps = net.train(training).features(x)
        height, width = shape[1:]
        sides = [(height, width), (-(-height // 2), -(-width // 2)), (-(-height // 4), -(-width // 4))]
        assert [m.shape for m in maps] == [(2, 16 * 2**i, *side) for i, side in enumerate(sides)]
        assert logits.shape == (2, 7)
        assert embedding.shape == (2, 64)
        assert all(t.isfinite().all() for t in (logits, embedding, *maps))
        assert torch.equal(net(x), logits)


def test_a_cell_without_edges_gives_every_image_the_same_logits_and_can_be_trained() -> None:
    for affine in (True, False):
        net = build_cell_net(NOTHING, (3, 16, 16), 5, skeleton=Skeleton(4, 1, affine), seed=0)
        logits = net(images((3, 16, 16), 6).float())
        assert torch.equal(logits, logits[:1].expand(6, 5))
        nn.functional.cross_entropy(logits, torch.arange(6) % 5).backward()
        bias = net.body.classifier.bias.grad
        assert bias is not None
        assert bias.abs().max() > 0


def test_names_tell_networks_apart() -> None:
    skeletons = [
        Skeleton(channels, num_cells, affine, mixture)
        for channels, num_cells, affine, mixture in product(
            (8, 16), (1, 5), (True, False), (None, "softmax", "softmax_truncated")
        )
    ]
    assert len({skeleton.suffix for skeleton in skeletons}) == len(skeletons) == 24
    assert BENCHMARK.suffix == "_c16_n5"
    assert build_cell_net(CELL_1, (3, 16, 16), 2, name="nasbench201_1", seed=0).arch == "nasbench201_1_c16_n5"


def test_same_seed_same_bytes_and_the_global_generator_is_left_alone() -> None:
    def weights(seed: int) -> list[Tensor]:
        return list(build_cell_net(ALL_OPS, (3, 16, 16), 5, skeleton=SMALL, seed=seed).parameters())

    before = torch.random.get_rng_state()
    first = weights(5)
    assert torch.equal(before, torch.random.get_rng_state())
    torch.rand(3)
    assert all(torch.equal(a, b) for a, b in zip(first, weights(5), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, weights(6), strict=True))


def test_every_tensor_is_made_on_the_asked_device() -> None:
    net = build_cell_net(ALL_OPS, (3, 16, 16), 5, seed=0, device="meta")
    assert {t.device.type for t in (*net.parameters(), *net.buffers())} == {"meta"}


@pytest.mark.parametrize("cell", [ALL_OPS, NOTHING])
def test_it_compiles_without_a_graph_break_and_takes_channels_last(cell: str) -> None:
    net = small_net(cell)
    x = images((3, 16, 16))
    expected = net(x)
    compiled = torch.compile(net, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-9, atol=1e-9)
    output = net.to(memory_format=torch.channels_last)(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cell", CELLS)
def test_networks_of_two_seeds_can_be_stacked(cell: str) -> None:
    """What training several seeds of a cell at once needs: vmap over weights, running statistics included."""
    nets = [build_cell_net(cell, (3, 16, 16), 5, skeleton=SMALL, seed=seed) for seed in (0, 1)]
    params, buffers = torch.func.stack_module_state(nets)
    x = images((3, 16, 16), 2 * 3).float().unflatten(0, (2, 3))

    def forward(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(nets[0], (params, buffers), (x,))

    stacked = torch.func.vmap(forward)(params, buffers, x)
    expected = torch.stack([net(part) for net, part in zip(nets, x, strict=True)])
    torch.testing.assert_close(stacked, expected, rtol=1e-4, atol=1e-4)
    for index, net in enumerate(nets):
        for name, buffer in net.named_buffers():
            torch.testing.assert_close(buffers[name][index], buffer, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("cell", "classes", "size", "params", "flops"),
    [
        # Published ranges of the benchmark, in millions: the empty cell and the one of convolutions only.
        (NOTHING, 10, 32, 0.073306, 7.78305),
        (to_arch_str(["nor_conv_3x3"] * 6), 10, 32, 1.531546, 220.11969),
        (NOTHING, 100, 32, 0.079156, 7.7889),
        (to_arch_str(["nor_conv_3x3"] * 6), 100, 32, 1.537396, 220.12554),
        (NOTHING, 120, 16, 0.080456, 1.9534),
        (to_arch_str(["nor_conv_3x3"] * 6), 120, 16, 1.538696, 55.03756),
        (CELL_1, 10, 32, 0.802426, 113.95137),
        (CELL_9930, 10, 32, 1.288506, 184.73025),
    ],
)
def test_sizes_are_the_benchmarks(cell: str, classes: int, size: int, params: float, flops: float) -> None:
    actual = cell_net_size(parse_arch_str(cell), (3, size, size), classes)
    assert actual == (round(params * 1e6), round(flops * 1e6))


@pytest.mark.parametrize("mixture", [None, "softmax", "softmax_truncated"])
@pytest.mark.parametrize("affine", [True, False])
def test_sizes_are_those_of_the_built_network(mixture: str | None, affine: bool) -> None:
    shapes = [(3, 32, 32), (1, 16, 16), (1, 28, 28), (5, 17, 30)]
    for (shape, cell), channels, num_cells in product(
        zip(shapes, (CELL_1, ALL_OPS, EMPTY_NODE, NO_WAY_OUT), strict=True), (4, 6), (1, 2)
    ):
        skeleton = Skeleton(channels, num_cells, affine, mixture)
        net = build_cell_net(cell, shape, 7, skeleton=skeleton, seed=0)
        params, flops = cell_net_size(parse_arch_str(cell), shape, 7, skeleton)
        assert params == num_params(net)
        if cell not in (EMPTY_NODE, NO_WAY_OUT):  # which count convolutions that are not run
            assert flops == counted_flops(net)


def counted_flops(net: Net) -> int:
    """Multiply-adds of convolutions and linear layers of one image, and their biases' additions."""
    total = 0

    def count(module: nn.Module, _inputs: object, output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        per_output = weight[0].numel() + (module.bias is not None)
        total += per_output * output[0].numel()

    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    net.eval()(torch.zeros(1, *net.image_shape))
    return total


def test_arch_str_both_ways() -> None:
    ops = parse_arch_str(CELL_1)
    assert ops == (
        "nor_conv_3x3",
        "nor_conv_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "nor_conv_3x3",
        "skip_connect",
    )
    assert to_arch_str(ops) == CELL_1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "|none~0|",
        CELL_1[:-1],
        CELL_1 + "|",
        f" {CELL_1}",
        CELL_1.replace("~2", "~1"),
        CELL_1.replace("+", ""),
        CELL_1 + "+" + CELL_1,
    ],
)
def test_a_malformed_arch_str_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="arch_str must have the form") as caught:
        parse_arch_str(text)
    assert "\n" not in str(caught.value)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="got 'nor_conv_3x4'; did you mean 'nor_conv_3x3'"):
        parse_arch_str(CELL_1.replace("|nor_conv_3x3~1", "|nor_conv_3x4~1"))
    with pytest.raises(InputError, match="6 operations, one per edge, got 5"):
        to_arch_str(["none"] * 5)
    with pytest.raises(InputError, match=r"channels .* at least 1, got 0"):
        Skeleton(channels=0)
    with pytest.raises(InputError, match=r"num_cells .* at least 1, got -1"):
        Skeleton(num_cells=-1)
    with pytest.raises(InputError, match="mixture must be one of softmax, softmax_truncated, got 'sotfmax'"):
        Skeleton(mixture="sotfmax")
    with pytest.raises(InputError, match="at least 16 px"):
        build_cell_net(CELL_1, (3, 16, 8), 10, seed=0)
    with pytest.raises(InputError, match="num_classes must be at least 1"):
        build_cell_net(CELL_1, (3, 16, 16), 0, seed=0)
