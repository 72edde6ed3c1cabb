from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddray.data import open_dataset
from ddray.data.catalog import KNOWN
from ddray.errors import InputError
from tests.data.data_files import as_pil, random_images, write_png


def by_class(
    root: Path, classes: list[str], num: int, *, size: int = 8, channels: int = 3, suffix: str = ""
) -> None:
    for label, name in enumerate(classes):
        for index, image in enumerate(random_images(num, (channels, size, size), seed=label)):
            write_png(root / name / suffix / f"{index:02}.png", image)


def colored(root: Path, classes: list[str], num: int, size: tuple[int, int] = (150, 200)) -> None:
    """Images of one colour per class: the grey value is 10 times the label."""
    for label, name in enumerate(classes):
        for index in range(num):
            (root / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", size, (label * 10,) * 3).save(root / name / f"{index}.JPEG", quality=100)


@pytest.mark.parametrize("held_out", ["test", "val", "validation"])
def test_train_and_test_by_class(tmp_path: Path, held_out: str) -> None:
    by_class(tmp_path / "train", ["b", "a"], 3)
    by_class(tmp_path / held_out, ["b"], 2)
    data = open_dataset(str(tmp_path))
    assert data.class_names == ("a", "b")
    assert data.image_shape == (3, 8, 8)
    assert data.train().labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert torch.equal(data.train().images[3:], torch.from_numpy(random_images(3, (3, 8, 8), seed=0)))
    assert data.test().labels.tolist() == [1, 1]


def test_class_folders_alone_give_a_fixed_fifth_to_test(tmp_path: Path) -> None:
    by_class(tmp_path / "set", ["a", "b"], 10, channels=1)
    data = open_dataset(str(tmp_path / "set"))
    assert data.image_shape == (1, 8, 8)
    assert torch.bincount(data.train().labels).tolist() == [8, 8]
    assert torch.bincount(data.test().labels).tolist() == [2, 2]


def test_grey_images_among_coloured_ones_become_rgb(tmp_path: Path) -> None:
    by_class(tmp_path / "train", ["a"], 2)
    grey = random_images(2, (1, 8, 8))
    write_png(tmp_path / "train" / "b" / "0.png", grey[0])
    as_pil(grey[1]).convert("P").save(tmp_path / "train" / "b" / "1.png")
    by_class(tmp_path / "test", ["a"], 1)
    images = open_dataset(str(tmp_path)).train().images
    assert images.shape == (4, 3, 8, 8)
    for index in range(2):
        assert torch.equal(images[2 + index], torch.from_numpy(grey[index]).expand(3, -1, -1))


@pytest.mark.parametrize(
    ("size", "expected"), [((200, 300), 128), ((100, 65), 64), ((40, 33), 32), ((20, 9), 32)]
)
def test_other_images_are_resized_to_a_standard_size(
    tmp_path: Path, size: tuple[int, int], expected: int
) -> None:
    colored(tmp_path / "train", ["a", "b"], 2, size)
    colored(tmp_path / "test", ["a", "b"], 1, (90, 250))
    data = open_dataset(str(tmp_path))
    assert data.image_shape == (3, expected, expected)
    assert data.test().images.shape == (2, 3, expected, expected)
    assert data.test().images[1].unique().tolist() == [10]


@pytest.mark.parametrize(("size", "expected"), [(224, 224), (256, 256), (257, 128)])
def test_square_jpegs_of_one_size_keep_it(tmp_path: Path, size: int, expected: int) -> None:
    """imagenette-224: train/ and val/, a folder per WordNet id."""
    wnids = ["n01440764", "n02102040"]
    colored(tmp_path / "train", wnids, 3, (size, size))
    colored(tmp_path / "val", wnids, 1, (size, size))

    data = open_dataset(str(tmp_path))

    assert data.image_shape == (3, expected, expected)
    assert data.train().images.shape == (6, 3, expected, expected)
    assert data.test().images.shape == (2, 3, expected, expected)
    assert data.train().images[5].unique().tolist() == [10]


def test_a_named_dataset_keeps_its_own_size(tmp_path: Path) -> None:
    for half in ("train", "val"):
        colored(tmp_path / "imagenette2" / half, list(KNOWN["imagenette"].wnids), 1, (224, 224))
    assert open_dataset("imagenette", data_dir=tmp_path).image_shape == (3, 128, 128)


def test_resizing_is_short_side_then_centre_crop(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, None], (3, 64, 200))
    for name in ("a", "b"):
        write_png(tmp_path / "train" / name / "0.png", ramp - (name == "b"))
    by_class(tmp_path / "test", ["a"], 1)
    image = open_dataset(str(tmp_path)).train().images[0]
    assert torch.equal(image, torch.arange(68, 132, dtype=torch.uint8).expand(3, 64, 64))


def test_broken_files_are_named(tmp_path: Path) -> None:
    by_class(tmp_path / "train", ["a", "b"], 2)
    by_class(tmp_path / "test", ["a"], 1)
    (tmp_path / "test" / "a" / "00.png").write_bytes(b"nothing")
    data = open_dataset(str(tmp_path))
    with pytest.raises(InputError, match=r"test/a/00.png"):
        data.test()
    broken = tmp_path / "train" / "b" / "01.png"
    broken.write_bytes(broken.read_bytes()[:-60])
    with pytest.raises(InputError, match=r"train/b/01.png"):
        open_dataset(str(tmp_path))


def test_empty_and_strange_class_folders_are_refused(tmp_path: Path) -> None:
    by_class(tmp_path / "x" / "train", ["a", "d"], 2)
    by_class(tmp_path / "x" / "test", ["a", "c"], 1)
    with pytest.raises(InputError, match="'c'"):
        open_dataset(str(tmp_path / "x")).test()
    (tmp_path / "x" / "train" / "b").mkdir()
    with pytest.raises(InputError, match="train/b"):
        open_dataset(str(tmp_path / "x"))
    (tmp_path / "y").mkdir()
    with pytest.raises(InputError, match="must hold train"):
        open_dataset(str(tmp_path / "y"))


def test_tiny_imagenet_val_annotations(tmp_path: Path) -> None:
    root = tmp_path / "tiny-imagenet-200"
    wnids = ["n02", "n01"]
    by_class(root / "train", wnids, 3, size=64, suffix="images")
    val = random_images(4, (3, 64, 64), seed=9)
    lines = []
    for index, image in enumerate(val):
        write_png(root / "val" / "images" / f"val_{index}.png", image)
        lines.append(f"val_{index}.png\t{wnids[index % 2]}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    write_png(root / "test" / "images" / "test_0.png", val[0])  # unlabelled, to be ignored
    (root / "words.txt").write_text("n01\tegg, ovum\nn02\tspoon\n")
    data = open_dataset("tiny_imagenet", data_dir=tmp_path)
    assert data.class_names == ("egg", "spoon")
    assert data.train().labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.test().labels.tolist() == [1, 0, 1, 0]
    assert torch.equal(data.test().images, torch.from_numpy(val))
    assert open_dataset(str(root)).fingerprint == data.fingerprint


@pytest.mark.parametrize("name", ["imagenette", "imagewoof", "imagesquawk"])
def test_imagenet_subsets_in_the_papers_order(tmp_path: Path, name: str) -> None:
    wnids = list(KNOWN[name].wnids)
    assert len(set(wnids)) == 10
    colored(tmp_path / "imagenet" / "train", [*wnids, "n00000001"], 1)
    colored(tmp_path / "imagenet" / "val", [*wnids, "n00000001"], 1)
    data = open_dataset(name, data_dir=tmp_path)
    assert data.image_shape == (3, 128, 128)
    assert data.train().labels.tolist() == list(range(10))
    assert data.train().images[:, 0, 0, 0].tolist() == [10 * label for label in range(10)]
    assert data.test().images[:, 0, 0, 0].tolist() == [10 * label for label in range(10)]
    assert data.class_names == KNOWN[name].class_names
    renamed = tmp_path / "own"
    renamed.mkdir()
    (tmp_path / "imagenet").rename(renamed / name)  # the same folder under the subset's own name
    assert open_dataset(name, data_dir=renamed).fingerprint == data.fingerprint


def test_an_incomplete_subset_is_refused(tmp_path: Path) -> None:
    colored(tmp_path / "imagenette" / "train", list(KNOWN["imagenette"].wnids[1:]), 1)
    with pytest.raises(InputError, match="n01440764"):
        open_dataset("imagenette", data_dir=tmp_path)


def test_imagenet_is_resized_to_64(tmp_path: Path) -> None:
    colored(tmp_path / "imagenet" / "train", ["n01", "n02"], 1)
    colored(tmp_path / "imagenet" / "val", ["n01", "n02"], 1)
    data = open_dataset("imagenet", data_dir=tmp_path)
    assert data.train().images.shape == (2, 3, 64, 64)
    assert data.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("folder", ["CUB_200_2011", "cub200", "cub200/CUB_200_2011"])
def test_cub(tmp_path: Path, folder: str) -> None:
    root = tmp_path / folder
    files = ["002.Auk/a.jpg", "001.Wren/b.jpg", "001.Wren/c.jpg", "002.Auk/d.jpg"]
    for index, file in enumerate(files):
        path = root / "images" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (80, 100), (index * 10,) * 3).save(path, quality=100)
    (root / "images.txt").write_text("".join(f"{i} {file}\n" for i, file in enumerate(files, 1)))
    (root / "image_class_labels.txt").write_text("1 2\n2 1\n3 1\n4 2\n")
    (root / "train_test_split.txt").write_text("1 1\n2 1\n3 0\n4 0\n")
    data = open_dataset("cub200", data_dir=tmp_path)
    assert data.class_names == ("Wren", "Auk")
    assert data.image_shape == (3, 64, 64)
    assert data.train().labels.tolist() == [1, 0]
    assert data.train().images[:, 0, 0, 0].tolist() == [0, 10]
    assert data.test().labels.tolist() == [0, 1]
    (root / "image_class_labels.txt").write_text("1 2\n")
    with pytest.raises(InputError, match="label"):
        open_dataset("cub200", data_dir=tmp_path)


def test_stanford_dogs(tmp_path: Path) -> None:
    from scipy.io import savemat

    root = tmp_path / "stanford_dogs"
    colored(root / "Images", ["n01-Pug", "n02-Wolf_hound"], 2)
    for half, index in (("train", 0), ("test", 1)):
        cells = np.empty((2, 1), dtype=object)
        cells[:, 0] = [f"n01-Pug/{index}.JPEG", f"n02-Wolf_hound/{index}.JPEG"]
        savemat(
            root / f"{half}_list.mat", {"file_list": cells, "labels": np.array([[1], [2]], dtype=np.uint8)}
        )
    data = open_dataset("stanford_dogs", data_dir=tmp_path)
    assert data.class_names == ("Pug", "Wolf_hound")
    assert data.train().labels.tolist() == [0, 1]
    assert data.test().images[:, 0, 0, 0].tolist() == [0, 10]
    (root / "test_list.mat").write_bytes(b"broken")
    broken = open_dataset("stanford_dogs", data_dir=tmp_path)
    assert broken.fingerprint == data.fingerprint
    with pytest.raises(InputError, match=r"test_list\.mat"):
        broken.test()
