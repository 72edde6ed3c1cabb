"""reports/README.md: made of the stored parts, for readers; its findings follow from the numbers."""

from __future__ import annotations

import json
import re
from inspect import getsource
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddray.drawing.text import percent_short
from ddray.evaluation.robust import label_robust_score
from ddray.tables.spec import read_spec
from reports import bars, decoupled, diffusion, findings, optimisation, sections
from reports.readme import readme
from reports.regenerate import PARTS
from reports.scale import __main__ as scale
from reports.scale.lab import Lab
from reports.tables import PREPARED, TITLES, command_of

REPORTS = Path(__file__).resolve().parents[2] / "reports"


def part(name: str) -> dict[str, Any]:
    return dict(json.loads((REPORTS / f"{name}.json").read_text(encoding="utf-8")))


def cell(method: str, accuracy: float, column: str, error: float = 0.01) -> dict[str, Any]:
    return {"method": method, "accuracy_mean": accuracy, "standard_error": error, "column": column}


def test_the_page_is_that_of_the_stored_parts() -> None:
    parts = {name: part(name) for name in PARTS if (REPORTS / f"{name}.json").exists()}
    assert len(parts) == len(PARTS)
    text = (REPORTS / "README.md").read_text(encoding="utf-8")
    assert readme(parts) == text, "run: python reports/regenerate.py render"


@pytest.mark.parametrize("pages", [decoupled, optimisation, scale], ids=lambda module: module._RECORD.stem)
def test_a_page_is_that_of_its_record(pages: Any) -> None:
    lab = Lab(REPORTS, pages._RECORD, repeats=3, is_tiny=False)
    text = pages._RECORD.with_suffix(".md").read_text(encoding="utf-8")
    assert "\n".join(pages.page(lab.measured())) == text, f"run: python -m reports.{pages._RECORD.stem} PART"


def test_the_page_of_d3hr_is_that_of_its_stored_parts() -> None:
    text = (REPORTS / "d3hr.md").read_text(encoding="utf-8")
    assert diffusion.render(part("d3hr")) == text, "run: python reports/diffusion.py render"


def test_commands_reproduce_their_tables() -> None:
    """Those whose data is prepared first are run by the script that does so; what is said stands outside."""
    page = (REPORTS / "README.md").read_text(encoding="utf-8")
    for name in TITLES:
        assert part(name)["command"] == command_of(name)
        assert f"`{command_of(name)}`" in page
        assert (f"tables.measure(ddray, {name!r})" in getsource(PARTS[name]).replace('"', "'")) == (
            name not in PREPARED
        )
    commands = re.findall(r"`((?:ddray|python|pytest) [^`]*)`", page)
    assert len(commands) > 20
    assert [command for command in commands if "(" in command] == []


def test_the_summary_in_the_projects_readme_has_the_stored_numbers() -> None:
    text = (REPORTS.parent / "README.md").read_text(encoding="utf-8")
    rows = {"dm": "dm, 300 steps, batch_real 64"}
    rows["datadam"] = "datadam paper (ZCA, p=4), 300 steps, batch_real 64"

    def numbers(name: str, label: str) -> str:
        (row,) = (row for row in part(name)["rows"] if row["method"] == label)
        return percent_short(row["mean"], row["std"])

    lines = re.findall(r"^\| `(\w+)` \|(.*)\|(.*)\|(.*)\|$", text, re.MULTILINE)
    assert [method for method, *_ in lines] == ["random", "class_mean", "dm", "datadam"]
    for method, *cells in lines:
        digits, cifar10, published = (cell.strip(" *") for cell in cells)
        assert digits == numbers("digits", method)
        assert cifar10 == numbers("cifar10", rows.get(method, method))
        assert published == findings.published(method).partition(" (")[0].strip("-")
    for method in ("datadam", "random"):
        assert f"{numbers('digits', method).partition(' ')[0]} %" in text.partition("## Install")[0]


def test_no_set_of_d3hr_or_its_generator_beats_ten_real_images_per_class() -> None:
    for name in ("diffusion_table", "diffusion_mnist"):
        cells = [one for one in part(name)["cells"] if one["ipc"] == 10]
        for protocol in ("hard", "soft"):
            scores = {c["method"]: c["accuracy_mean"] for c in cells if c["protocol"] == protocol}
            assert max(scores, key=lambda method: scores[method]) == "random"


def test_lrs_and_ars_are_in_percent_everywhere() -> None:
    (cell,) = (
        one
        for one in part("leaderboard")["cells"]
        if (one["method"], one["protocol"], one["ipc"]) == ("random", "robust", 1)
    )
    page = (REPORTS / "README.md").read_text(encoding="utf-8")
    assert f"| random | {percent_short(cell['lrs'])} / {percent_short(cell['ars'])} |" in page
    as_good = percent_short(label_robust_score(0.0, 0.0))
    docs = (REPORTS.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    assert f"scores {as_good}" in " ".join(docs.split())


def test_the_page_is_for_readers() -> None:
    pages = {path.name: path.read_text(encoding="utf-8") for path in REPORTS.glob("*.md")}
    assert {"README.md", "d3hr.md", "optimisation.md", "scale.md"} <= pages.keys()
    assert not [name for name, text in pages.items() if '{"' in text], "JSON is nothing for a reader"
    machine = pages["README.md"].partition("measured on ")[2].partition(";")[0]
    assert machine.endswith(" cores, no GPU")
    assert pages["README.md"].count(machine) == 1, "hardware once"


@pytest.mark.parametrize("name", TITLES)
def test_a_spec_is_what_was_measured(name: str) -> None:
    file = REPORTS / "specs" / f"{name}.yaml"
    assert yaml.safe_load(file.read_text(encoding="utf-8")) == part(name)["spec"]
    assert read_spec(file).methods


def test_every_benchmark_has_its_bar_and_figures_with_units() -> None:
    stored = [row for name in PARTS if name.startswith("benchmarks") for row in part(name)["rows"]]
    rows = bars.rows(stored)
    assert len(rows) > 20
    assert not [name for name, _, bar, _ in rows if bar == "-"]
    assert {verdict for *_, verdict in rows} == {"met", "**missed**"}


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("loop_seconds", 5.3964, "loop 5.4 s"),
        ("overhead_seconds", 0.00546, "overhead 5.46 ms"),
        ("loop_seconds_with_our_memory", 2.64, "loop with our memory 2.64 s"),
        ("times_faster", 2.4856, "2.49 times faster"),
        ("peak_memory_bytes", 3 * 2**30, "peak memory 3 GiB"),
        ("images_per_s", 1325.2, "images 1,325 per s"),
        ("seconds_per_real_image", {"10x32": 0.0009}, "per real image: 10x32 0.9 ms"),
    ],
)
def test_a_figure_has_its_unit(key: str, value: Any, text: str) -> None:
    assert bars.figure(key, value) == text


def test_winners_are_told_with_what_is_as_good_and_with_random_images() -> None:
    cells = [
        *(cell("random", 0.5, "ipc 1"), cell("dm", 0.8, "ipc 1"), cell("dsdm", 0.809, "ipc 1")),
        *(cell("random", 0.9, "ipc 10"), cell("dm", 0.7, "ipc 10"), cell("dsdm", 0.6, "ipc 10")),
    ]
    text = findings.winners(cells, lambda each: str(each["column"]))
    assert text == (
        "**dsdm** is best at ipc 1 (80.9 %, 1 other within its error, random 50.0); "
        "**random** is best at ipc 10 (90.0 %)."
    )


@pytest.mark.parametrize(
    ("gain", "end"), [(0.01, "no improvement is shown."), (0.05, "more than the spread.")]
)
def test_a_search_gains_nothing_within_its_spread(gain: float, end: str) -> None:
    preset = {"test_accuracy_mean": 0.8, "test_accuracy_std": 0.02}
    result = {
        "num_trials": 8,
        "paper_point": preset,
        "test_accuracy_mean": 0.8 + gain,
        "test_accuracy_std": 0.01,
    }
    assert findings.search({"result": result}).endswith(end)


def test_a_ranking_says_which_proxies_say_nothing() -> None:
    def row(proxy: str, spearman: float, low: float, high: float, images: int) -> dict[str, Any]:
        interval = {"spearman": spearman, "spearman_ci95": [low, high]}
        return {"proxy": f"{proxy}.pt", "storage_images": images, **interval}

    alone = [row("a", 0.9, 0.8, 0.95, 100), row("b", 0.2, -0.1, 0.5, 10)]
    assert findings.ranking({"result": {"proxies": alone}}) == (
        "a leads with Spearman 0.90 [0.80, 0.95]; 1 of all 2 include 0. "
        "At most 0.20 with 10 images and 0.90 with 100 images."
    )
    near = [*alone, row("c", 0.85, 0.7, 0.9, 100)]
    assert findings.ranking({"result": {"proxies": near}}).startswith("No proxy is clearly best: a leads")


def test_correlations_of_few_architectures_are_not_told() -> None:
    correlations = {"spearman": 0.61, "spearman_ci95": [0.52, 0.73], "spearman_top20": 0.84, "kendall": 0.95}
    row = {**correlations, "top1_truth_accuracy": 0.5, "best_truth_accuracy": 0.5, "num_at_chance": 0}
    row |= {"proxy": "a.pt", "storage_images": 10, "wall_s": 1.0}

    def told(num_archs: int) -> list[bool]:
        result = {"proxies": [{**row, "num_archs": num_archs}], "num_archs": num_archs, "num_failed": 0}
        result |= {"truth": {"source": "table"}, "wall_s": 1.0}
        part = {"result": result, "seeds": 1, "command": "ddray nas", "picture": "a.png"}
        text = "\n".join([*sections.ranking(part), findings.ranking(part)])
        return [number in text for number in ("0.61", "0.52", "0.73", "0.95", "0.84")]

    assert told(7) == [False] * 5
    assert told(8) == [True] * 4 + [False]
    assert told(36) == [True] * 5
