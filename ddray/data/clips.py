"""Sound files as samples at one rate: WAV by SciPy; FLAC, Ogg and MP3 by the extra `sound` (soundfile)."""

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ddray.errors import InputError, one_line

Samples = np.ndarray[Any, np.dtype[np.float32]]


def read_clip(file: Path) -> tuple[int, Samples]:
    """Return (sampling rate in Hz, float32 [samples, channels], in [-1, 1] unless the file holds floats).

    Raises:
        InputError: the file is incomplete, empty, holds a sample that is not finite, or needs the extra
            `sound`.
    """
    rate, samples = _read_wav(file) if _is_wav(file) else _soundfile(file, "read", always_2d=True)[::-1]
    if samples.size == 0:
        raise InputError(f"sound file must hold samples, got none in {file}")
    if not np.isfinite(samples).all():  # one would make the whole dataset's statistics NaN
        raise InputError(f"sound file must hold finite samples, got NaN or infinity in {file}; leave it out")
    return int(rate), samples.reshape(len(samples), -1).astype(np.float32, copy=False)


def sampling_rate(file: Path) -> int:
    """Return a file's sampling rate in Hz, from its header where that can be read alone.

    Raises:
        InputError: as `read_clip`.
    """
    from scipy.io import wavfile

    if not _is_wav(file):
        return int(_soundfile(file, "info").samplerate)
    try:
        with warnings.catch_warnings(action="ignore"):
            return int(wavfile.read(file, mmap=True)[0])
    except Exception:  # 24 bits can't be mapped; a broken header gets its message
        return read_clip(file)[0]


def resampled(samples: Samples, rate: int, target: int) -> Samples:
    """Return samples [n] at `rate` Hz as float32 at `target` Hz, band-limited; themselves at one rate."""
    from scipy.signal import resample_poly

    if rate == target:
        return samples
    divisor = math.gcd(rate, target)
    result: Samples = resample_poly(samples, target // divisor, rate // divisor).astype(np.float32)
    return result


def _is_wav(file: Path) -> bool:
    return file.suffix.lower() == ".wav"


def _read_wav(file: Path) -> tuple[int, Samples]:
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", wavfile.WavFileWarning)  # "Reached EOF prematurely"
            warnings.filterwarnings(
                "ignore", message="Chunk .* not understood", category=wavfile.WavFileWarning
            )
            rate, raw = wavfile.read(file)
    except Exception as error:  # scipy raises whatever a broken header leads to
        raise InputError(f"sound file must be readable, got {file}: {one_line(error)}") from error
    samples = raw.astype(np.float32)
    if np.issubdtype(raw.dtype, np.integer):
        middle = 128 if raw.dtype == np.uint8 else 0
        samples = (samples - middle) / float(np.iinfo(raw.dtype).max + 1 - middle)
    return rate, samples


def _soundfile(file: Path, function: str, **options: Any) -> Any:
    """Call a function of soundfile on a file."""
    try:
        import soundfile
    except (ImportError, OSError) as error:  # OSError: no libsndfile
        raise InputError(
            f"{file.suffix} files need the extra sound: pip install 'ddray[sound]', got {file}"
        ) from error
    options |= {"dtype": "float32"} if function == "read" else {}
    try:
        return getattr(soundfile, function)(str(file), **options)
    except (RuntimeError, OSError) as error:  # libsndfile's errors are RuntimeErrors
        raise InputError(f"sound file must be readable, got {file}: {one_line(error)}") from error
