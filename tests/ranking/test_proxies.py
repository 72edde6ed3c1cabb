"""Other projects' files as proxies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from ddray.artifact.reading import load
from ddray.data import open_dataset
from ddray.errors import InputError
from ddray.jobs.distill import distill
from ddray.jobs.plan import resolve
from ddray.ranking import command as rank
from ddray.ranking.options import NasOptions, NasRequest, named_file
from ddray.ranking.proxies import proxy_names
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


def named_sets(folder: Path, *names: str) -> list[Path]:
    """Write a set of each seed, in files that are all called alike in folders of their own."""
    paths = []
    for seed, name in enumerate(names):
        plan = resolve("random", open_dataset("digits"), ipc=1, seed=seed)
        paths.append(folder / str(seed) / name)
        distill(plan, device=torch.device("cpu"), run_dir=folder / str(seed), out=paths[-1])
    return paths


def test_a_file_that_ddray_named_is_called_by_what_is_in_it(tmp_path: Path) -> None:
    paths = named_sets(tmp_path, "distilled.pt", "distilled.pt", "mine.pt")

    names = [proxy.name for proxy in prepared(*paths).proxies]

    assert names == ["random-digits-ipc1-seed0", "random-digits-ipc1-seed1", "mine.pt"]


def test_files_of_one_name_are_told_apart_by_their_settings_or_paths(tmp_path: Path) -> None:
    paths = named_sets(tmp_path, "a.pt", "a.pt")
    twin = tmp_path / "twin" / "a.pt"
    twin.parent.mkdir()
    shutil.copy(paths[1], twin)

    assert [proxy.name for proxy in prepared(*paths, twin).proxies] == [
        *("random-digits-ipc1-seed0", str(paths[1]), str(twin)),
    ]


def test_people_name_proxies(tmp_path: Path) -> None:
    first, second = named_sets(tmp_path, "a.pt", "odd=name.pt")

    sweep = prepared(f"mine={first}", second, f"again={first}")  # type: ignore[arg-type]

    assert [proxy.name for proxy in sweep.proxies] == ["mine", "odd=name.pt", "again"]
    with pytest.raises(InputError, match="--proxy must name each file once, got a twice"):
        prepared(f"a={first}", f"a={second}")  # type: ignore[arg-type]


def test_a_resumed_sweep_keeps_the_names_of_its_rows(tmp_path: Path) -> None:
    paths = named_sets(tmp_path, "distilled.pt", "distilled.pt")
    files = [named_file(path) for path in paths]
    sets = [load(path) for path in paths]

    assert proxy_names(files, sets, [str(path) for path in paths]) == [str(path) for path in paths]
    assert proxy_names(files[:1], sets[:1], ["distilled.pt"]) == ["distilled.pt"]
