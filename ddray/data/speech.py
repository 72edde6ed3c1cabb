"""Sound as images: log-magnitude spectrograms by the recipe of IDC (arXiv:2205.14959) and DSDM.

A clip of 1 s (padded or cut) -> STFT (255 points, hop 128, periodic Hann window, centred with reflection, as
librosa's) -> magnitude -> 1 and 2 zero frames before and after -> bilinear to 64 x 64 -> log(x + 1e-3).

Deviations: IDC resamples everything to 16 kHz; here a set of 8 kHz clips stays at 8 kHz. IDC takes the first
second of a longer clip; here it is the loudest, unless `clip_offset` says where it starts. A window of more
than a second (`clip_seconds`) has more frames: they are averaged (antialiased), not skipped.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data import cache
from ddray.data.clips import Samples, read_clip, resampled, sampling_rate
from ddray.data.dataset import Split
from ddray.data.listing import IMAGE_SUFFIXES, SOUND_SUFFIXES, files_below
from ddray.data.lists import tree_of_lists
from ddray.data.packing import chunks
from ddray.data.pictures import Geometry
from ddray.data.sources import Layout
from ddray.data.tree import Labelled, tree_of
from ddray.errors import InputError
from ddray.system.options import ContentOptions

log = logging.getLogger(__name__)

SHAPE: Final = (1, 64, 64)
_RATES: Final = (8000, 16000)  # a set is resampled to the second, unless most of its clips are at the first
_TEST_EVERY: Final = 8  # IDC: every 8th file of a class, sorted by name, starting with the first
_BATCH: Final = 256
_PROBED: Final = 1000  # files by which a folder is known to be of sound
_MIN_SAMPLES: Final = 256  # one Fourier transform


@dataclass(frozen=True)
class Window:
    """The part of a clip that is seen, and the size of its picture.

    Attributes:
        seconds: its length.
        offset: where it starts, in seconds; None: where it is loudest.
        size: rows and columns of the spectrogram.
    """

    seconds: float = 1.0
    offset: float | None = None
    size: int = SHAPE[1]


def layout_of_clips(root: Path, options: ContentOptions) -> Layout | None:
    """Return the layout of sound files, or None if there are none.

    CSV files label them (`tree_of_lists`), or they lie in folders of classes (`tree_of`). Without a test part
    every 8th file of a class is test.

    Raises:
        InputError: as for these.
    """
    if not _is_sound(root):
        return None
    listed = tree_of_lists(root, SOUND_SUFFIXES, options.label_column)
    tree = listed or tree_of(root, SOUND_SUFFIXES)
    if tree is None:
        return None
    train, list_test = (tree.train, tree.test) if tree.test else _every_eighth(tree.train)
    window = Window(options.clip_seconds or 1.0, options.clip_offset, options.image_size or SHAPE[1])

    @functools.cache
    def read_train() -> tuple[Split, int]:
        return _load(train, window, None)

    geometry = Geometry((1, window.size, window.size), resize=False, rule="spectrograms")
    return Layout(
        tuple(tree.classes),
        lambda _: (read_train()[0], geometry),
        lambda _: _load(list_test(), window, read_train()[1])[0],
        ("clip_seconds", "clip_offset", *(["label_column"] if listed else [])),
        tree.skipped,
    )


def _is_sound(folder: Path) -> bool:
    """Return whether most of the first files below a folder that are sound or pictures are sound."""
    files = islice(files_below(folder, SOUND_SUFFIXES + IMAGE_SUFFIXES), _PROBED)
    votes = [file.suffix.lower() in SOUND_SUFFIXES for file in files]
    return 2 * sum(votes) > len(votes)


def _every_eighth(labelled: Labelled) -> tuple[Labelled, Callable[[], Labelled]]:
    """Split into train and a lister of test: within a class, test takes files 0, 8, 16, ..."""
    train: Labelled = []
    test: Labelled = []
    position: Counter[int] = Counter()
    for file, label in labelled:
        (train if position[label] % _TEST_EVERY else test).append((file, label))
        position[label] += 1
    if not train:
        raise InputError(
            f"a sound folder without test/ must have 2 clips of a class, got {len(labelled)} clips"
        )
    return train, lambda: test


def spectrograms(waves: Tensor, *, size: int = SHAPE[1], antialias: bool = False) -> Tensor:
    """Return log-magnitude spectrograms, float32 [N, 1, size, size], of waves [N, samples] in [-1, 1]."""
    window = torch.hann_window(255, dtype=waves.dtype, device=waves.device)
    magnitude = torch.stft(waves, n_fft=255, hop_length=128, window=window, return_complex=True).abs()
    padded = F.pad(magnitude, (1, 2))[:, None]
    small = F.interpolate(
        padded, size=(size, size), mode="bilinear", align_corners=False, antialias=antialias
    )
    return torch.log(small + 1e-3).float()


def _load(labelled: Labelled, window: Window, rate: int | None) -> tuple[Split, int]:
    """Read clips at a rate (None: the set's own), or take their spectrograms from the cache.

    Return them with the rate.
    """
    labels = [label for _, label in labelled]

    def build(folder: Path) -> dict[str, Any]:
        reader = _Reader(window, rate or _common_rate(file for file, _ in labelled))
        images = torch.empty(len(labelled), 1, window.size, window.size)
        for part, batch in zip(torch.split(images, _BATCH), chunks(labelled, _BATCH), strict=True):
            waves = torch.from_numpy(np.stack([reader.wave(file) for file, _ in batch]))
            part.copy_(spectrograms(waves, size=window.size, antialias=window.seconds > 1))
        np.save(folder / cache.IMAGES, images.numpy())
        np.save(folder / cache.LABELS, np.array(labels, dtype=np.int64))
        return {"rate": reader.rate, "notes": reader.notes(len(labelled))}

    if not labelled:
        raise InputError("a sound folder must have clips in both halves, got none")
    settings = f"sound v2 {window} {rate} {labels}"
    split, facts = cache.fetch([file for file, _ in labelled], settings, build)
    for note in facts["notes"]:
        log.warning("%s", note)
    return split, int(facts["rate"])


def _common_rate(files: Iterable[Path]) -> int:
    """Return the rate at which a set is read: 8 kHz if most of its clips are, else 16 kHz."""
    rates = Counter(map(sampling_rate, files))
    return _RATES[0] if 2 * rates[_RATES[0]] > rates.total() else _RATES[1]


@dataclass
class _Reader:
    """Reads the window of clips at one rate, and counts what is changed on the way."""

    window: Window
    rate: int
    rates: dict[int, list[Path]] = field(default_factory=dict)
    longer: list[tuple[float, Path]] = field(default_factory=list)
    shorter: list[tuple[float, Path]] = field(default_factory=list)
    mixed: list[Path] = field(default_factory=list)

    def wave(self, file: Path) -> Samples:
        """Return the window of a clip, float32 [samples], channels averaged.

        Raises:
            InputError: the clip can't be read, or ends before the window starts.
        """
        length = round(self.window.seconds * self.rate)
        if length < _MIN_SAMPLES:
            raise InputError(
                f"clip_seconds must be at least {_MIN_SAMPLES / self.rate:g} at {self.rate} Hz, "
                f"got {self.window.seconds:g}"
            )
        clip_rate, channels = read_clip(file)
        clip = channels.mean(axis=1)
        if channels.shape[1] > 1:
            self.mixed.append(file)
        if clip_rate != self.rate:
            self.rates.setdefault(clip_rate, []).append(file)
            clip = resampled(clip, clip_rate, self.rate)
        start = round((self.window.offset or 0) * self.rate)
        if len(clip) > length:
            self.longer.append((len(clip) / self.rate, file))
        if len(clip) - start < length:
            self.shorter.append((len(clip) / self.rate, file))
        if start >= len(clip):
            raise InputError(
                f"clip_offset must lie within every clip, got {self.window.offset:g} s for "
                f"{len(clip) / self.rate:g} s of {file}; take a smaller one, or leave the file out"
            )
        if self.window.offset is None and len(clip) > length:
            energy = np.cumsum(np.square(clip, dtype=np.float64))
            start = int(np.argmax(energy[length - 1 :] - np.append(0, energy[:-length])))
        part = clip[start : start + length]
        return np.pad(part, (0, length - len(part)))

    def notes(self, num: int) -> list[str]:
        """Return a line for each kind of change, which counts the clips and names one."""
        seconds, offset = f"{self.window.seconds:g} s", self.window.offset
        part = f"the loudest {seconds} of each" if offset is None else f"{seconds} from {offset:g} s on"
        of_all, lines = f"of {num} clips are", []
        if self.longer:
            length, file = max(self.longer)
            lines.append(
                f"{len(self.longer)} {of_all} longer than {seconds}, up to {length:g} s ({file}): {part} is "
                "taken; --clip-seconds and --clip-offset choose otherwise"
            )
        if self.shorter:
            length, file = min(self.shorter)
            lines.append(
                f"{len(self.shorter)} {of_all} shorter than {seconds}, down to {length:g} s ({file}): "
                "silence is appended"
            )
        for rate, files in sorted(self.rates.items()):
            lines.append(f"{len(files)} {of_all} resampled from {rate} to {self.rate} Hz, such as {files[0]}")
        if self.mixed:
            lines.append(
                f"{len(self.mixed)} {of_all} not mono, such as {self.mixed[0]}: channels are averaged"
            )
        return lines
