"""Spoken words as images: log-magnitude spectrograms by the recipe of IDC (arXiv:2205.14959) and DSDM.

A clip of 1 s (padded or cut) -> STFT (255 points, hop 128, periodic Hann window, centred with reflection, as
librosa's) -> magnitude -> 1 and 2 zero frames before and after -> bilinear to 64 x 64 -> log(x + 1e-3).

Deviation: IDC resamples everything to 16 kHz; here 8 kHz clips stay at 8 kHz.
"""

import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import cache
from ddray.data.dataset import Split
from ddray.data.listing import files_below, subfolders
from ddray.data.sources import Geometry, Layout, chunks
from ddray.data.tree import Labelled, by_class
from ddray.errors import InputError
from ddray.system.options import ContentOptions

SHAPE: Final = (1, 64, 64)
_RATES: Final = (8000, 16000)
_TEST_EVERY: Final = 8  # IDC: every 8th file of a class, sorted by name, starting with the first
_BATCH: Final = 256


def layout_of_wavs(root: Path, options: ContentOptions) -> Layout | None:
    """Return the layout of wav files by class, or None if there are none.

    Either train/ and test/ hold a folder per class, or `root` does and every 8th file is test.

    Raises:
        InputError: a class folder is empty, or the first clip cannot be read.
    """
    base = root / "train" if (root / "train").is_dir() else root
    classes = subfolders(base)
    if not classes or next(files_below(base / classes[0], (".wav",)), None) is None:
        return None
    train = by_class(base, classes, (".wav",))
    test = None
    if base == root or not (root / "test").is_dir():
        train, test = _every_eighth(train)
    rate = _samples(train[0][0])[0]

    size = options.image_size or SHAPE[1]
    geometry = Geometry((1, size, size), resize=False, rule="spectrograms")

    def read_test(_: Geometry) -> Split:
        listed = by_class(root / "test", classes, (".wav",), empty_ok=True) if test is None else test
        return _load(listed, rate, size)

    return Layout(tuple(classes), lambda _: (_load(train, rate, size), geometry), read_test)


def _every_eighth(labelled: Labelled) -> tuple[Labelled, Labelled]:
    """Split into (train, test): within a class, test takes files 0, 8, 16, ..."""
    train: Labelled = []
    test: Labelled = []
    position: Counter[int] = Counter()
    for file, label in labelled:
        (train if position[label] % _TEST_EVERY else test).append((file, label))
        position[label] += 1
    if not train:
        raise InputError(
            f"a speech folder without test/ must have 2 clips of a class, got {len(labelled)} clips"
        )
    return train, test


def spectrograms(waves: Tensor, *, size: int = SHAPE[1]) -> Tensor:
    """Return log-magnitude spectrograms, float32 [N, 1, size, size], of waves [N, samples] in [-1, 1]."""
    window = torch.hann_window(255, dtype=waves.dtype, device=waves.device)
    magnitude = torch.stft(waves, n_fft=255, hop_length=128, window=window, return_complex=True).abs()
    padded = F.pad(magnitude, (1, 2))[:, None]
    small = F.interpolate(padded, size=(size, size), mode="bilinear", align_corners=False)
    return torch.log(small + 1e-3).float()


def _load(labelled: Labelled, rate: int, size: int) -> Split:
    """Read clips, or take their spectrograms from the cache."""
    labels = [label for _, label in labelled]

    def build(folder: Path) -> dict[str, Any]:
        images = torch.empty(len(labelled), 1, size, size)
        for part, batch in zip(torch.split(images, _BATCH), chunks(labelled, _BATCH), strict=True):
            part.copy_(spectrograms(_waves(batch, rate), size=size))
        np.save(folder / cache.IMAGES, images.numpy())
        np.save(folder / cache.LABELS, np.array(labels, dtype=np.int64))
        return {}

    if not labelled:
        raise InputError("a speech folder must have clips in both halves, got none")
    settings = f"speech v1 {rate} {labels}" + (f" {size}" if size != SHAPE[1] else "")
    return cache.fetch([file for file, _ in labelled], settings, build)[0]


def _waves(labelled: Sequence[tuple[Path, int]], rate: int) -> Tensor:
    """Return clips of one second, [M, rate]."""
    waves = torch.zeros(len(labelled), rate)
    for wave, (file, _) in zip(waves, labelled, strict=True):
        clip_rate, samples = _samples(file)
        if clip_rate != rate:
            raise InputError(
                f"clips of a dataset must share a sampling rate, got {clip_rate} besides {rate} in {file}"
            )
        clip = torch.from_numpy(samples[:rate])
        wave[: len(clip)] = clip
    return waves


def _samples(file: Path) -> tuple[int, np.ndarray]:
    """Return (sampling rate in Hz, float32 samples in [-1, 1]) of a wav file, channels averaged.

    Raises:
        InputError: the file is not a complete wav file, is empty, holds a sample that is not finite, or is
            sampled at neither 8 nor 16 kHz.
    """
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", wavfile.WavFileWarning)  # "Reached EOF prematurely"
            warnings.filterwarnings(
                "ignore", message="Chunk .* not understood", category=wavfile.WavFileWarning
            )
            rate, raw = wavfile.read(file)
    except Exception as error:  # scipy raises whatever a broken header leads to
        raise InputError(f"wav file must be readable, got {file}: {' '.join(str(error).split())}") from error
    if rate not in _RATES:
        raise InputError(f"wav files must be sampled at 8000 or 16000 Hz, got {rate} in {file}")
    if raw.size == 0:
        raise InputError(f"wav file must hold samples, got none in {file}")
    samples = raw.astype(np.float32)
    if np.issubdtype(raw.dtype, np.integer):
        middle = 128 if raw.dtype == np.uint8 else 0
        samples = (samples - middle) / float(np.iinfo(raw.dtype).max + 1 - middle)
    elif not np.isfinite(samples).all():  # one would make the whole dataset's statistics NaN
        raise InputError(f"wav file must hold finite samples, got NaN or infinity in {file}; leave it out")
    return int(rate), samples if samples.ndim == 1 else samples.mean(axis=1)
