from __future__ import annotations

import itertools
import math
import shutil
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ddray.distillation.method import Target
from ddray.errors import InputError
from ddray.methods.datadam import (
    DataDAMConfig,
    attention,
    datadam_loss,
    discrepancy,
    mean_embedding_loss,
    preset,
)
from ddray.nets.names import resolve_arch

POWERS = (1, 2, 3, 4, 8, 1.5)
NORMS = ("l2", "l1", "none")
LOSSES = ("mse", "mae", "cosine")


def naive_attention(maps: Tensor, p: float, norm: str) -> list[list[float]]:
    """Pixel by pixel in Python floats: A(y, x) = sum_c |F(c, y, x)|^p, divided by its sample's norm."""
    num, channels, height, width = maps.shape
    attentions = []
    for n in range(num):
        powers = [
            sum(abs(float(maps[n, c, y, x])) ** p for c in range(channels))
            for y in range(height)
            for x in range(width)
        ]
        size = {"l2": math.sqrt(sum(a * a for a in powers)), "l1": sum(powers), "none": 1.0}[norm]
        attentions.append([a / size for a in powers])
    return attentions


def class_means(rows: list[list[float]], num_classes: int) -> list[list[float]]:
    """Means of class-sorted rows, equally many per class."""
    per = len(rows) // num_classes
    return [
        [sum(rows[c * per + i][d] for i in range(per)) / per for d in range(len(rows[0]))]
        for c in range(num_classes)
    ]


def naive_distance(a: list[float], b: list[float], loss: str) -> float:
    if loss == "mse":
        return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))
    if loss == "mae":
        return sum(abs(x - y) for x, y in zip(a, b, strict=True))
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return 1 - dot / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))


def maps(num: int, seed: int) -> list[Tensor]:
    """Two layers of signed maps (a LeakyReLU's are negative too), float64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num, 3, 4, 2), (num, 2, 2, 2)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize(("p", "norm"), list(itertools.product(POWERS, NORMS)))
def test_attention_is_the_papers_sum_of_powers_normalised_per_sample(p: float, norm: Any) -> None:
    layer_map = maps(3, seed=1)[0]

    actual = attention(layer_map, p, norm)

    expected = torch.tensor(naive_attention(layer_map, p, norm), dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("p", "norm"), list(itertools.product(POWERS, NORMS)))
def test_attention_with_gradients_is_the_same_and_its_gradient_is_right(p: float, norm: Any) -> None:
    layer_map = maps(2, seed=2)[1]
    live = layer_map.clone().requires_grad_(True)

    assert torch.equal(attention(live, p, norm).detach(), attention(layer_map, p, norm))
    assert torch.autograd.gradcheck(lambda x: attention(x, p, norm), (live,))


@pytest.mark.parametrize("p", POWERS)
def test_attention_leaves_the_maps_as_they_are(p: float) -> None:
    """Without gradients powers are computed in place, but not in the network's own maps."""
    layer_map = maps(2, seed=3)[0]
    before = layer_map.clone()

    attention(layer_map, p, "l2")

    assert torch.equal(layer_map, before)


@pytest.mark.parametrize(("p", "norm"), list(itertools.product(POWERS, NORMS)))
def test_attention_in_the_maps_own_memory_is_the_same(p: float, norm: Any) -> None:
    layer_map = maps(2, seed=3)[0]
    expected = attention(layer_map, p, norm)

    assert torch.equal(attention(layer_map.clone(), p, norm, overwrite=True), expected)


@pytest.mark.parametrize(("p", "norm", "loss"), list(itertools.product(POWERS, NORMS, LOSSES)))
def test_loss_is_l_sam_plus_lambda_l_mmd(p: float, norm: Any, loss: Any) -> None:
    num_classes, lambda_mmd, scale = 2, 0.3, 7.0
    real_maps, syn_maps = maps(6, seed=4), maps(4, seed=5)
    generator = torch.Generator().manual_seed(6)
    real_emb = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    syn_emb = torch.randn(4, 5, generator=generator, dtype=torch.float64)

    def means(values: list[Tensor], embedding: Tensor) -> list[Tensor]:
        statistics = [*(attention(m, p, norm) for m in values), embedding]
        return [value.view(num_classes, -1, value.shape[1]).mean(1) for value in statistics]

    actual = datadam_loss(
        means(real_maps, real_emb),
        means(syn_maps, syn_emb),
        lambda_mmd=lambda_mmd,
        loss_scale=scale,
        loss=loss,
    )

    l_sam = 0.0
    for real, syn in zip(real_maps, syn_maps, strict=True):
        a = class_means(naive_attention(real, p, norm), num_classes)
        b = class_means(naive_attention(syn, p, norm), num_classes)
        l_sam += sum(naive_distance(a[c], b[c], loss) for c in range(num_classes))
    a, b = class_means(real_emb.tolist(), num_classes), class_means(syn_emb.tolist(), num_classes)
    l_mmd = sum(naive_distance(a[c], b[c], "mse") for c in range(num_classes))
    assert float(actual) == pytest.approx(scale * (l_sam + lambda_mmd * l_mmd), rel=1e-11)


@given(
    seed=st.integers(0, 2**32),
    p=st.sampled_from(POWERS),
    scale=st.floats(0.2, 5),
    norm=st.sampled_from(NORMS),
)
def test_attention_is_blind_to_sign_and_a_normalised_one_to_scale(
    seed: int, p: float, scale: float, norm: Any
) -> None:
    layer_map = maps(2, seed)[0]
    power = scale**p if norm == "none" else 1.0

    torch.testing.assert_close(
        attention(-layer_map, p, norm), attention(layer_map, p, norm), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        attention(scale * layer_map, p, norm), power * attention(layer_map, p, norm), rtol=1e-9, atol=1e-300
    )


@given(seed=st.integers(0, 2**32), loss=st.sampled_from(LOSSES), num_classes=st.integers(1, 6))
def test_losses_do_not_depend_on_the_order_of_classes_and_vanish_at_equality(
    seed: int, loss: Any, num_classes: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    real, syn = (torch.randn(num_classes, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    order = torch.randperm(num_classes, generator=generator)

    for function in (lambda a, b: discrepancy(a, b, loss), mean_embedding_loss):
        torch.testing.assert_close(function(real[order], syn[order]), function(real, syn))
        assert float(function(real, real)) == pytest.approx(0.0, abs=1e-12)
        assert float(function(real, syn)) > 0


@pytest.mark.parametrize("norm", NORMS)
def test_the_feature_map_transfer_loss_matches_class_means_of_the_maps_themselves(
    norm: Any, toy: Any, planned: Any
) -> None:
    """Fig 11 (c), written anew: squared distances of class means of each sample's flattened, normed maps."""
    _, ctx, method = planned(
        "datadam",
        toy(counts=(6, 6, 6)),
        ipc=2,
        arch="convnet3_w4",
        method={"maps": "features", "lambda_mmd": 0, "sam_norm": norm, "augment": "none", "batch_real": 99},
    )
    method.setup(ctx)
    engine = method._engine
    images = {"real": ctx.space.encode(ctx.split.images), "learned": engine._images.detach().clone()}
    labels = {"real": ctx.split.labels, "learned": engine._labels}
    loss = float(method.step()["loss"])

    expected = 0.0
    for layer in (0, 1):  # all but the last
        means = []
        for name in ("real", "learned"):
            with torch.no_grad():
                layer_map = engine._branch.net.features(images[name]).maps[layer].double()
            flat = layer_map.reshape(len(images[name]), -1)
            sizes = {"l2": flat.square().sum(1).sqrt(), "l1": flat.abs().sum(1), "none": torch.ones(1)}
            flat = flat / sizes[norm][:, None]
            means.append(torch.stack([flat[labels[name] == label].mean(0) for label in range(3)]))
        expected += float((means[0] - means[1]).square().sum())
    assert loss == pytest.approx(100 * expected, rel=1e-4)


def test_l_mmd_alone_is_a_loss_without_layers_and_nothing_at_all_is_refused(toy: Any, planned: Any) -> None:
    _, ctx, method = planned("datadam", toy(), method={"layers": [], "batch_real": 4})
    method.setup(ctx)
    assert float(method.step()["loss"]) > 0

    with pytest.raises(InputError, match="layers must name a layer where lambda_mmd is 0"):
        planned("datadam", toy(), method={"layers": [], "lambda_mmd": 0})


def test_units_from_before_the_choice_of_maps_keep_their_keys() -> None:
    assert "maps" not in DataDAMConfig().dump()
    assert DataDAMConfig(maps="features").dump()["maps"] == "features"
    assert DataDAMConfig.parse(DataDAMConfig(maps="features").dump()).maps == "features"


@pytest.mark.parametrize("layers", [(0,), (3,), (-1, 1)])
def test_layers_that_the_network_has_not_are_refused(layers: Any, toy: Any, planned: Any) -> None:
    with pytest.raises(InputError, match=r"method\.layers must be within 1\.\.2 for convnet2_w8"):
        planned("datadam", toy(), steps=1, method={"layers": list(layers)})


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler")
def test_compiled_steps_have_the_losses_of_eager_ones_without_recompilation(toy: Any, planned: Any) -> None:
    steps = []
    for choice in ("off", "on"):
        _, ctx, method = planned(
            "datadam", toy(), arch="convnet1_w8", compile=choice, method={"batch_real": 4}
        )
        method.setup(ctx)
        steps.append(method.step)
    eager, compiled = (float(step()["loss"]) for step in steps)
    assert compiled == pytest.approx(eager, rel=1e-3)
    with torch.compiler.set_stance("fail_on_recompile"):  # though every step draws new weights
        for _ in range(3):
            eager, compiled = (float(step()["loss"]) for step in steps)
            assert compiled == pytest.approx(eager, rel=1e-3)


@pytest.mark.parametrize(
    ("size", "paper", "repo"),
    [
        (32, "convnet3", "convnet3_bn"),
        (64, "convnet4", "convnet4_bn"),
        (128, "convnet5", "convnet6_bn"),
        (160, "convnet6", "convnet6_bn"),
    ],
)
def test_the_code_has_six_blocks_at_128_px_and_the_paper_five(size: int, paper: str, repo: str) -> None:
    shape = (3, size, size)
    target = Target("imagenette", shape, 10, 1)

    archs = [resolve_arch(preset(name, target)["arch"], shape) for name in ("paper", "repo")]

    assert archs == [paper, repo]
