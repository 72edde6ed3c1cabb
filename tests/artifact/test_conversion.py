"""Sets of other projects become ours: labels, pixels, and images that hold several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddray.artifact.conversion import adopt
from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.foreign import ForeignRequest, ForeignSet
from ddray.artifact.partition import padded_parts
from ddray.artifact.reading import load
from ddray.data import Dataset, PixelSpace
from ddray.errors import InputError
from tests.artifact.foreign.sets import LABELS, normal, normalized, pixels


@pytest.fixture
def dataset(toy: Any) -> Dataset:
    opened: Dataset = toy()
    return opened


def test_classes_without_images_and_values_like_pixels_are_said(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"data": [pixels(2), torch.tensor([0, 2])]}, tmp_path / "a.pt")

    load(tmp_path / "a.pt", ForeignRequest(dataset))

    assert "has no image of 1 classes: class 1" in caplog.text
    assert "a.pt is taken as normalised, but its values spread by 0.29, the real ones by" in caplog.text
    caplog.clear()
    space = PixelSpace("raw", dataset.mean, dataset.std)
    assert torch.equal(
        load(tmp_path / "a.pt", ForeignRequest(dataset, pixel_space=lambda: space)).images, pixels(2)
    )
    torch.save({"data": [normal(), LABELS]}, tmp_path / "a.pt")
    load(tmp_path / "a.pt", ForeignRequest(dataset))
    assert "spread" not in caplog.text


def test_bytes_are_pixels(dataset: Dataset, tmp_path: Path) -> None:
    images = (pixels() * 255).round().to(torch.uint8)
    torch.save({"data": [images, LABELS]}, tmp_path / "a.pt")

    loaded = load(tmp_path / "a.pt", ForeignRequest(dataset))

    torch.testing.assert_close(loaded.images, normalized(images / 255, dataset))


def test_fractions_are_no_labels(dataset: Dataset, tmp_path: Path) -> None:
    torch.save({"data": [normal(), LABELS / 2]}, tmp_path / "a.pt")

    with pytest.raises(InputError, match=r"labels \[N\] >= 0, in whole numbers, got 0\.\.1"):
        load(tmp_path / "a.pt", ForeignRequest(dataset))


def test_soft_labels_are_probabilities_of_every_image(dataset: Dataset, tmp_path: Path) -> None:
    torch.save({"data": [normal(), torch.rand(6, 3).softmax(1)]}, tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt", ForeignRequest(dataset))

    def broken(soft_labels: Tensor) -> DistilledSet:
        return DistilledSet(loaded.images, loaded.labels, loaded.meta, soft_labels=soft_labels)

    with pytest.raises(InputError, match=r"soft_labels must be float32 \[6, 3\], got .*\[6, 2\]"):
        broken(torch.full((6, 2), 0.5)).validate()
    with pytest.raises(InputError, match="must be probabilities that sum to 1"):
        broken(torch.full((6, 3), 0.5)).validate()


def test_every_part_of_an_image_has_its_labels(dataset: Dataset, tmp_path: Path) -> None:
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(2)) * 3
    torch.save([pixels(), logits], tmp_path / "data.pt")

    loaded = load(tmp_path / "data.pt", ForeignRequest(dataset, factor=2))

    assert torch.equal(loaded.soft_labels, logits.repeat_interleave(4, 0))
    assert torch.equal(loaded.decode().soft_labels, loaded.soft_labels.softmax(1))
    assert torch.equal(loaded.labels, logits.argmax(1).repeat_interleave(4))
    assert len(loaded.images) == 24
    assert loaded.meta.storage_floats == 6 * 3 * 16 * 16 + 6 * 3


@pytest.mark.parametrize(("is_unit", "grey"), [(True, 0.5), (False, 0.0)])
def test_images_are_padded_with_grey_of_their_space(
    is_unit: bool, grey: float, dataset: Dataset, tmp_path: Path
) -> None:
    """16 pixels are 3 x 6 with a border of 2: 0.5 of pixels in 0..1, the mean of normalised ones."""
    stored = pixels() if is_unit else normal()
    foreign = ForeignSet(stored, LABELS, is_unit=is_unit, is_divided=True)

    adopted = adopt(tmp_path / "a", "a", foreign, ForeignRequest(dataset, factor=3))

    expected = padded_parts(stored, 3, 3, grey)
    torch.testing.assert_close(adopted.images, normalized(expected, dataset) if is_unit else expected)
    last = torch.nn.functional.pad(stored, (0, 2, 0, 2), value=grey)[:, :, 12:, 12:]
    up = torch.nn.functional.interpolate(last, (16, 16), mode="bilinear", align_corners=False)
    assert torch.equal(expected[8::9], up)


def test_no_space_is_fitted_for_what_is_refused(dataset: Dataset, tmp_path: Path) -> None:
    """ZCA takes minutes on a large dataset."""

    def fit() -> PixelSpace:
        raise AssertionError("fitted")

    request = ForeignRequest(dataset, fit)
    torch.save({"data": [[normal(), LABELS]] * 2, "accs_all_exps": {"a": [0.1, 0.2]}}, tmp_path / "res_a.pt")
    with pytest.raises(InputError, match=r"--index must be in 0\.\.1"):
        load(tmp_path / "res_a.pt", request, index=2)
    with pytest.raises(AssertionError, match="fitted"):
        load(tmp_path / "res_a.pt", request, index=1)
    load(tmp_path / "res_a.pt", ForeignRequest(dataset), index=1).save(tmp_path / "ours.pt")
    load(tmp_path / "ours.pt", request)
