from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ddray.drawing.html import COLOURS
from ddray.drawing.plots import save_plot
from ddray.ranking.report import (
    _points,
    draw_panel,
    published_figures,
    save_scatters,
    summary,
    sweep_title,
    write_nas_report,
)
from tests.report.pages import ENVIRONMENT, heading, traces

NAN = float("nan")
FEW = '<span class="dim">too few</span>'


def figures(proxy: str, **changes: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "proxy": proxy,
        "spearman": 0.7123,
        "spearman_ci95": [0.55, 0.81],
        "spearman_top20": None,
        "spearman_top20_ci95": None,
        "kendall": 0.5,
        "top1_truth_accuracy": 0.601,
        "top5_truth_accuracy": 0.602,
        "top10_truth_accuracy": 0.603,
        "best_truth_accuracy": 0.604,
        "num_tied": 4,
        "num_at_chance": 0,
        "num_archs": 23,
        "num_failed": 1,
        "wall_s": 90.0,
        "storage_images": 500,
    }
    return values | changes


def lines(proxy: str, num: int = 24, *, depth: bool = True) -> pd.DataFrame:
    """`num` architectures, best first; the last one failed, the one before it has no truth."""
    rank = np.arange(num, dtype=float)
    table = pd.DataFrame(
        {
            "proxy": proxy,
            "index": 100 + np.arange(num),
            "name": [f"net<{arch}>" for arch in range(num)],
            **({"depth": 1 + np.arange(num) % 4} if depth else {"arch_str": "|none~0|"}),
            "params_m": 0.12345,
            "flops_m": 6.5,
            "proxy_accuracy": 0.5 - rank / 100,
            "proxy_accuracy_std": 0.01,
            "proxy_rank": rank + 1,
            "truth_accuracy": 0.604 - rank / 1000,
            "truth_rank": rank + 1,
            "num_seeds": 2,
            "failed": False,
            "truth_test_accuracy": 0.7111,
        }
    )
    table.loc[num - 1, ["proxy_accuracy", "proxy_accuracy_std", "proxy_rank"]] = NAN
    table.loc[num - 1, ["num_seeds", "failed"]] = [0, True]
    table.loc[num - 2, ["truth_accuracy", "truth_rank", "truth_test_accuracy"]] = NAN
    return table


def result(*proxies: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"space": "convnet720", "num_archs": 24, "proxies": list(proxies), "wall_s": 100.0} | changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text("command: nas\nname: <b>bold</b>\n")
    (tmp_path / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return tmp_path


@pytest.fixture
def page(folder: Path) -> Callable[..., str]:
    """Write a page and return it without plotly's code."""

    def write(command_result: dict[str, Any], table: pd.DataFrame) -> str:
        write_nas_report(folder, command_result, table)
        text = (folder / "report.html").read_text()
        return (
            text[: text.index("<script>")]
            + text[text.index("</style>\n<script>") :].partition("</script>")[2]
        )

    return write


class TestSummary:
    def test_what_is_published_is_what_the_papers_table_says(self) -> None:
        path = Path(__file__).parents[2] / "reports" / "published.csv"
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if row["paper"] == "datadam"]
        for space, table in (("convnet720", "Table 4"), ("nasbench201", "Table 5")):
            printed: dict[tuple[str, str], float] = {}
            for row in rows:
                if row["table"] == table:
                    scale = 100 if row["metric"] == "nas_top1_accuracy" else 1
                    printed[row["method"], row["metric"]] = float(row["value"]) / scale
            assert {method for method, _ in printed} == set(published_figures(space))
            metrics = ("nas_top1_accuracy", "spearman", "spearman_top20", "search_time", "storage_images")
            for method, values in published_figures(space).items():
                expected = [printed.pop((method, metric), None) for metric in metrics]
                if (space, method) == ("convnet720", "datadam"):
                    assert expected[1] is None
                    expected[1] = 0.72  # in the text, not in the table
                assert list(values.values()) == pytest.approx(expected)
            assert not printed

    def test_a_methods_published_line_stands_below_its_proxy(self) -> None:
        summary_lines = summary(
            result(
                figures("datadam_ipc10.pt"),
                figures("dsdm.pt"),
                figures("early-stopping"),
                figures("a.pt", method="random"),
                truth={"source": "whole", "wall_s": 600.0, "storage_images": 900},
            )
        )

        assert [line["label"] for line in summary_lines] == [
            *("datadam_ipc10.pt", "datadam (published)", "dsdm.pt"),
            *("early-stopping", "early_stopping (published)", "a.pt", "random (published)"),
            *("whole set", "whole (published)", "dsa (published)", "dm (published)", "cafe (published)"),
        ]
        whole = summary_lines[7]
        assert (whole["top1_truth_accuracy"], whole["spearman"], whole["wall_s"]) == (0.604, 1, 600.0)
        assert summary_lines[0]["counts"] == "4 tied, 1 left out"

    @pytest.mark.parametrize(
        ("proxy", "method"),
        [
            ("/work/random/dm.pt", "dm"),
            ("/work/random/kcenter.pt", None),
            ("/random/datadam_ipc10/distilled.pt", "datadam"),
            ("/work/random_ssl.pt", None),
            ("random (ipc 10)", "random"),
            ("early-stopping (20 steps)", "early_stopping"),
        ],
    )
    def test_a_path_is_of_the_method_that_names_its_file(self, proxy: str, method: str | None) -> None:
        below = summary(result(figures(proxy)))[1]["label"]

        assert below == f"{method or 'random'} (published)"
        if method is None:  # all published methods follow, in the table's order
            assert len(summary(result(figures(proxy)))) == 1 + len(published_figures("convnet720"))

    def test_diverged_truth_is_counted(self) -> None:
        summary_lines = summary(
            result(figures("x"), truth={"source": "whole", "wall_s": 1.0, "num_diverged": 2})
        )

        assert summary_lines[1]["label"] == "whole set"
        assert summary_lines[1]["counts"] == "2 diverged"

    def test_a_truth_that_was_read_has_no_line(self) -> None:
        summary_lines = summary(result(figures("x"), space="nasbench201", truth={"source": "table"}))

        assert summary_lines[0]["label"] == "x"
        assert "whole set" not in [line["label"] for line in summary_lines]
        assert len(summary_lines) == 1 + 8


class TestPage:
    def test_it_shows_figures_rankings_failures_and_where_they_come_from(self, page: Any) -> None:
        command_result = result(
            figures("datadam <1>.pt", top1_test_accuracy=0.65),
            figures("random", spearman=None, spearman_ci95=None, kendall=None, wall_s=None),
            dataset="cifar10",
            truth={"source": "whole", "wall_s": 600.0, "storage_images": 900},
        )
        text = page(command_result, pd.concat([lines("datadam <1>.pt"), lines("random")], ignore_index=True))

        merit = text[text.index("<h2>Figures of merit</h2>") : text.index("<h2>datadam &lt;1&gt;.pt</h2>")]
        cells = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in merit.splitlines() if "<td" in line]
        assert cells[0][:5] == ["datadam &lt;1&gt;.pt", "65.00", "60.10", "60.20", "60.30"]
        assert cells[0][5] == '0.712 <span class="ci">[0.55, 0.81]</span>'
        assert cells[0][6:] == [FEW, "0.500", "1.5", "500", "4 tied, 1 left out"]
        assert cells[1] == [
            "datadam (published)",
            "89.00",
            "-",
            "-",
            "-",
            "0.720",
            "0.690",
            "-",
            "34.8",
            "500",
            "",
        ]
        assert cells[2][5:9] == ["-", FEW, "-", "-"]
        assert cells[4][0] == "whole set"

        ranked = text[text.index("Best-ranked architectures (20)") : text.index("<h2>random</h2>")]
        rows = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in ranked.splitlines() if "<td" in line]
        assert len(rows) == 20
        assert rows[0] == [
            *("1", "1", "100", "net&lt;0&gt;", "1", "0.123", "6.5"),
            *("50.00 &plusmn; 1.00", "2", "60.40", "71.11"),
        ]
        heads = re.findall(r"<th>(.*?)</th>", ranked)
        assert heads[-1] == "test %"

        failures = text[text.index("<h2>Failures</h2>") :]
        assert failures.count("net&lt;23&gt;") == 2
        assert "&lt;b&gt;bold&lt;/b&gt;" in text
        assert "H200" in text
        assert text.count("js-plotly") >= 1
        assert text.count("Plotly.newPlot") == 2

    def test_it_needs_no_network_and_suits_phones_and_the_dark(self, page: Any) -> None:
        text = page(result(figures("random")), lines("random"))

        assert not re.findall(r'(?:src|href)\s*=\s*["\']?(?:https?:)?//', text)
        assert "@import" not in text
        assert "prefers-color-scheme: dark" in text
        assert 'name="viewport" content="width=device-width' in text
        assert '"responsive": true' in text

    def test_names_cannot_leave_the_plots_script(self, page: Any) -> None:
        table = lines("random")
        table["name"] = "</script><img src=x>"

        assert "</script><img" not in page(result(figures("random")), table)

    def test_without_failures_and_depths(self, page: Any) -> None:
        table = lines("random", depth=False).iloc[:20]

        text = page(result(figures("random"), space="nasbench201"), table)

        assert "None: every architecture finished" in text
        assert "<th>arch_str</th>" in text
        assert "|none~0|" in text

    def test_its_title_is_the_result(self, page: Any) -> None:
        text = page(result(figures("random")), lines("random"))

        assert heading(text).startswith("random ranks ")
        assert heading(text).endswith(" with Spearman 0.71")
        best = sweep_title("nasbench201", None, 20, {"a": None, "b": 0.2, "c": 0.613})
        assert best == "c ranks 20 architectures of nasbench201 with Spearman 0.61"
        few = sweep_title("convnet720", "digits", 7, {"a": 1.0})
        assert few == "7 architectures of convnet720 on digits: too few for a correlation"
        assert "no proxy's ranking" in sweep_title("convnet720", "digits", 8, {"a": None})

    @pytest.mark.parametrize(("num_archs", "is_few"), [(7, True), (8, False)])
    def test_correlations_of_few_architectures_are_not_told(
        self, page: Any, num_archs: int, is_few: bool
    ) -> None:
        one = figures("random", num_archs=num_archs, spearman_top20=0.4321, kendall=0.5678)

        text = page(result(one), lines("random", 9, depth=False))
        text = text[text.index("<h1>") : text.index("How this was measured")]

        assert [number in text for number in ("0.71", "0.55", "0.81", "0.568")] == [not is_few] * 4
        assert "0.432" not in text, "the top 20 % are two"
        assert text.count(">too few<") == (3 if is_few else 1)
        assert ("<b>&rho; -</b>too few for a correlation" in text) == is_few

    def test_a_proxy_of_few_architectures_does_not_lead(self, page: Any) -> None:
        few = figures("few", num_archs=3, spearman=1.0)
        table = pd.concat([lines("few"), lines("random")], ignore_index=True)

        assert heading(page(result(few, figures("random")), table)).startswith("random ranks ")

    def test_of_many_points_some_are_drawn(self, page: Any) -> None:
        text = page(result(figures("random")), lines("random", 3500, depth=False))

        points = traces(text)[0]
        assert points["type"] == "scatter"
        assert 1500 < len(points["customdata"]) <= 3000

    def test_a_proxy_that_ranked_nothing(self, page: Any) -> None:
        table = lines("random").iloc[-2:]

        text = page(result(figures("random", spearman=None, spearman_ci95=None)), table)

        assert "Best-ranked architectures (1)" in text
        assert "net&lt;23&gt;" not in text[: text.index("<h2>Failures</h2>")]


class TestScatters:
    def test_one_png_per_proxy_and_one_of_all(self, tmp_path: Path) -> None:
        names = ["/data/Some set.pt", "early-stopping", "???"]
        table = pd.concat([lines(name) for name in names], ignore_index=True)

        paths = save_scatters(tmp_path, table, [figures(name) for name in names])

        assert [path.name for path in paths] == [
            *("scatter-1-some-set.png", "scatter-2-early-stopping.png", "scatter-3-proxy.png", "scatter.png")
        ]
        with Image.open(paths[0]) as picture:
            assert picture.size == (900, 700)
        with Image.open(paths[-1]) as picture:
            assert picture.size == (2 * 640, 2 * 520)
        assert not list(tmp_path.glob("*.tmp"))

    def test_dots_stand_where_their_accuracies_are(self, tmp_path: Path) -> None:
        table = lines("x", 5, depth=False).iloc[:3].copy()
        table["proxy_accuracy"] = [0.1, 0.2, 0.9]
        table["truth_accuracy"] = [0.2, 0.6, 0.3]
        centres = []

        def draw(figure: Any) -> None:
            points = _points(table)
            draw_panel(figure, figures("x"), points, points.y)
            figure.draw_without_rendering()  # lays the axes out
            (dots,) = figure.axes[0].collections
            np.testing.assert_allclose(dots.get_offsets(), [[10, 20], [20, 60], [90, 30]])
            centres.append(figure.axes[0].transData.transform(dots.get_offsets()))

        save_plot(tmp_path / "x.png", (900, 700), draw)

        with Image.open(tmp_path / "x.png") as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int)
        colour = list(bytes.fromhex(COLOURS[0][1:]))
        for x, y in centres[0]:
            patch = pixels[700 - round(y) - 2 : 700 - round(y) + 2, round(x) - 2 : round(x) + 2]
            assert (np.abs(patch - colour).sum(2) < 12).mean() >= 0.5  # a line may cross it

    def test_depths_have_colours_of_their_own(self, tmp_path: Path) -> None:
        with Image.open(save_scatters(tmp_path, lines("x"), [figures("x")])[0]) as picture:
            pixels = np.asarray(picture.convert("RGB")).astype(int).reshape(-1, 3)

        for colour in ("1f84c9", "e69f00", "009e73", "cc79a7"):
            assert (np.abs(pixels - list(bytes.fromhex(colour))).sum(1) < 12).sum() > 30

    @pytest.mark.parametrize("num", [0, 1, 2])
    def test_few_points_or_none(self, tmp_path: Path, num: int) -> None:
        table = lines("x").iloc[:num] if num else lines("x").iloc[-1:]

        paths = save_scatters(tmp_path, table, [figures("x", spearman=None, spearman_ci95=None)])

        assert len(paths) == 2

    def test_equal_accuracies_have_a_place(self, tmp_path: Path) -> None:
        table = lines("x").assign(proxy_accuracy=0.1, truth_accuracy=0.1)

        assert save_scatters(tmp_path, table, [figures("x")])

    def test_the_same_table_gives_the_same_bytes(self, tmp_path: Path) -> None:
        first, second = (
            save_scatters(tmp_path / name, lines("x"), [figures("x")])[0].read_bytes() for name in "ab"
        )

        assert first == second

    def test_a_dollar_in_a_name_is_text(self, tmp_path: Path) -> None:
        assert save_scatters(tmp_path, lines("a$\\b$"), [figures("a$\\b$")])
