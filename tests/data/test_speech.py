from __future__ import annotations

import sys
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.io import wavfile

from ddray.data import open_dataset
from ddray.data.sources import Layout
from ddray.data.speech import layout_of_clips, spectrograms
from ddray.errors import InputError
from ddray.system.options import ContentOptions
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
    samples = np.random.default_rng(0).uniform(-1, 1, rate)
    padded = np.pad(samples, 127, mode="reflect")
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
    actual = spectrograms(torch.from_numpy(samples)[None])
    torch.testing.assert_close(actual.double(), torch.log(small + 1e-3), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_every_eighth_file_of_a_class_is_test(tmp_path: Path, rate: int) -> None:
    a_folder(tmp_path / "mini_speech_commands", rate)
    (tmp_path / "mini_speech_commands" / "__MACOSX").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr("ddray.data.speech._load")  # an option is refused before anything is read
        with pytest.raises(InputError, match="label_column must be left out for speech_commands_mini"):
            open_dataset("speech_commands_mini?label_column=x", data_dir=tmp_path)
    data = open_dataset("speech_commands_mini", data_dir=tmp_path)
    assert data.class_names == ("no", "yes")
    assert data.image_shape == (1, 64, 64)
    assert data.train().images.dtype == torch.float32
    assert torch.bincount(data.train().labels).tolist() == [14, 14]
    assert torch.bincount(data.test().labels).tolist() == [2, 2]
    torch.testing.assert_close(data.test().images[0], spectrogram(tone(rate, 600)))
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


def test_empty_clips_are_refused(tmp_path: Path) -> None:
    root = tmp_path / "w"
    a_folder(root, 8000, 2)
    write_wav(root / "yes" / "02.wav", np.zeros(0, dtype=np.int16), 8000)
    with pytest.raises(InputError, match=r"02\.wav"):
        open_dataset(str(root))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The folder of a dataset, with nothing else in it."""
    (tmp_path / "clips").mkdir()
    return tmp_path / "clips"


def spectrogram(wave: np.ndarray) -> torch.Tensor:
    return spectrograms(torch.from_numpy(wave.astype(np.float32) / 32768)[None])[0]


def layout(root: Path, **window: float) -> Layout:
    opened = layout_of_clips(root, ContentOptions.parse(window))
    assert opened is not None
    return opened


def trained(root: Path, **window: float) -> torch.Tensor:
    """Return the spectrograms of train, which is test too if there is no test."""
    if not (root / "test").exists():
        (root / "test").symlink_to(root / "train")
    return layout(root, **window).train(None)[0].images


def late_event(root: Path, rate: int = 8000) -> np.ndarray:
    """Write clips of 5 s whose only sound is in the third second, and return that."""
    event = tone(rate, 440)
    clip = np.zeros(5 * rate, dtype=np.int16)
    clip[2 * rate : 3 * rate] = event
    for half in ("train", "test"):
        for name in ("a", "b"):
            write_wav(root / half / name / "0.wav", clip, rate)
    return event


def test_of_a_long_clip_the_loudest_window_is_seen(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    event = late_event(folder)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        assert torch.equal(trained(folder)[0], spectrogram(event))
        (line,) = caplog.messages
        assert line.startswith("2 of 2 clips are longer than 1 s, up to 5 s (")
        assert "the loudest 1 s of each is taken; --clip-seconds and --clip-offset" in line


def test_a_window_has_a_length_and_an_offset(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    event = late_event(folder)
    silence = spectrogram(np.zeros(8000, dtype=np.int16))
    assert torch.equal(trained(folder, clip_offset=0.0)[0], silence)
    assert torch.equal(trained(folder, clip_offset=2.0)[0], spectrogram(event))
    assert "1 s from 2 s on is taken" in caplog.text
    half = np.concatenate([event[4000:], np.zeros(4000, dtype=np.int16)])
    assert torch.equal(trained(folder, clip_offset=2.5)[0], spectrogram(half))
    short = trained(folder, clip_seconds=0.5)[0]
    assert torch.equal(short, spectrogram(event[:4000]))
    caplog.clear()
    padded = trained(folder, clip_offset=4.5)[0]
    assert torch.equal(padded, silence)
    assert [line[:30] for line in caplog.messages] == [
        "2 of 2 clips are longer than 1",
        "2 of 2 clips are shorter than ",
    ]
    with pytest.raises(
        InputError, match=r"clip_offset must lie within every clip, got 5 s for 5 s of .*0\.wav"
    ):
        trained(folder, clip_offset=5.0)
    with pytest.raises(InputError, match=r"clip_seconds must be at least 0\.032 at 8000 Hz, got 0\.01"):
        trained(folder, clip_seconds=0.01)


def test_a_window_of_the_whole_clip_skips_no_frame(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A click in any place is seen: 64 columns average the frames of 5 s."""
    for index in range(20):
        clip = np.zeros(40000, dtype=np.int16)
        clip[2000 * index + 500 : 2000 * index + 564] = 20000
        write_wav(folder / "train" / "ab"[index % 2] / f"{index:02}.wav", clip, 8000)
    images = trained(folder, clip_seconds=5.0)
    assert not caplog.messages
    loudest = images.exp().sum(2).flatten(1).max(1).values
    assert float(loudest.min()) > 0.5 * float(loudest.max())


@pytest.mark.parametrize(
    ("rate", "expected"), [(44100, 16000), (22050, 16000), (11025, 16000), (4000, 16000)]
)
def test_another_rate_is_resampled(
    rate: int, expected: int, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, hertz in (("a", 440), ("b", 880)):
        write_wav(folder / "train" / name / "0.wav", tone(rate, hertz), rate)
        write_wav(folder / "test" / name / "0.wav", tone(rate, hertz), rate)
    images = trained(folder)
    middle = slice(8, 56)  # the ends of a clip ring
    for image, hertz in zip(images, (440, 880), strict=True):
        expected_image = spectrogram(tone(expected, hertz))
        torch.testing.assert_close(
            image.exp()[..., middle], expected_image.exp()[..., middle], rtol=0.02, atol=0.3
        )
    assert f"2 of 2 clips are resampled from {rate} to {expected} Hz, such as " in caplog.text


def test_clips_of_a_few_other_rates_are_resampled_to_that_of_most(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a_folder(folder / "train", 8000, 3)
    a_folder(folder / "test", 16000, 1)
    write_wav(folder / "train" / "yes" / "00.wav", tone(16000, 300), 16000)
    opened = layout(folder)
    split, geometry = opened.train(None)
    torch.testing.assert_close(
        split.images[3].exp()[..., 8:56], spectrogram(tone(8000, 300)).exp()[..., 8:56], rtol=0.02, atol=0.3
    )
    (line,) = caplog.messages
    assert line.startswith("1 of 6 clips are resampled from 16000 to 8000 Hz, such as ")
    caplog.clear()
    opened.test(geometry)
    assert "2 of 2 clips are resampled from 16000 to 8000 Hz" in caplog.text


def test_what_is_no_clip_is_counted_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """As Speech Commands comes: noise in a folder of its own, pictures and texts between the clips."""
    a_folder(folder, 16000, 8)
    write_wav(folder / "_background_noise_" / "hum.wav", tone(16000, 50, 60.0), 16000)
    (folder / "yes" / "cover.png").write_bytes(b"")
    data = open_dataset(str(folder))
    assert data.class_names == ("no", "yes")
    assert len(data.train()) == 14
    assert caplog.messages == [
        f"{folder}: left out 1 files of another kind: yes/cover.png",
        f"{folder}: left out 1 folders that are hidden or begin with _: _background_noise_ (1 files)",
    ]


def test_a_csv_file_labels_clips(folder: Path) -> None:
    """As ESC-50: audio/ beside meta/, whose file has a column `category`."""
    rows = ["filename,fold,category"]
    for index in range(16):
        write_wav(folder / "audio" / f"{index}.wav", tone(16000, 300 + 500 * (index % 2)), 16000)
        rows.append(f"{index}.wav,1,{'dog' if index % 2 else 'cat'}")
    (folder / "labels.csv").write_text("\n".join(rows))
    data = open_dataset(str(folder), label_column="category")
    assert data.class_names == ("cat", "dog")
    assert torch.bincount(data.train().labels).tolist() == [7, 7]
    assert torch.bincount(data.test().labels).tolist() == [1, 1]
    assert torch.equal(data.test().images[0], spectrogram(tone(16000, 300)))


def test_training_and_testing_folders(folder: Path) -> None:
    a_folder(folder / "Training", 8000, 3)
    a_folder(folder / "Testing", 8000, 2)
    data = open_dataset(str(folder))
    assert (len(data.train()), len(data.test())) == (6, 4)


def test_stereo_and_24_bits(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    whole = tone(16000, 440)
    write_wav(folder / "train" / "a" / "0.wav", np.stack([whole, whole], 1), 16000)
    file = folder / "train" / "b" / "0.wav"
    file.parent.mkdir()
    with wave.open(str(file), "wb") as writer:
        writer.setnchannels(1)
        writer.setsampwidth(3)
        writer.setframerate(16000)
        writer.writeframes((whole.astype("<i4") << 8).view(np.uint8).reshape(-1, 4)[:, :3].tobytes())
    images = trained(folder)
    assert torch.equal(images[0], spectrogram(whole))
    assert torch.equal(images[1], spectrogram(whole))
    (line,) = caplog.messages
    assert line.startswith("1 of 2 clips are not mono, such as ")
    assert line.endswith("channels are averaged")


@pytest.mark.parametrize("suffix", ["flac", "ogg", "mp3"])
def test_other_sound_files_are_read_by_the_extra(suffix: str, folder: Path) -> None:
    soundfile = pytest.importorskip("soundfile")
    whole = tone(16000, 440)
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        soundfile.write(folder / "train" / name / f"0.{suffix}", whole, 16000)
    images = trained(folder)
    if suffix == "flac":
        assert torch.equal(images[0], spectrogram(whole))
    else:
        levels, expected = (image[0, :, 8:56].mean(1) for image in (images[0], spectrogram(whole)))
        assert levels.argmax() == expected.argmax()
        assert float(levels.max()) == pytest.approx(float(expected.max()), abs=0.05)


def test_without_the_extra_a_flac_file_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "train" / name / "0.flac").write_bytes(b"fLaC")
    with pytest.raises(InputError, match=r"\.flac files need the extra sound: pip install 'ddray\[sound\]'"):
        trained(folder)


def test_a_broken_flac_file_is_named(folder: Path) -> None:
    pytest.importorskip("soundfile")
    for name in ("a", "b"):
        (folder / "train" / name).mkdir(parents=True)
        (folder / "train" / name / "0.flac").write_bytes(b"fLaC nothing else")
    with pytest.raises(InputError, match=r"sound file must be readable, got .*a/0\.flac: "):
        trained(folder)
