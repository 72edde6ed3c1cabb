from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

from ddray.artifact.partition import default_factor
from ddray.errors import InputError
from ddray.methods.rded import choose, crop, crop_losses, stitch
from ddray.nets import build_net
from ddray.pool.spec import teacher_spec
from ddray.training.recipe import TeacherRecipe


def test_a_crop_is_torchvisions() -> None:
    images = torch.rand(3, 3, 20, 20, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[0, 0, 20, 20], [3, 5, 10, 8], [18, 18, 2, 2]])

    crops = crop(images, boxes, (10, 10))

    for image, actual, box in zip(images, crops, boxes.tolist(), strict=True):
        expected = tv.resized_crop(image, *box, [10, 10], antialias=True)
        assert torch.allclose(actual, expected, atol=1e-6)


def test_crops_are_scored_in_the_middle_of_a_blank_image() -> None:
    net = build_net("convnet2_w8", (3, 16, 16), 4, seed=0).eval()
    crops = torch.randn(5, 3, 8, 7, generator=torch.Generator().manual_seed(0))

    losses = crop_losses(net, crops, 2, (16, 16))

    padded = torch.zeros(5, 3, 16, 16)
    padded[:, :, 4:12, 4:11] = crops
    assert torch.allclose(losses, -F.log_softmax(net(padded), 1)[:, 2], atol=1e-5)


def test_the_best_crop_of_each_image_comes_before_any_second_best() -> None:
    losses = torch.tensor([[0.9, 0.1], [0.3, 0.2], [0.5, 0.8]])

    assert choose(losses, 3).tolist() == [1, 3, 4]  # .1, .2, .5: one of each image
    assert choose(losses, 6).tolist() == [1, 3, 4, 2, 5, 0]  # then .3, .8, .9


def test_four_crops_make_an_image() -> None:
    crops = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 2, 2)

    stitched = stitch(crops, 2)

    assert stitched.shape == (2, 1, 4, 4)
    assert stitched[0, 0, ::2, ::2].tolist() == [[0, 2], [4, 6]]  # the best two fill the first tile
    assert stitched[1, 0, ::2, ::2].tolist() == [[1, 3], [5, 7]]
    assert torch.equal(stitch(crops, 1), crops)


@pytest.mark.parametrize(("size", "factor"), [(16, 1), (32, 1), (64, 1), (128, 2), (224, 2)])
def test_small_images_are_not_stitched(size: int, factor: int) -> None:
    assert default_factor((3, size, size)) == factor


QUICK = {"teacher_arch": "convnet2_w8", "teacher_epochs": 1}


def test_the_images_are_those_crops_of_their_class_that_the_teacher_knows_best(
    planned: Any, toy: Any
) -> None:
    """Each image has a unique value, so a crop reveals its image and thereby its loss."""
    dataset = toy()
    split = dataset.train()
    split.images[:] = torch.arange(5, 245, 10, dtype=torch.uint8)[:, None, None, None]
    _, ctx, method = planned("rded", dataset, ipc=2, method={**QUICK, "factor": 2, "num_crops": 2})
    recipe = TeacherRecipe(epochs=1)
    net = ctx.pool.get([teacher_spec(dataset, "train", "convnet2_w8", recipe, device=ctx.device)])[0].module()

    method.setup(ctx)

    distilled = method.snapshot()
    pixels = (distilled.space().decode(distilled.images) * 255).round().view(3, 2, 3, 16, 16)
    mean, std = (torch.tensor(statistic)[:, None, None] for statistic in (dataset.mean, dataset.std))
    for label in range(3):
        values = split.images[split.labels == label, 0, 0, 0].float()
        seen = torch.zeros(len(values), 3, 16, 16)
        seen[:, :, 4:12, 4:12] = ((values / 255)[:, None, None, None] - mean) / std
        with torch.no_grad():
            losses = F.cross_entropy(net(seen), torch.full((len(values),), label), reduction="none")
        ranked = values[losses.argsort()]
        expected = torch.cat([ranked, ranked])[:8]  # the best crop of each image, then their second-best
        patches = pixels[label, :, 0, ::8, ::8]  # [image, row, column]
        assert torch.equal(patches.permute(1, 2, 0).flatten(), expected)
        blocks = pixels[label].unfold(2, 8, 8).unfold(3, 8, 8).flatten(4)
        assert torch.equal(blocks.amin(-1), blocks.amax(-1))  # each patch comes from one image


def test_a_class_with_too_few_crops_is_refused(planned: Any, toy: Any) -> None:
    """Too few for ipc in every class, or for a single image in one."""
    _, ctx, method = planned("rded", toy(), ipc=7, method={**QUICK, "factor": 2, "num_crops": 3})
    with pytest.raises(
        InputError, match=r"num_crops must be >= 4 for ipc 7 and factor 2: class 0 has 9 images"
    ):
        method.setup(ctx)
    _, ctx, method = planned("rded", toy((9, 1)), ipc=2, method={**QUICK, "factor": 2, "num_crops": 3})
    with pytest.raises(
        InputError, match=r"num_crops must be >= 4 for ipc 2 and factor 2: class 1 has 1 images, got 3"
    ):
        method.setup(ctx)


def test_a_class_gives_as_many_images_as_its_crops_make(planned: Any, toy: Any) -> None:
    _, ctx, method = planned("rded", toy((9, 2)), ipc=6, method={**QUICK, "factor": 2, "num_crops": 5})
    method.setup(ctx)
    assert torch.bincount(method.snapshot().labels).tolist() == [6, 2]


def test_a_factor_that_does_not_divide_is_refused(planned: Any, toy: Any) -> None:
    _, ctx, method = planned("rded", toy(), method={**QUICK, "factor": 3})
    with pytest.raises(InputError, match="factor must divide the image's sides of 16 x 16 px, got 3"):
        method.setup(ctx)
