from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.io import wavfile

from ddray.data import open_dataset
from ddray.data.speech import spectrograms
from ddray.errors import InputError
from tests.data.data_files import write_wav


def tone(rate: int, hertz: float, length_s: float = 1.0) -> np.ndarray:
    time = np.arange(int(rate * length_s)) / rate
    return (np.sin(2 * np.pi * hertz * time) * 20000).astype(np.int16)


def a_folder(root: Path, rate: int = 16000, num: int = 16) -> None:
    for label, name in enumerate(("yes", "no")):
        for index in range(num):
            write_wav(root / name / f"{index:02}.wav", tone(rate, 300 * (label + 1) + 10 * index), rate)


def test_a_spectrogram_equals_a_naive_fourier_transform() -> None:
    rate = 8000
    wave = np.random.default_rng(0).uniform(-1, 1, rate)
    padded = np.pad(wave, 127, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(255) / 255)
    frames = [
        np.abs(np.fft.rfft(padded[start : start + 255] * window))
        for start in range(0, len(padded) - 254, 128)
    ]
    magnitude = np.pad(np.stack(frames, 1), ((0, 0), (1, 2)))
    assert magnitude.shape == (128, 66)
    small = F.interpolate(
        torch.from_numpy(magnitude)[None, None], (64, 64), mode="bilinear", align_corners=False
    )
    actual = spectrograms(torch.from_numpy(wave)[None])
    torch.testing.assert_close(actual.double(), torch.log(small + 1e-3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_every_eighth_file_of_a_class_is_test(tmp_path: Path, rate: int) -> None:
    a_folder(tmp_path / "mini_speech_commands", rate)
    (tmp_path / "mini_speech_commands" / "__MACOSX").mkdir()
    data = open_dataset("speech_commands_mini", data_dir=tmp_path)
    assert data.class_names == ("no", "yes")
    assert data.image_shape == (1, 64, 64)
    assert data.train().images.dtype == torch.float32
    assert torch.bincount(data.train().labels).tolist() == [14, 14]
    assert torch.bincount(data.test().labels).tolist() == [2, 2]
    wave = torch.from_numpy(tone(rate, 600).astype(np.float32) / 32768)
    torch.testing.assert_close(data.test().images[0], spectrograms(wave[None])[0])
    assert data.mean == pytest.approx((float(data.train().images.mean()),), abs=1e-4)
    assert data.std == pytest.approx((float(data.train().images.std()),), rel=1e-3)
    assert not data.can_flip


def test_train_and_test_folders_by_path(tmp_path: Path) -> None:
    a_folder(tmp_path / "w" / "train", 8000, 3)
    a_folder(tmp_path / "w" / "test", 8000, 2)
    data = open_dataset(str(tmp_path / "w"))
    assert len(data.train()) == 6
    assert data.test().labels.tolist() == [0, 0, 1, 1]
    assert data.fingerprint == open_dataset(str(tmp_path / "w")).fingerprint
    assert not data.can_flip


def test_clips_are_padded_and_cut_to_a_second_and_mixed_down(tmp_path: Path) -> None:
    whole = tone(8000, 440)
    clips = {
        "short": whole[:3000],
        "long": np.concatenate([whole, whole]),
        "stereo": np.stack([whole, whole], 1),
        "float": whole.astype(np.float32) / 32768,
        "bytes": (np.round(whole / 256) + 128).astype(np.uint8),
    }
    for name, clip in clips.items():
        write_wav(tmp_path / "train" / name / "0.wav", clip, 8000)
        write_wav(tmp_path / "test" / name / "0.wav", clip, 8000)
    data = open_dataset(str(tmp_path))
    images = dict(zip(data.class_names, data.train().images, strict=True))
    full = spectrograms(torch.from_numpy(whole.astype(np.float32) / 32768)[None])[0]
    cut = torch.zeros(8000)
    cut[:3000] = torch.from_numpy(whole[:3000].astype(np.float32) / 32768)
    for name in ("long", "stereo", "float"):
        torch.testing.assert_close(images[name], full)
    torch.testing.assert_close(images["short"], spectrograms(cut[None])[0])
    # 8 bits leave a noise floor: compare the magnitudes.
    torch.testing.assert_close(images["bytes"].exp(), full.exp(), rtol=0.1, atol=0.2)


def test_broken_clips_are_named_and_a_broken_test_disturbs_only_test(tmp_path: Path) -> None:
    a_folder(tmp_path / "train", 8000, 2)
    a_folder(tmp_path / "test", 8000, 1)
    broken = tmp_path / "test" / "yes" / "00.wav"
    broken.write_bytes(b"RIFF" + bytes(10))
    data = open_dataset(str(tmp_path))
    assert len(data.train()) == 4
    with pytest.raises(InputError, match=r"test/yes/00.wav"):
        data.test()
    cut = tmp_path / "train" / "yes" / "01.wav"
    cut.write_bytes(cut.read_bytes()[:-5000])
    with pytest.raises(InputError, match=r"train/yes/01.wav"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_sample_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    """It would make the mean of the whole dataset NaN."""
    for label in ("down", "up"):
        (tmp_path / label).mkdir()
        for index in range(3):
            samples = np.zeros(8000, dtype=np.float32)
            if (label, index) == ("up", 2):
                samples[77] = value
            wavfile.write(tmp_path / label / f"{index}.wav", 8000, samples)
    with pytest.raises(InputError, match=r"must hold finite samples, got NaN or infinity in .*up/2\.wav"):
        open_dataset(str(tmp_path))


def test_other_sampling_rates_and_empty_clips_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "w"
    a_folder(root, 8000, 2)
    write_wav(root / "yes" / "02.wav", tone(16000, 300), 16000)
    with pytest.raises(InputError, match="16000 besides 8000"):
        open_dataset(str(root))
    write_wav(root / "yes" / "02.wav", tone(44100, 300), 44100)
    with pytest.raises(InputError, match="8000 or 16000"):
        open_dataset(str(root))
    write_wav(root / "yes" / "02.wav", np.zeros(0, dtype=np.int16), 8000)
    with pytest.raises(InputError, match=r"02\.wav"):
        open_dataset(str(root))
