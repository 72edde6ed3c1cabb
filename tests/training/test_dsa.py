from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ddray.errors import InputError
from ddray.seeding import derive
from ddray.training.dsa import Dsa, DsaPlan, dsa_for
from ddray.training.operations import NUM_COLUMNS, OPERATIONS, DsaParams, crop_and_flip

ALL = "color_crop_cutout_flip_scale_rotate"
BRIGHTNESS, SATURATION, CONTRAST, SHIFT_Y, SHIFT_X, CUT_Y, CUT_X, FLIP, SCALE_X, SCALE_Y, ROTATE = range(11)


def naive(image: np.ndarray, u: np.ndarray, op: str) -> np.ndarray:
    """One operation on one image [C, H, W] in float64, pixel by pixel; `u` [11] in [0, 1)."""
    image = image.astype(np.float64)
    channels, height, width = image.shape
    out = np.zeros_like(image)
    if op == "color":
        out = image + (u[BRIGHTNESS] - 0.5)
        grey = sum(out[c] for c in range(channels)) / channels
        out = np.stack([(out[c] - grey) * u[SATURATION] * 2 + grey for c in range(channels)])
        return (out - out.mean()) * (u[CONTRAST] + 0.5) + out.mean()
    if op == "flip":
        return image[:, :, ::-1].copy() if u[FLIP] < 0.5 else image
    for y in range(height):
        for x in range(width):
            out[:, y, x] = pixel(image, u, op, y, x)
    return out


def pixel(image: np.ndarray, u: np.ndarray, op: str, y: int, x: int) -> np.ndarray:
    channels, height, width = image.shape
    nothing = np.zeros(channels)
    if op == "crop":
        reach_y, reach_x = int(height * 0.125 + 0.5), int(width * 0.125 + 0.5)
        y += int(u[SHIFT_Y] * (2 * reach_y + 1)) - reach_y
        x += int(u[SHIFT_X] * (2 * reach_x + 1)) - reach_x
        return image[:, y, x] if 0 <= y < height and 0 <= x < width else nothing
    if op == "cutout":
        side_y, side_x = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
        top = int(u[CUT_Y] * (height + 1 - side_y % 2)) - side_y // 2
        left = int(u[CUT_X] * (width + 1 - side_x % 2)) - side_x // 2
        return nothing if top <= y < top + side_y and left <= x < left + side_x else image[:, y, x]
    # Normalised coordinates, with align_corners: -1 and 1 are the centres of the outermost pixels.
    ny, nx = 2 * y / (height - 1) - 1, 2 * x / (width - 1) - 1
    if op == "scale":
        nx, ny = nx * (1 / 1.2 + u[SCALE_X] * (1.2 - 1 / 1.2)), ny * (1 / 1.2 + u[SCALE_Y] * (1.2 - 1 / 1.2))
    else:
        angle = math.radians((u[ROTATE] - 0.5) * 30)
        nx, ny = math.cos(angle) * nx - math.sin(angle) * ny, math.sin(angle) * nx + math.cos(angle) * ny
    sy, sx = (ny + 1) / 2 * (height - 1), (nx + 1) / 2 * (width - 1)
    total = nothing
    for row in (math.floor(sy), math.floor(sy) + 1):
        for column in (math.floor(sx), math.floor(sx) + 1):
            if 0 <= row < height and 0 <= column < width:
                total = total + image[:, row, column] * (1 - abs(sy - row)) * (1 - abs(sx - column))
    return total


def naive_batch(
    images: torch.Tensor, plan: DsaPlan, index: list[int], chains: list[list[str]]
) -> torch.Tensor:
    """Apply each sample's chain of operations with its own parameter set."""
    augmented = []
    for image, row in zip(images.numpy(), index, strict=True):
        for op in chains[int(plan.choices[row])]:
            image = naive(image, plan.params[row].double().numpy(), op)
        augmented.append(torch.from_numpy(np.ascontiguousarray(image)))
    assert augmented
    return torch.stack(augmented)


def some_images(num: int, size: tuple[int, int] = (12, 12), channels: int = 3) -> torch.Tensor:
    return torch.rand(num, channels, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def chains_of(strategy: str, variant: str) -> list[list[str]]:
    names = strategy.split("_")
    if variant == "dsa":
        return [[name] for name in names]
    before = [name for name in ("flip", "color") if name in names]
    after = ["cutout"] if "cutout" in names else []
    rest = [name for name in names if name not in ("flip", "color", "cutout")]
    return [[*before, name, *after] for name in rest] or [[*before, *after]]


@pytest.mark.parametrize("op", list(OPERATIONS))
@pytest.mark.parametrize(("size", "channels"), [((12, 12), 3), ((9, 13), 1)])
def test_every_operation_equals_the_naive_one(op: str, size: tuple[int, int], channels: int) -> None:
    images = some_images(7, size, channels)
    dsa = Dsa(op)
    plan = dsa.draw(7, derive(0, op), shared_op=True)
    expected = naive_batch(images, plan, list(range(7)), [[op]])
    torch.testing.assert_close(dsa.apply(images, plan), expected, rtol=1e-9, atol=1e-9)
    one = dsa.apply(images, plan, torch.full((7,), 4))  # the path of one shared set
    torch.testing.assert_close(one, naive_batch(images, plan, [4] * 7, [[op]]), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variant", ["dsa", "dsa_idc"])
@pytest.mark.parametrize("strategy", [ALL, "color_crop_cutout", "flip_scale_rotate", "flip_color"])
@pytest.mark.parametrize("shared_op", [True, False])
def test_strategies_equal_the_naive_chain(variant: str, strategy: str, shared_op: bool) -> None:
    dsa = Dsa(strategy, variant=variant)  # type: ignore[arg-type]
    images = some_images(9, (8, 8))
    plan = dsa.draw(5, derive(3, strategy), shared_op=shared_op)
    for index in ([0, 0, 0, 1, 1, 2, 3, 3, 4], [4, 1, 4, 0, 2, 3, 1, 0, 2], [2] * 9):
        expected = naive_batch(images, plan, index, chains_of(strategy, variant))
        actual = dsa.apply(images, plan, torch.tensor(index))
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_params_change_the_strengths() -> None:
    images = some_images(4)
    plan = Dsa("rotate").draw(4, derive(0), shared_op=True)
    still = Dsa("rotate", params=DsaParams(rotate=0.0)).apply(images, plan)
    torch.testing.assert_close(still, images)
    assert torch.equal(Dsa("flip", params=DsaParams(flip=0.0)).apply(images, plan), images)
    assert torch.equal(Dsa("flip", params=DsaParams(flip=1.0)).apply(images, plan), images.flip(3))


@pytest.mark.parametrize("variant", ["dsa", "dsa_idc"])
def test_siamese_real_and_synthetic_share_a_class_parameters(variant: str) -> None:
    dsa = dsa_for(True, variant)  # type: ignore[arg-type]
    plan = dsa.draw(4, derive(5), shared_op=False)
    image = some_images(1).float()
    real = dsa.apply(image.expand(8, -1, -1, -1), plan, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))
    synthetic = dsa.apply(image.expand(4, -1, -1, -1), plan, torch.tensor([3, 2, 1, 0]))
    for sample, label in enumerate([0, 0, 1, 1, 2, 2, 3, 3]):
        torch.testing.assert_close(real[sample], synthetic[3 - label])
    assert not torch.allclose(synthetic[0], synthetic[1])


def test_per_sample_mode_has_one_operation_and_different_parameters() -> None:
    dsa = Dsa("color_scale_rotate")
    plan = dsa.draw(6, derive(0), shared_op=True)
    assert len(set(plan.choices.tolist())) == 1
    augmented = dsa.apply(some_images(1).expand(6, -1, -1, -1), plan)
    assert all(not torch.allclose(augmented[0], other) for other in augmented[1:])


def test_per_class_mode_draws_operations_independently_and_uniformly() -> None:
    plan = Dsa(ALL).draw(6000, derive(0), shared_op=False)
    counts = torch.bincount(plan.choices, minlength=6)
    assert bool(((counts - 1000).abs() < 150).all())
    assert plan.params.shape == (6000, NUM_COLUMNS)
    assert 0 <= float(plan.params.min()) <= float(plan.params.max()) < 1


@pytest.mark.parametrize("variant", ["dsa", "dsa_idc"])
def test_gradients_equal_finite_differences(variant: str) -> None:
    dsa = dsa_for(True, variant)  # type: ignore[arg-type]
    plan = dsa.draw(6, derive(1), shared_op=False)
    images = some_images(6, (4, 4)).requires_grad_()
    index = torch.tensor([0, 1, 2, 3, 4, 5])
    assert torch.autograd.gradcheck(lambda x: dsa.apply(x, plan, index), (images,))


def test_equal_generators_give_equal_bytes() -> None:
    dsa, images = dsa_for(True), some_images(5).float()
    first = dsa.apply(images, dsa.draw(5, derive(1), shared_op=False))
    assert torch.equal(first, dsa.apply(images, dsa.draw(5, derive(1), shared_op=False)))
    assert not torch.equal(first, dsa.apply(images, dsa.draw(5, derive(2), shared_op=False)))


def test_global_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    dsa = dsa_for(True, "dsa_idc")
    dsa.apply(some_images(4), dsa.draw(4, derive(0), shared_op=False))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("op", list(OPERATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_format_and_dtype_are_kept(op: str, dtype: torch.dtype) -> None:
    images = some_images(4).to(dtype).contiguous(memory_format=torch.channels_last)
    dsa = Dsa(op)
    augmented = dsa.apply(images, dsa.draw(4, derive(0), shared_op=True))
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    assert augmented.dtype == dtype


def test_no_images_are_no_error() -> None:
    dsa = dsa_for(True)
    images = torch.zeros(0, 3, 8, 8)
    index = torch.zeros(0, dtype=torch.long)
    assert dsa.apply(images, dsa.draw(1, derive(0), shared_op=True), index).shape == images.shape


def test_dsa_for_drops_flip_where_it_changes_the_class() -> None:
    assert "flip" in dsa_for(True).strategy
    assert dsa_for(False, "dsa_idc").strategy == "color_crop_cutout_scale_rotate"


def test_bad_input_is_refused() -> None:
    with pytest.raises(InputError, match="did you mean 'color'"):
        Dsa("colour_crop")
    with pytest.raises(InputError, match="got ''"):
        Dsa("")
    with pytest.raises(InputError, match="once"):
        Dsa("crop_crop")
    with pytest.raises(InputError, match="variant"):
        Dsa("crop", variant="idc")  # type: ignore[arg-type]
    dsa = Dsa("crop")
    with pytest.raises(InputError, match="at least 1"):
        dsa.draw(0, derive(0), shared_op=True)
    plan = dsa.draw(2, derive(0), shared_op=True)
    with pytest.raises(InputError, match="parameter sets"):
        dsa.apply(some_images(3), plan)
    with pytest.raises(InputError, match="parameter sets"):
        dsa.apply(some_images(2), plan, torch.tensor([0, 2]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_gpu_equals_cpu() -> None:
    dsa, images = dsa_for(True, "dsa_idc"), some_images(8).float()
    plan = dsa.draw(4, derive(0), shared_op=False)
    index = torch.tensor([0, 3, 1, 2, 0, 1, 2, 3])
    actual = dsa.apply(images.cuda(), plan, index.cuda())
    torch.testing.assert_close(actual.cpu(), dsa.apply(images, plan, index), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 48), (16, 16)])
def test_random_crops_pad_four_pixels_at_every_size(height: int, width: int) -> None:
    """KRR-ST's RandomCrop(side, padding=4): every shift in -4..4 each way, and none beyond."""
    images = torch.arange(1.0, height * width + 1).view(1, 1, height, width).expand(600, -1, -1, -1)
    cropped = crop_and_flip(images, torch.Generator().manual_seed(0), can_flip=False)
    middle = cropped[:, 0, height // 2, width // 2].long() - 1
    down, right = middle // width - height // 2, middle % width - width // 2
    assert set(down.tolist()) == set(right.tolist()) == set(range(-4, 5))


def test_the_axes_of_an_operation_have_draws_of_their_own() -> None:
    params = Dsa(ALL).draw(4000, derive(0, "axes"), shared_op=False).params
    for one, other in ((SHIFT_Y, SHIFT_X), (CUT_Y, CUT_X), (SCALE_X, SCALE_Y)):
        assert np.corrcoef(params[:, one], params[:, other])[0, 1] == pytest.approx(0, abs=0.06)
