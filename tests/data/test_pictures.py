"""Pictures in every mode that files have: their pixels are those that a person sees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddray.data import Dataset, open_dataset
from ddray.errors import InputError
from tests.data.data_files import random_images, write_png

ORIENTATION = 0x0112


def opened(root: Path, images: list[Image.Image], suffix: str = "png", **options: Any) -> Dataset:
    """A dataset of classes a and b, with the images in a/ and an opaque grey one in b/."""
    for name in ("train", "test"):
        for index, image in enumerate(images):
            path = root / name / "a" / f"{index}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, **options)
        write_png(root / name / "b" / "0.png", random_images(1, (1, images[0].height, images[0].width), 9)[0])
    return open_dataset(str(root))


def ink(mode: str) -> Image.Image:
    """Black on transparency: columns 0..3 are transparent, 4..7 opaque; column 3 is half."""
    alpha = np.repeat(np.array([[0, 0, 0, 128, 255, 255, 255, 255]], np.uint8), 8, 0)
    rgba = Image.fromarray(np.dstack([np.zeros((8, 8, 3), np.uint8), alpha]))
    if mode == "P":
        palette = Image.new("P", (8, 8), 1)
        palette.putpalette([0, 0, 0, 0, 0, 0])
        palette.paste(0, (4, 0, 8, 8))
        palette.info["transparency"] = 1
        return palette
    if mode == "RGB":
        image = Image.new("RGB", (8, 8), (1, 2, 3))
        image.paste((0, 0, 0), (4, 0, 8, 8))
        return image
    return rgba.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_transparency_is_laid_on_white(tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture) -> None:
    options = {"transparency": (1, 2, 3)} if mode == "RGB" else {}
    images = opened(tmp_path / "set", [ink(mode)] * 2, **options).train().images
    row = images[0, 0, 0].tolist()
    half = 127 if mode in ("RGBA", "LA") else 255
    assert row == [255, 255, 255, half, 0, 0, 0, 0]
    assert images.shape[1] == (1 if mode == "LA" else 3)
    assert "2 of 3 images are laid on white where they are transparent, such as" in caplog.text
    assert str(tmp_path / "set" / "train" / "a" / "0.png") in caplog.text


def test_a_palette_with_alpha_is_laid_on_white(tmp_path: Path) -> None:
    """Mode PA, which TIFF files have."""
    from ddray.data.pictures import Item, _prepared

    changes: list[str] = []
    image = _prepared(ink("RGBA").convert("PA"), Item("x", 0, b""), "L", changes)
    assert np.asarray(image)[0].tolist() == [255, 255, 255, 127, 0, 0, 0, 0]
    assert len(changes) == 1


def test_an_opaque_alpha_channel_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pixels = random_images(1, (3, 8, 8))[0]
    image = Image.fromarray(np.dstack([pixels.transpose(1, 2, 0), np.full((8, 8), 255, np.uint8)]))
    assert torch.equal(opened(tmp_path / "set", [image]).train().images[0], torch.from_numpy(pixels))
    assert caplog.text == ""


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright(
    tmp_path: Path, suffix: str, orientation: int, caplog: pytest.LogCaptureFixture
) -> None:
    upright = np.zeros((16, 16), np.uint8)
    upright[:8, :4] = 255  # a bar at the top left: all eight turns differ
    back = {2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    stored = Image.fromarray(upright).convert("RGB")
    if orientation > 1:
        stored = stored.transpose(turns[back[orientation]])
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    lossless = {"webp": {"lossless": True}, "jpg": {"quality": 100}}.get(suffix, {})
    images = opened(tmp_path / "set", [stored], suffix, exif=exif, **lossless).train().images
    expected = torch.from_numpy(upright).expand(3, -1, -1)
    torch.testing.assert_close(images[0].float(), expected.float(), rtol=0, atol=30)
    assert ("1 of 2 images are turned upright, as their orientation tag says" in caplog.text) == (
        orientation > 1
    )


def test_a_turned_picture_has_the_size_that_is_seen(tmp_path: Path) -> None:
    """Sideways pictures of 40 x 60 px are cropped at the centre of what is seen."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    wide = np.zeros((40, 60), np.uint8)
    wide[:, 20:40] = 200
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(2):
            picture = np.where(wide > 0, wide + (name == "b"), 0).astype(np.uint8)
            Image.fromarray(picture).save(tmp_path / "set" / name / f"{index}.png", exif=exif)
    data = open_dataset(str(tmp_path / "set"))
    assert data.image_shape == (1, 32, 32)
    assert float(data.train().images[0, 0, :, 16].float().mean()) == pytest.approx(100, abs=10)
    assert data.train().images[0, 0, 16].unique().tolist() == [200]


def deep_images() -> np.ndarray:
    """16 bits: the high byte is the picture."""
    return (random_images(1, (1, 8, 8), 3)[0, 0].astype(np.uint16) << 8) + 77


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_8(tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture) -> None:
    data = opened(tmp_path / "set", [Image.fromarray(deep_images())], suffix)
    assert data.image_shape == (1, 8, 8)
    assert torch.equal(data.train().images[0, 0], torch.from_numpy(random_images(1, (1, 8, 8), 3)[0, 0]))
    assert "1 of 2 images are scaled from 16 bits per channel to 8" in caplog.text


def png_of_16_bits(pixels: np.ndarray) -> bytes:
    """A PNG file of 16-bit channels [H, W, C], which Pillow does not write."""
    import struct
    import zlib

    height, width, channels = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(name: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        )

    kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_16_bits_in_colour_and_with_alpha(
    tmp_path: Path, channels: int, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.dstack([deep_images()] * channels)
    if channels != 3:
        pixels[..., -1] = 65535
    for name in ("a", "b"):
        (tmp_path / "set" / name).mkdir(parents=True)
        for index in range(2):
            varied = pixels - np.uint16((name == "b") * 256 * (pixels < 65535))
            (tmp_path / "set" / name / f"{index}.png").write_bytes(png_of_16_bits(varied))
    data = open_dataset(str(tmp_path / "set"))
    assert data.image_shape == (1 if channels == 2 else 3, 8, 8)
    assert torch.equal(data.train().images[0, 0], torch.from_numpy(random_images(1, (1, 8, 8), 3)[0, 0]))
    assert "2 of 2 images are scaled from 16 bits per channel to 8" in caplog.text


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_more_bits_are_refused(tmp_path: Path, dtype: type) -> None:
    with pytest.raises(InputError, match=r"8 or 16 bits per channel, got mode [IF] in .*0\.tif; convert"):
        opened(tmp_path / "set", [Image.fromarray(np.full((8, 8), 400, dtype))], "tif")


def test_several_frames_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    frames = [Image.fromarray(image[0]) for image in random_images(3, (1, 8, 8))]
    data = opened(tmp_path / "set", [frames[0]], "gif", save_all=True, append_images=frames[1:])
    assert np.abs(data.train().images[0, 0].numpy().astype(int) - np.asarray(frames[0])).max() <= 1
    assert "1 of 2 images are read by their first frame only" in caplog.text


def test_one_odd_picture_does_not_change_the_size_of_a_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "set"
    for name in ("train", "test"):
        for label in "ab":
            for index, image in enumerate(random_images(3, (3, 48, 48), ord(label))):
                write_png(root / name / label / f"{index}.png", image)
    ramp = np.broadcast_to(np.arange(50, dtype=np.uint8)[None, None], (3, 48, 50))
    write_png(root / "train" / "a" / "1.png", ramp)
    write_png(root / "test" / "b" / "2.png", random_images(1, (3, 96, 96))[0])
    data = open_dataset(str(root))
    assert data.image_shape == (3, 48, 48)
    assert data.size_rule == "that of 5 of 6 train images"
    assert torch.equal(data.train().images[1], torch.arange(1, 49, dtype=torch.uint8).expand(3, 48, 48))
    assert data.test().images.shape == (6, 3, 48, 48)
    for half, file, size in (("train", "a/1.png", "50x48"), ("test", "b/2.png", "96x96")):
        where = f"{root / half / file} ({size})"
        assert any(
            line.startswith("1 of 6 images are resized") and "(to 48x48)" in line and line.endswith(where)
            for line in caplog.messages
        )


def test_the_size_can_be_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = [Image.fromarray(image.transpose(1, 2, 0)) for image in random_images(2, (3, 24, 40))]
    data = opened(tmp_path / "set", images)
    assert data.image_shape == (3, 32, 32)
    assert "up to train's median short side, 24" in data.size_rule
    larger = open_dataset(str(tmp_path / "set"), image_size=48)
    assert larger.train().images.shape == (3, 3, 48, 48)
    assert larger.size_rule == "image_size"
    assert (
        "3 of 3 images are resized, and cropped at the centre if they aren't square (to 48x48)" in caplog.text
    )


def test_colours_among_grey_pictures_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grey, root = random_images(4, (1, 8, 8)), tmp_path / "set"
    for row, image in enumerate(grey):
        write_png(root / "train" / "ab"[row % 2] / f"{row}.png", image)
        write_png(root / "test" / "ab"[row % 2] / f"{row}.png", image.repeat(3, axis=0))
    write_png(root / "test" / "a" / "colour.png", random_images(1, (3, 8, 8))[0])
    data = open_dataset(str(root))
    assert torch.equal(data.test().images[[0, 1, 3, 4]], torch.from_numpy(grey[[0, 2, 1, 3]]))
    line = "1 of 5 images are coloured, and read as grey like the rest of their dataset, such as "
    assert caplog.messages == [f"{line}{root / 'test' / 'a' / 'colour.png'}"]


@pytest.mark.parametrize("kind", ["blank", "a channel", "copies"])
def test_pictures_without_contrast_are_refused(tmp_path: Path, kind: str) -> None:
    image = random_images(1, (3, 8, 8))[0]
    image[{"blank": slice(None), "a channel": slice(1, 2), "copies": slice(0)}[kind]] = 7
    for name in ("a", "b"):
        for index in range(2):
            write_png(tmp_path / "set" / name / f"{index}.png", image)
    words = (
        "the same in each" if kind == "copies" else r"contrast in every channel, got 7 everywhere in channel"
    )
    with pytest.raises(InputError, match=words):
        open_dataset(str(tmp_path / "set"))
    if kind == "copies":  # one other picture in a class, besides those of both
        write_png(tmp_path / "set" / "b" / "9.png", 255 - image)
        write_png(tmp_path / "set" / "b" / "8.png", 254 - image)
        assert open_dataset(str(tmp_path / "set")).class_names == ("a", "b")
