from __future__ import annotations

import gc
from pathlib import Path

import kornia
import pytest
import torch

from ddray.data import PixelSpace, Split, fit_zca
from ddray.data import pixels as module
from ddray.data.pixels import channel_statistics, pixel_space
from ddray.errors import InputError
from ddray.system.tensors import load_plain
from ddray.testing import random_dataset


def some_split(num: int = 90, shape: tuple[int, int, int] = (3, 4, 4)) -> Split:
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 256, (num, 1, 1, 1), generator=generator)
    images = (base + torch.randint(0, 128, (num, *shape), generator=generator)).clamp(max=255)
    return Split(images.to(torch.uint8), torch.zeros(num, dtype=torch.long))


def spaces() -> list[PixelSpace]:
    return [
        PixelSpace(),
        PixelSpace("normalized", (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)),
        fit_zca(some_split()),
    ]


@pytest.mark.parametrize("space", spaces(), ids=lambda space: space.kind)
def test_no_batch_outlives_its_encoding(space: PixelSpace) -> None:
    pixels = torch.rand(37, 3, 4, 4)
    space.decode(space.encode(pixels))
    del pixels
    batches = [one for one in gc.get_objects() if type(one) is torch.Tensor and one.shape[:1] == (37,)]
    assert not batches


@pytest.mark.parametrize("space", spaces(), ids=lambda space: space.kind)
def test_decode_inverts_encode(space: PixelSpace) -> None:
    images = some_split().images
    encoded = space.encode(images)
    assert encoded.dtype == torch.float32
    torch.testing.assert_close(space.decode(encoded), images / 255, rtol=0, atol=2e-5)
    torch.testing.assert_close(space.encode(images / 255), encoded, rtol=1e-5, atol=1e-5)
    assert space.to("cpu") is space


def test_normalized_is_mean_and_std_per_channel() -> None:
    space = PixelSpace("normalized", (0.5, 0.0, 0.0), (0.25, 1.0, 2.0))
    images = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert space.encode(images)[0, :, 0, 0].tolist() == [2.0, 1.0, 0.5]


@pytest.mark.parametrize("chunk", [7, 1000])
def test_zca_equals_kornia(chunk: int) -> None:
    split = some_split()
    pixels = split.images.double() / 255
    matrix, mean, inverse = kornia.enhance.zca_mean(pixels, eps=0.1, return_inverse=True)
    space = fit_zca(split, eps=0.1, chunk=chunk)
    assert space.zca_matrix is not None
    assert space.zca_mean is not None
    torch.testing.assert_close(space.zca_matrix.double(), matrix, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(space.zca_mean.double(), mean[0], rtol=1e-4, atol=1e-6)
    expected = kornia.enhance.linear_transform(pixels, matrix, mean)
    torch.testing.assert_close(space.encode(split.images).double(), expected, rtol=1e-4, atol=1e-5)
    back = kornia.enhance.linear_transform(expected, inverse, torch.zeros_like(mean)) + mean.view(1, 3, 4, 4)
    torch.testing.assert_close(space.decode(expected.float()).double(), back, rtol=1e-4, atol=1e-5)


def test_zca_of_fewer_images_than_pixels_equals_kornia() -> None:
    split = some_split(20)
    matrix, _, _ = kornia.enhance.zca_mean(split.images.double() / 255, eps=0.1)
    actual = fit_zca(split).zca_matrix
    assert actual is not None
    torch.testing.assert_close(actual.double(), matrix, rtol=1e-4, atol=1e-6)


def test_zca_of_floats_equals_kornia() -> None:
    images = torch.rand(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 9 - 5
    matrix, _, _ = kornia.enhance.zca_mean(images.double(), eps=0.1)
    actual = fit_zca(Split(images, torch.zeros(60, dtype=torch.long)), chunk=7).zca_matrix
    assert actual is not None
    torch.testing.assert_close(actual.double(), matrix, rtol=1e-4, atol=1e-6)


def test_zca_whitens() -> None:
    split = some_split(400)
    flat = fit_zca(split, eps=1e-6).encode(split.images).flatten(1).double()
    torch.testing.assert_close(flat.mean(0), torch.zeros(48, dtype=torch.float64), rtol=0, atol=1e-3)
    torch.testing.assert_close(torch.cov(flat.T), torch.eye(48, dtype=torch.float64), rtol=0, atol=5e-3)


@pytest.mark.parametrize("threads", [1, 2])
def test_an_image_has_the_same_bytes_whatever_batch_it_is_in(threads: int) -> None:
    """Shards whiten alone what is theirs; without AVX-512, products of few rows are summed otherwise."""
    images, before = some_split(90, (3, 8, 8)).images, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        space = fit_zca(some_split(90, (3, 8, 8)))
        whole = space.encode(images)
        for num in (*range(1, 20), 33, 64):
            assert torch.equal(space.encode(images[7 : 7 + num]), whole[7 : 7 + num])
    finally:
        torch.set_num_threads(before)


def test_gradients_pass_through_encode() -> None:
    images = (some_split(3).images / 255).requires_grad_()
    for space in spaces():
        (gradient,) = torch.autograd.grad(space.encode(images).square().sum(), images)
        assert bool(gradient.abs().sum() > 0)


def test_channel_statistics_do_not_depend_on_the_chunk() -> None:
    images = some_split().images
    mean, std = channel_statistics(images, chunk=7)
    pixels = images.double() / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-9)
    assert std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-9)
    assert channel_statistics(torch.zeros(2, 1, 2, 2)) == ((0.0,), (1.0,))


@pytest.mark.parametrize(
    "make",
    [
        lambda: PixelSpace("whitened"),  # type: ignore[arg-type]
        lambda: PixelSpace("normalized"),
        lambda: PixelSpace("normalized", (0.5,), (0.0,)),
        lambda: PixelSpace("zca"),
        lambda: PixelSpace("zca", zca_mean=torch.zeros(3), zca_matrix=torch.zeros(4, 4)),
        lambda: fit_zca(some_split(1)),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(make: object) -> None:
    assert callable(make)
    with pytest.raises(InputError):
        make()


class TestStoredWhitening:
    def fit(self, split: Split, device: str = "cpu") -> PixelSpace:
        return pixel_space("zca", random_dataset(), split, device)

    def test_it_is_fitted_once_for_the_same_images(
        self, ddray_home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        split, other = some_split(40, (3, 8, 8)), some_split(41, (3, 8, 8))
        first, expected = self.fit(split), fit_zca(split)
        self.fit(other)
        files = {path: path.stat().st_mtime_ns for path in (ddray_home / "whitening").glob("*.pt")}
        monkeypatch.setattr(module, "fit_zca", None)
        again = self.fit(Split(split.images.clone(), split.labels))
        assert len(files) == 2
        assert {path: path.stat().st_mtime_ns for path in files} == files
        for space in (first, again):
            assert space.zca_matrix is not None
            assert space.zca_mean is not None
            assert torch.equal(space.zca_matrix, expected.zca_matrix)  # type: ignore[arg-type]
            assert torch.equal(space.zca_mean, expected.zca_mean)  # type: ignore[arg-type]
        assert again.fit_s == first.fit_s > 0

    def test_a_damaged_file_is_fitted_again_with_a_warning(
        self, ddray_home: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        split = some_split(40, (3, 8, 8))
        first = self.fit(split)
        (file,) = (ddray_home / "whitening").glob("*.pt")
        file.write_bytes(file.read_bytes()[:1000])
        again = self.fit(split)
        assert "is damaged" in caplog.text
        assert torch.equal(again.zca_matrix, first.zca_matrix)  # type: ignore[arg-type]
        assert load_plain(file)["zca_matrix"].shape == (192, 192)

    def test_a_home_that_cannot_be_written_only_costs_the_time(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("DDRAY_HOME", str(tmp_path / "file"))
        space = self.fit(some_split(40, (3, 8, 8)))
        assert space.zca_matrix is not None
        assert "is not kept for other runs" in caplog.text
