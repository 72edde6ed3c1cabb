"""Decoders and other projects' formats are found by name."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ddray.artifact import decoders, foreign
from ddray.artifact.decoders import GenerativeDecoder, decoder_names, get_decoder, images
from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.artifact.foreign import read_foreign
from ddray.artifact.reading import load
from ddray.errors import InputError
from tests.artifact.test_artifact import distilled_set, meta


def test_every_decoder_is_found_by_its_name() -> None:
    assert decoder_names() == ["boost_ssdd", "d3hr", "partition"]
    for name in (None, *decoder_names()):
        module = get_decoder(name)
        assert all(callable(getattr(module, part)) for part in ("read", "stored", "validate", "decode"))
        assert isinstance(module, GenerativeDecoder) == (name == "d3hr")
    with pytest.raises(InputError, match="did you mean 'partition'"):
        get_decoder("partitions")


def test_a_package_of_somebodys_own_can_offer_a_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here: images whose mirror images belong to the set."""

    def decode(distilled: DistilledSet) -> TrainSet:
        both = torch.cat([distilled.images, distilled.images.flip(3)])
        return TrainSet(both, distilled.labels.repeat(2))

    module: Any = ModuleType("mirror_decoder")
    module.read, module.stored, module.validate, module.decode = (
        *(images.read, images.stored, images.check_images),
        decode,
    )
    monkeypatch.setitem(sys.modules, "mirror_decoder", module)
    offered = EntryPoint("mirror", "mirror_decoder", "ddray.decoders")
    monkeypatch.setattr(decoders, "entry_points", lambda group: [offered])

    distilled_set(meta=meta(decoder="mirror")).save(tmp_path / "a.pt")
    loaded = load(tmp_path / "a.pt")

    assert loaded.meta.decoder == "mirror"
    assert loaded.decode().images.shape == (8, 3, 4, 5)
    assert torch.equal(loaded.decode().images[4:], loaded.images.flip(3))


def test_a_format_is_a_module_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "numbers.py").write_text(
        "import torch\n"
        "LAYOUT = 'a number (example)'\n"
        "def fits(path, contents):\n    return isinstance(contents, int)\n"
        "def read(path, contents):\n"
        "    return torch.zeros(contents, 1, 2, 2), torch.arange(contents)\n"
    )
    monkeypatch.setattr(foreign, "__path__", [*foreign.__path__, str(tmp_path)])

    pixels, labels = read_foreign(tmp_path / "x.pt", 3)

    assert (pixels.shape, labels.tolist()) == ((3, 1, 2, 2), [0, 1, 2])
    with pytest.raises(InputError, match=r"own file, .*DC family.*, or .*MTT.*, or a number \(example\)"):
        read_foreign(tmp_path / "x.pt", "text")
    sys.modules.pop("ddray.artifact.foreign.numbers")
