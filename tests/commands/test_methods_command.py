"""`ddray methods`, and what `ddray` says alone."""

from __future__ import annotations

import json
import re

import pytest

from ddray.cli import _run
from ddray.commands.methods import fields_of, paper_of, summary_of
from ddray.methods import get_method, method_names
from ddray.runs.costs import record_costs
from ddray.runs.ledger import Row, Unit


def test_descriptions_name_papers() -> None:
    papers = {method: paper_of(method) for method in method_names()}

    assert papers["dm"] == "Zhao & Bilen, WACV 2023"
    assert papers["boost_ssdd"] == "Yu et al., ICLR 2025"
    assert papers["herding"] == "Welling 2009"
    assert papers["dd"] == "Wang et al. 2018"
    assert papers["dsdm"] == "Li et al., ACM MM 2024"
    assert (papers["random"], papers["class_mean"]) == (None, None)
    assert sum(paper is None for paper in papers.values()) <= 6
    assert summary_of("dm").startswith("dataset condensation with distribution matching")


def test_the_list_says_what_each_is_and_costs(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddray.methods.method_names", lambda: ["dm", "kcenter", "krr_st"])
    unit = Unit(kind="distill", spec={})
    record_costs(
        {"kind": "distill", "what": "dm", "which": "digits"}, [(Row.done(unit, {}, 8.0), 1e12)], "cpu"
    )

    assert _run(["methods", "--json"], False) == 0

    listed = json.loads(capfd.readouterr().out)
    dm, kcenter, krr_st = listed["methods"]
    assert (listed["dataset"], listed["ipc"]) == ("digits", 1)
    assert (dm["name"], dm["protocol"], dm["size"], dm["networks"]) == ("dm", "hard", "ipc", 0)
    assert dm["steps"] > 0
    assert dm["estimate_s"] > 0
    assert (kcenter["steps"], kcenter["networks"], kcenter["networks_missing"]) == (0, 1, 1)
    assert kcenter["estimate_s"] is None
    assert (krr_st["protocol"], krr_st["size"]) == ("linear", "budget")


def test_a_methods_page_has_its_settings_and_the_next_command(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    assert _run(["methods", "dm", "--ipc", "10"], False) == 0

    text = capfd.readouterr().out
    assert "Zhao & Bilen" in text
    assert "ddray distill --method dm --dataset digits --ipc 10" in text
    names = [name for name, _, _ in fields_of(get_method("dm").config_type)]
    assert {"lr_img", "batch_real"} <= set(names)
    assert [name for name in names if name not in text] == []


def test_a_methods_page_has_the_values_of_the_datasets_preset(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On digits dsdm's rate is not the class's default, which stands there where nothing is resolved."""
    monkeypatch.setenv("COLUMNS", "200")
    assert _run(["methods", "dsdm", "--json"], False) == 0
    settings = {one["name"]: one for one in json.loads(capfd.readouterr().out)["settings"]}
    assert (settings["lr_img"]["default"], settings["lr_img"]["value"]) == (0.1, 0.03)
    assert (settings["pool.epochs"]["default"], settings["pool.epochs"]["value"]) == (20, 10)

    assert _run(["methods", "dsdm"], False) == 0
    text = capfd.readouterr().out
    assert re.search(r"lr_img +│ 0.03 ", text)
    assert "on digits, ipc 1" in text

    assert _run(["methods", "dsdm", "--ipc", "0"], False) == 0
    text = capfd.readouterr().out
    assert re.search(r"lr_img +│ 0.1 ", text)
    assert re.search(r"--set +┃ default ", text)


def test_an_unknown_method_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run(["methods", "datadm"], False) == 2
    assert "did you mean 'datadam'" in capsys.readouterr().err


@pytest.mark.parametrize("group", [[], ["data"], ["pool"]])
def test_a_command_alone_shows_help_and_no_error(
    group: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(group, False) == 0

    output = capsys.readouterr()
    assert output.err == ""
    assert "Usage: " in output.out
    if not group:
        panels = ["Distil and score", "Search and compare", "What there is"]
        assert [panel for panel in panels if panel not in output.out] == []
        assert "ddray distill --method dm --dataset digits --ipc 1 --out digits.pt" in output.out
