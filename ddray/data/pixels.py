"""Pixel spaces: raw [0, 1], mean/std-normalised, ZCA-whitened; each encodes pixels and decodes them again."""

from __future__ import annotations

import hashlib
import logging
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Final, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.data.dataset import Dataset, Split
from ddray.data.packed import PackedImages, parts_of
from ddray.errors import InputError, StorageError
from ddray.system.files import home, locked, write_atomically
from ddray.system.progress import phase
from ddray.system.tensors import load_plain, sha256_of

log = logging.getLogger(__name__)
MAX_ZCA: Final = 12_288  # 3 x 64 x 64: above, the matrix alone takes gigabytes, its eigenvectors hours

ENCODE_CHUNK = 4096
_LEAST_ROWS: Final = 16  # of a product for each thread
"""Images converted from uint8 at a time."""
_MIDDLE = 128.0
_COMPARED = 64  # images compared at a time: the first ones nearly always differ
_EXACT_CHUNK = 1024  # see `_moments`
# Values of packed images that are summed at a time, as float64: 4096 images up to 64 px, as in memory, as the
# last digits depend on it; of larger ones fewer.
_MOST_VALUES = 50 * 2**20
_STATISTICS_VALUES = 8 * 2**20


@dataclass(frozen=True, eq=False)
class PixelSpace:
    """What a network sees: an affine, invertible function of raw pixels.

    Attributes:
        kind: "raw" (pixels in [0, 1]), "normalized" ((x - mean) / std per channel), or "zca" ((x - zca_mean)
            @ zca_matrix on flattened raw pixels; no mean/std, as in MTT and DataDAM).
        mean: per channel, used by "normalized".
        std: per channel, used by "normalized".
        zca_mean: float32 [D], D = C * H * W.
        zca_matrix: float32 [D, D], symmetric.
        fit_s: seconds that its fit took, whenever that was.
    """

    kind: Literal["raw", "normalized", "zca"] = "raw"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    zca_mean: Tensor | None = None
    zca_matrix: Tensor | None = None
    fit_s: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ("raw", "normalized", "zca"):
            raise InputError(f"pixel space must be one of raw, normalized, zca, got {self.kind!r}")
        if self.kind == "normalized" and (
            len(self.mean) != len(self.std) or not self.mean or min(self.std) <= 0
        ):
            raise InputError(
                "pixel space normalized needs a mean and a positive std per channel, "
                f"got mean {self.mean} and std {self.std}"
            )
        if self.kind != "zca":
            return
        if self.zca_mean is None or self.zca_matrix is None:
            raise InputError("pixel space zca needs zca_mean and zca_matrix, got None")
        size = self.zca_mean.numel()
        if self.zca_mean.ndim != 1 or self.zca_matrix.shape != (size, size):
            raise InputError(
                "pixel space zca needs zca_mean [D] and zca_matrix [D, D], "
                f"got {list(self.zca_mean.shape)} and {list(self.zca_matrix.shape)}"
            )

    def encode(self, images: Tensor) -> Tensor:
        """Return float32 [N, C, H, W] in this space, on the images' device.

        Args:
            images: uint8 [N, C, H, W] (divided by 255), or float in [0, 1] (spectrograms: in their units).
        """
        if images.dtype != torch.uint8:
            return self._encode(images.float())
        if isinstance(images, PackedImages):
            images.check_memory(torch.float32)
        encoded = torch.empty(images.shape, dtype=torch.float32, device=images.device)
        for start in range(0, len(images), ENCODE_CHUNK):  # no second float copy of the whole set
            part = slice(start, start + ENCODE_CHUNK)
            encoded[part] = self._encode(images[part].float() / 255)
        return encoded

    def decode(self, encoded: Tensor) -> Tensor:
        """Return raw pixels [N, C, H, W] of images in this space; the inverse of `encode`, never clamped."""
        if self.kind == "raw":
            return encoded
        if self.kind == "normalized":
            return encoded * _per_channel(self.std, encoded.device) + _per_channel(self.mean, encoded.device)
        mean, _ = self._whitening(encoded.device)
        pixels = _product(encoded.flatten(1), self._zca_inverse(encoded.device)) + mean
        return pixels.reshape(encoded.shape)

    def to(self, device: torch.device | str) -> PixelSpace:
        """Return this space with its tensors on `device`; itself if they are there already."""
        if self.zca_mean is None or self.zca_matrix is None:
            return self
        target = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if self.zca_matrix.device == target:
            return self
        return replace(self, zca_mean=self.zca_mean.to(target), zca_matrix=self.zca_matrix.to(target))

    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode float32 raw pixels."""
        if self.kind == "raw":
            return pixels
        if self.kind == "normalized":
            return (pixels - _per_channel(self.mean, pixels.device)) / _per_channel(self.std, pixels.device)
        mean, matrix = self._whitening(pixels.device)
        return _product(pixels.flatten(1) - mean, matrix).reshape(pixels.shape)

    def _whitening(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return (mean [D], matrix [D, D]) on `device`; call `to` beforehand to copy them there only once."""
        return cast(Tensor, self.zca_mean).to(device), cast(Tensor, self.zca_matrix).to(device)

    def _zca_inverse(self, device: torch.device) -> Tensor:
        """Return the de-whitening matrix [D, D] on `device`, inverted in float64 and copied there once."""
        if device not in self._inverses:
            inverse: Tensor = torch.linalg.inv(cast(Tensor, self.zca_matrix).double())
            self._inverses[device] = inverse.float().to(device)
        return self._inverses[device]

    @cached_property
    def _inverses(self) -> dict[torch.device, Tensor]:
        return {}


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """Return rows [N, D] @ matrix [D, D], on a CPU with the same bytes of a row whatever N is.

    A product of few rows may be summed in another order (below 4 for each thread where there is no AVX-512).
    """
    lacking = _LEAST_ROWS * torch.get_num_threads() - len(rows)
    if rows.device.type != "cpu" or lacking <= 0:
        return rows @ matrix
    return (F.pad(rows, (0, 0, 0, lacking)) @ matrix)[: len(rows)]


@lru_cache(maxsize=64)
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return `values` as [1, C, 1, 1] on `device`, copied there once."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def normalized_space(dataset: Dataset) -> PixelSpace:
    """Return the mean/std-normalised space of a dataset."""
    return PixelSpace("normalized", dataset.mean, dataset.std)


def fit_zca(
    split: Split, *, eps: float = 0.1, chunk: int = 1024, device: torch.device | str = "cpu"
) -> PixelSpace:
    """Fit ZCA whitening on raw pixels as `kornia.enhance.zca_mean(x / 255, eps=eps)` does, on `device`.

    The split is train, or what is left of it after carving val. The matrix is U (S + eps)^-1/2 U' of the
    unbiased covariance (eps of DataDAM and MTT: 0.1). kornia centres a float copy of the whole set; here it
    is summed over chunks of images, so memory stays at a few [D, D] matrices.

    Raises:
        InputError: fewer than 2 images.
    """
    if len(split) < 2:
        raise InputError(f"ZCA needs at least 2 images, got {len(split)}")
    mean, covariance = _moments(split.images, chunk, device)
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    # Rounding can leave an eigenvalue of a singular covariance slightly below zero.
    scale = (eigenvalues.clamp(min=0) + eps).rsqrt()
    matrix = (vectors * scale) @ vectors.T
    return PixelSpace("zca", zca_mean=mean.float(), zca_matrix=matrix.float())


def _moments(images: Tensor, chunk: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Return float64 mean [D] and unbiased covariance [D, D] of raw pixels in [0, 1] (floats as they are).

    Bytes minus 128 are integers up to 2^7, so float32 products summed over 2^10 images stay below 2^24, where
    float32 is exact: full precision at float32 speed.
    """
    is_bytes = images.dtype == torch.uint8
    size, count = images[0].numel(), len(images)
    total = torch.zeros(size, dtype=torch.float64, device=device)
    product = torch.zeros(size, size, dtype=torch.float64, device=device)
    for part in parts_of(images, min(chunk, _EXACT_CHUNK) if is_bytes else chunk):
        flat = part.to(device).flatten(1)
        flat = flat.float() - _MIDDLE if is_bytes else flat.double()
        total += flat.sum(0, dtype=torch.float64)
        product += flat.T @ flat
    covariance = product.addr_(total, total, alpha=-1 / count).div_(count - 1)
    mean = total / count
    return ((mean + _MIDDLE) / 255, covariance.div_(255**2)) if is_bytes else (mean, covariance)


def channel_statistics(images: Tensor, *, chunk: int = 4096) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return (mean, std) per channel of images [N, C, H, W], in [0, 1] units for uint8."""
    if isinstance(images, PackedImages):
        size = images[:1].numel()
        chunk = chunk if chunk * size <= _MOST_VALUES else max(1, _STATISTICS_VALUES // size)
        mean, std = images.remembered(f"channel statistics {chunk}", lambda: _statistics(images, chunk))
        return tuple(mean), tuple(std)
    return _statistics(images, chunk)


def _statistics(images: Tensor, chunk: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    channels = images.shape[1]
    total = torch.zeros(channels, dtype=torch.float64)
    square = torch.zeros(channels, dtype=torch.float64)
    for part in parts_of(images, chunk):
        pixels = part.to(torch.float64, copy=True)  # in place from here on: it may take 400 MB
        if images.dtype == torch.uint8:
            pixels.div_(255)
        total += pixels.sum((0, 2, 3))
        square += pixels.square_().sum((0, 2, 3))
    count = images.numel() / channels
    mean = total / count
    std = (square / count - mean.square()).clamp(min=0).sqrt()
    # A channel without any contrast is only centred.
    std = torch.where(std > 1e-6, std, torch.ones_like(std))
    return tuple(mean.tolist()), tuple(std.tolist())


def check_contrast(split: Split, name: str) -> None:
    """Refuse train images that can't tell classes apart: one value in a channel, or the same in all classes.

    Raises:
        InputError: says which.
    """
    if len(split) == 0:
        return
    images, first = split.images, split.images[:1]
    varies = torch.zeros(images.shape[1], dtype=torch.bool)
    for part in parts_of(images, _COMPARED):
        varies |= (part != first[:, :, :1, :1]).transpose(0, 1).flatten(1).any(1)
        if varies.all():
            break
    else:
        channel = int((~varies).nonzero()[0])
        raise InputError(
            f"train images must have contrast in every channel, got {first[0, channel, 0, 0]} everywhere in "
            f"channel {channel} of {name}; look at its files"
        )
    contents: set[bytes] = set()
    labels = sorted(set(split.labels.tolist()))
    for label in labels:
        rows = (split.labels == label).nonzero().flatten()
        if not any((images[part] == first).flatten(1).all(1).any() for part in torch.split(rows, _COMPARED)):
            return
    for label in labels:
        rows = (split.labels == label).nonzero().flatten().tolist()
        digests = {hashlib.sha256(images[row].numpy().tobytes()).digest() for row in rows}
        if contents and digests != contents:
            return
        contents = digests
    raise InputError(
        f"classes must differ in their train images, got the same in each of {name}; look at its files"
    )


def pixel_space(kind: str, dataset: Dataset, split: Split, device: torch.device | str = "cpu") -> PixelSpace:
    """Return the pixel space of a run, on the CPU; ZCA is fitted on the split, on `device`.

    A fit is stored in `$DDRAY_HOME/whitening`, and made once for the same images and kind of device.

    Raises:
        InputError: the images are too large for ZCA.
    """
    if kind != "zca":
        return PixelSpace("raw" if kind == "raw" else "normalized", dataset.mean, dataset.std)
    size = split.images[0].numel()
    if size > MAX_ZCA:
        raise InputError(
            f"pixel_space=zca needs images of at most {MAX_ZCA} values, got {size}; use normalized"
        )
    about = f"zca 1 {torch.device(device).type} {split.images.dtype} {list(split.images.shape)}"
    if isinstance(split.images, PackedImages):
        digest = str(split.images.remembered("sha256", lambda: sha256_of(parts_of(split.images))))
    else:
        digest = sha256_of([split.images])
    file = home() / "whitening" / f"{hashlib.sha256(f'{about} {digest}'.encode()).hexdigest()}.pt"
    with ExitStack() as stack:
        with suppress(StorageError, OSError):  # in a folder that can't be written, where each process fits
            stack.enter_context(locked(file.with_suffix(".lock")))
        return _stored(file, size) or _fitted(file, dataset, split, device)


def _stored(file: Path, size: int) -> PixelSpace | None:
    """Return a stored fit for images of `size` values; None if there is none that is undamaged."""
    if not file.exists():
        return None
    try:
        stored = load_plain(file)
        space = PixelSpace("zca", **{name: stored[name] for name in ("zca_mean", "zca_matrix", "fit_s")})
        if space.zca_mean is None or len(space.zca_mean) != size:
            raise ValueError(f"it is not of images of {size} values")
        return space
    except (ValueError, TypeError, KeyError, AttributeError, InputError) as error:
        log.warning("%s is damaged (%s): fitted again", file, error)
        return None


def _fitted(file: Path, dataset: Dataset, split: Split, device: torch.device | str) -> PixelSpace:
    """Fit ZCA, and store it if that is possible."""
    begin = time.perf_counter()
    with phase(f"whitening {dataset.name}, {len(split):,} images (once)"):
        space = fit_zca(split, device=device).to("cpu")
    space = replace(space, fit_s=time.perf_counter() - begin)
    stored = {name: getattr(space, name) for name in ("zca_mean", "zca_matrix", "fit_s")}
    try:
        write_atomically(file, lambda target: torch.save(stored, target))
    except StorageError as error:
        log.warning("the whitening is not kept for other runs: %s", error)
    return space
