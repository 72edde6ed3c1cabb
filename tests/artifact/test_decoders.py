"""Decoders and other projects' formats are found by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ddray.artifact.decoders import Decoder, decoder_names, get_decoder
from ddray.artifact.decoders.images import check_images, read_images
from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.artifact.foreign import ForeignFile, ForeignFormat, ForeignRequest, ForeignSet, format_of
from ddray.artifact.reading import load
from ddray.errors import InputError
from ddray.system import registry
from tests.artifact.test_artifact import distilled_set, meta


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretend that an installed package offers `mine` in a group."""

    def install(group: str, **attributes: Any) -> None:
        module = ModuleType("theirs")
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, "theirs", module)
        offered = EntryPoint("mine", "theirs", group)
        monkeypatch.setattr(registry, "entry_points", lambda group: [offered] * (group == offered.group))

    return install


def test_every_decoder_is_found_by_its_name() -> None:
    assert decoder_names() == ["boost_ssdd", "d3hr", "images", "partition"]
    for name in (None, *decoder_names()):
        assert (get_decoder(name).generate is not None) == (name == "d3hr")
    with pytest.raises(InputError, match=r"decoder: must be one of boost_ssdd, .*, got 'partitions'"):
        meta(decoder="partitions")


def test_an_installed_package_offers_a_decoder(offer: Any, tmp_path: Path) -> None:
    """Here: images whose mirror images belong to the set."""

    def decode(distilled: DistilledSet) -> TrainSet:
        both = torch.cat([distilled.images, distilled.images.flip(3)])
        return TrainSet(both, distilled.labels.repeat(2))

    offer("ddray.decoders", DECODER=Decoder(read_images, check_images, decode))
    distilled_set(meta=meta(decoder="mine")).save(tmp_path / "a.pt")

    loaded = load(tmp_path / "a.pt")

    assert loaded.meta.decoder == "mine"
    assert loaded.decode().images.shape == (8, 3, 4, 5)
    assert torch.equal(loaded.decode().images[4:], loaded.images.flip(3))


def test_an_installed_package_offers_a_format(offer: Any, toy: Any, tmp_path: Path) -> None:
    def read(path: Path, contents: int, request: ForeignRequest) -> ForeignFile:
        return ForeignFile([ForeignSet(torch.zeros(contents, 1, 2, 2), torch.arange(contents))])

    number = ForeignFormat("a number (mine)", lambda path, contents: isinstance(contents, int), read)
    offer("ddray.formats", FORMAT=number)

    torch.save(3, tmp_path / "x.pt")
    loaded = load(tmp_path / "x.pt", ForeignRequest(toy(shape=(1, 2, 2))))

    assert (loaded.images.shape, loaded.labels.tolist()) == ((3, 1, 2, 2), [0, 1, 2])
    with pytest.raises(InputError, match=r"own file, .*DC family.*, or a number \(mine\), or .*MTT"):
        format_of(tmp_path / "x.pt", "text")
