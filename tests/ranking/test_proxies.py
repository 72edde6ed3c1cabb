"""Other projects' files as proxies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddray.errors import InputError
from ddray.ranking import command as rank
from ddray.ranking.options import NasOptions, NasRequest
from ddray.ranking.spaces import resolve_config
from ddray.ranking.sweep import Sweep


def prepared(*paths: Path, **options: object) -> Sweep:
    nas_options = NasOptions(sample=2, epochs=1, executor="local")
    request = NasRequest.pick({"proxies": paths, "dataset": "digits", **options})
    return rank.prepare(request, nas_options, resolve_config(nas_options))


def test_each_run_of_a_file_is_a_proxy(tmp_path: Path) -> None:
    data = [[torch.full((10, 1, 16, 16), float(run)), torch.arange(10)] for run in range(2)]
    torch.save({"data": data, "accs_all_exps": {"ConvNet": [0.1] * 2}}, tmp_path / "res_DM.pt")

    sweep = prepared(tmp_path / "res_DM.pt")

    assert [proxy.name for proxy in sweep.proxies] == ["res_DM.pt#0", "res_DM.pt#1"]
    assert [float(proxy.data.images.max()) for proxy in sweep.proxies] == [0.0, 1.0]
    (proxy,) = prepared(tmp_path / "res_DM.pt", index=1).proxies
    assert (proxy.name, float(proxy.data.images.max())) == ("res_DM.pt", 1.0)


def test_soft_labels_and_images_in_parts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(torch.randn(10, 1, 16, 16), tmp_path / "images_best.pt")
    torch.save(torch.eye(10) * 3, tmp_path / "labels_best.pt")
    torch.save([torch.rand(10, 1, 16, 16), torch.arange(10)], tmp_path / "data.pt")

    soft, cut = prepared(tmp_path / "images_best.pt", tmp_path / "data.pt", factor=2).proxies

    assert cut.num_images == 40
    assert cut.storage_images == 10
    assert "images_best.pt holds whole images: --factor 2 is not for it" in caplog.text
    torch.testing.assert_close(torch.tensor(soft.data.labels), (torch.eye(10) * 3).softmax(1))
    (unsorted,) = rank.harness_variants([soft], {"bug": {"shuffle": False}})
    assert unsorted.data.labels.argmax(1).tolist() == list(range(10))


def test_undecoded_sets_are_refused(tmp_path: Path) -> None:
    torch.save([torch.rand(10, 1, 16, 16), torch.arange(10)], tmp_path / "data.pt")

    with pytest.raises(InputError, match="must be read with --factor N"):
        prepared(tmp_path / "data.pt")
