"""The Gram form against naive d x d covariances in float64."""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddray.methods.families.matching import covariance as _covariance
from ddray.methods.families.matching.covariance import covariance_distance

SIZES = [(5, 2), (2, 5), (7, 7), (30, 4), (3, 40)]


def features(num_classes: int, num: int, dims: int, *, seed: int, offset: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(dims, dims, generator=generator, dtype=torch.float64)
    samples = torch.randn(num_classes, num, dims, generator=generator, dtype=torch.float64) @ mixed
    return samples + offset * torch.randn(num_classes, 1, dims, generator=generator, dtype=torch.float64)


def naive(real: Tensor, synthetic: Tensor, *, unbiased: bool) -> Tensor:
    """Eq 5 as printed: a d x d matrix per class and set, element by element of the definition."""
    total = real.new_zeros(())
    for one, other in zip(real, synthetic, strict=True):
        matrices = []
        for rows in (one, other):
            mean = sum(rows) / len(rows)
            outer = sum(torch.outer(row - mean, row - mean) for row in rows)
            matrices.append(outer / (len(rows) - int(unbiased)))
        total = total + (matrices[0] - matrices[1]).square().sum() / real.shape[2]
    return total


@pytest.mark.parametrize(
    ("sizes", "dims", "unbiased"), list(itertools.product(SIZES, [1, 6, 33], [False, True]))
)
def test_it_is_the_distance_of_covariances(sizes: tuple[int, int], dims: int, unbiased: bool) -> None:
    real = features(3, sizes[0], dims, seed=1)
    synthetic = features(3, sizes[1], dims, seed=2).requires_grad_(True)

    actual = covariance_distance(real, synthetic, unbiased=unbiased)

    expected = naive(real, synthetic, unbiased=unbiased)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    gradients = [torch.autograd.grad(value, synthetic)[0] for value in (3 * actual, 3 * expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("unbiased", [False, True])
def test_its_gradient_is_that_of_finite_differences(unbiased: bool) -> None:
    real, synthetic = features(2, 4, 5, seed=3), features(2, 3, 5, seed=4).requires_grad_(True)

    assert torch.autograd.gradcheck(lambda x: covariance_distance(real, x, unbiased=unbiased), (synthetic,))


@given(
    num=st.integers(2, 9),
    other=st.integers(2, 9),
    seed=st.integers(0, 2**32),
    scale=st.floats(0.1, 10),
    offset=st.floats(-50, 50),
)
def test_it_is_blind_to_means_and_order_and_grows_with_the_fourth_power(
    num: int, other: int, seed: int, scale: float, offset: float
) -> None:
    real, synthetic = features(2, num, 4, seed=seed), features(2, other, 4, seed=seed + 1)
    distance = covariance_distance(real, synthetic, unbiased=False)

    moved = covariance_distance(real + offset, synthetic.flip(1) - offset, unbiased=False)
    scaled = covariance_distance(real * scale, synthetic * scale, unbiased=False)

    torch.testing.assert_close(moved, distance, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(scaled, distance * scale**4, rtol=1e-9, atol=1e-12)
    assert float(distance) >= 0
    assert float(covariance_distance(real, real.flip(1), unbiased=True)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_in_float32_nearly_coinciding_sets_do_not_cancel(distance: float) -> None:
    real = features(2, 24, 40, seed=5, offset=100.0).float()
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(6))
    synthetic = (real + distance * noise).requires_grad_(True)

    actual = covariance_distance(real, synthetic, unbiased=False)

    exact = synthetic.detach().double().requires_grad_(True)
    expected = naive(real.double(), exact, unbiased=False)
    assert actual.dtype == torch.float32
    centred = [x - x.mean(1, keepdim=True) for x in (real, synthetic.detach())]
    plain = sum(
        sign * (a @ b.mT / 24).square().sum() / 40
        for sign, a, b in ((1, centred[0], centred[0]), (1, centred[1], centred[1]), (-2, *centred))
    )
    gaps = [abs(float(value.detach() - expected.detach())) for value in (actual, plain)]
    assert gaps[0] < 1e-4 * float(expected.detach())
    assert gaps[1] > 10 * gaps[0]  # the error that the implementation avoids
    gradient, expected_gradient = (
        torch.autograd.grad(actual, synthetic)[0],
        torch.autograd.grad(expected, exact)[0],
    )
    assert float((gradient - expected_gradient).norm() / expected_gradient.norm()) < 1e-4


@pytest.mark.parametrize(("num", "other"), [(1, 4), (4, 1), (1, 1)])
@pytest.mark.parametrize("unbiased", [False, True])
def test_one_image_has_no_covariance(num: int, other: int, unbiased: bool) -> None:
    distance = covariance_distance(torch.ones(2, num, 3), torch.ones(2, other, 3), unbiased=unbiased)

    assert float(distance) == 0.0


class Peak(TorchDispatchMode):
    """Tracks the bytes of live tensors that operations created, and the number of elements of the largest."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        input_pointers = {
            leaf.untyped_storage().data_ptr()
            for leaf in torch.utils._pytree.tree_leaves(args)
            if isinstance(leaf, Tensor)
        }
        for tensor in torch.utils._pytree.tree_leaves(outputs):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in input_pointers:
                size = tensor.numel() * tensor.element_size()
                self.live += size
                self.peak = max(self.peak, self.live)
                self.largest = max(self.largest, tensor.numel())
                weakref.finalize(tensor, self._gone, size)
        return outputs

    def _gone(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize(("num", "other"), [(64, 64), (64, 4), (32, 12)])
def test_it_stays_within_two_gram_matrices_and_the_features(num: int, other: int) -> None:
    num_classes, dims = 5, 512
    real = features(num_classes, num, dims, seed=7).float()
    synthetic = features(num_classes, other, dims, seed=8).float().requires_grad_(True)

    with Peak() as memory:
        covariance_distance(real, synthetic, unbiased=False).backward()

    gradient = num_classes * other * dims
    assert 0 < memory.largest < num_classes * dims * dims / 4
    assert 0 < memory.peak - 4 * gradient <= 4 * num_classes * (2 * num * num + num * dims)


@pytest.mark.parametrize("other", [4, 40, 104, 200, 256])
def test_the_gradient_included_it_stays_within_the_bar(other: int) -> None:
    """n = 256, d = 2048: at most 2 n^2 + n d floats per class beyond the features."""
    num_classes, num, dims = 2, 256, 2048
    generator = torch.Generator().manual_seed(9)
    real = torch.rand(num_classes, num, dims, generator=generator)
    synthetic = torch.rand(num_classes, other, dims, generator=generator).requires_grad_(True)

    with Peak() as memory:
        distance = covariance_distance(real, synthetic, unbiased=False)
        (gradient,) = torch.autograd.grad(50 * distance, synthetic)

    assert gradient.shape == synthetic.shape
    assert 0 < memory.peak <= 4 * num_classes * (2 * num * num + num * dims)


@pytest.mark.parametrize(("num", "other"), [(256, 200), (64, 130)])
@pytest.mark.parametrize("unbiased", [False, True])
def test_blocks_of_rows_give_the_same_value_and_gradient(num: int, other: int, unbiased: bool) -> None:
    dims = 40
    assert _covariance._most_rows(num, other, dims) < other
    real = features(2, num, dims, seed=10)
    synthetic = features(2, other, dims, seed=11).requires_grad_(True)

    actual = covariance_distance(real, synthetic, unbiased=unbiased)
    expected = naive(real, synthetic, unbiased=unbiased)

    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    gradients = [torch.autograd.grad(value, synthetic)[0] for value in (3 * actual, 3 * expected)]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-11)


def test_its_gradient_may_be_asked_for_more_than_once() -> None:
    real, synthetic = features(2, 9, 6, seed=12), features(2, 5, 6, seed=13).requires_grad_(True)
    distance = covariance_distance(real, synthetic, unbiased=False)

    first = torch.autograd.grad(
        distance, synthetic, torch.tensor(2.0, dtype=torch.float64), retain_graph=True
    )
    before = first[0].clone()
    second = torch.autograd.grad(distance, synthetic, torch.tensor(-1.0, dtype=torch.float64))

    assert torch.equal(first[0], before)
    torch.testing.assert_close(second[0], before / -2)


def test_it_takes_no_loop_over_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many products for 50 classes as for 2."""
    counts = []
    for num_classes in (2, 50):
        calls: list[Any] = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                calls.append(func)  # noqa: B023 - used within this iteration
                return func(*args, **(kwargs or {}))

        with Count():
            covariance_distance(
                torch.randn(num_classes, 6, 300), torch.randn(num_classes, 4, 300), unbiased=False
            )
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(("columns", "blocks"), [(300, 1), (128, 3), (1, 300)])
def test_a_gpu_takes_as_many_columns_as_fit_its_block(
    columns: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, synthetic = torch.empty(2, 6, 300), torch.empty(2, 4, 300)
    monkeypatch.setattr(_covariance, "_GPU_BLOCK", 8 * 2 * 10 * columns)

    assert len(list(_covariance._blocks(300, _covariance._gpu_columns(real, synthetic)))) == blocks
    monkeypatch.setattr(_covariance, "_GPU_BLOCK", 0)
    assert _covariance._gpu_columns(real, synthetic) == 1


def test_blocks_cover_every_column_once() -> None:
    for dims in (1, 2, 3, 127, 128, 256, 300, 2048):
        columns = [i for part in _covariance._columns(dims) for i in range(part.start, part.stop)]
        assert columns == list(range(dims))
