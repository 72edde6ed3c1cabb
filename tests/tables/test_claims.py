"""Claims of a table: which cells they compare, and what a paired test says of them."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import ttest_rel

from ddray import api
from ddray.commands.claims import claims_tables
from ddray.data import open_dataset
from ddray.errors import InputError
from ddray.runs.ledger import Row, Unit
from ddray.tables.claims import Claim, Verdict, claims_table, holm, pairs_of, verdict_line, verdicts
from ddray.tables.graph import build_graph
from ddray.tables.spec import Limits, read_spec
from ddray.tables.units import Cell
from tests.report.pages import Tables
from tests.tables.benches import TINY, run, spec, table_cell

CLAIM = Claim(say="DM beats random images", better="dm", worse=("random",))


def scored(method: str, accuracies: list[list[float] | None], **changes: Any) -> tuple[Cell, dict[str, Row]]:
    """Return a cell and its rows by key: each set's networks; None for a set that failed."""
    rows = {}
    for seed, values in enumerate(accuracies):
        unit = Unit(kind="evaluate", spec={"method": method, "seed": seed, **changes})
        result = {} if values is None else {"per_seed": values}
        status = "failed" if values is None else "done"
        rows[unit.key] = Row(
            key=unit.key, kind="evaluate", spec=unit.spec, status=status, result=result, wall_s=1800
        )
    return table_cell(method=method, keys=tuple(rows), **changes), rows


def decide(*cells: tuple[Cell, dict[str, Row]], claims: tuple[Claim, ...] = (CLAIM,)) -> list[Verdict]:
    rows = {key: row for _, each in cells for key, row in each.items()}
    return verdicts(claims, [cell for cell, _ in cells], rows.get)


DM = [[0.30, 0.32], [0.33, 0.31], [0.29, 0.31], [0.35, 0.33]]
RANDOM = [[0.14, 0.16], [0.15, 0.15], [0.16, 0.14], [0.17, 0.16]]


def test_it_is_a_paired_t_test_over_sets() -> None:
    (verdict,) = decide(scored("dm", DM), scored("random", RANDOM))
    ours, theirs = ([statistics.fmean(values) for values in each] for each in (DM, RANDOM))
    test = ttest_rel(ours, theirs)
    assert verdict.p == pytest.approx(test.pvalue, rel=1e-12)
    assert verdict.ci95 == pytest.approx(tuple(test.confidence_interval(0.95)), rel=1e-12)
    assert verdict.effect == pytest.approx(statistics.fmean(ours) - statistics.fmean(theirs), rel=1e-12)
    assert (verdict.verdict, verdict.n, verdict.networks) == ("holds", 4, 2)
    assert verdict.accuracy == pytest.approx((statistics.fmean(ours), statistics.fmean(theirs)))
    assert verdict.device_hours == pytest.approx(8 * 0.5)


def test_a_claim_fails_where_the_opposite_is_shown() -> None:
    (verdict,) = decide(
        scored("dm", DM), scored("random", RANDOM), claims=(Claim(say="", better="random", worse="dm"),)
    )
    assert verdict.verdict == "fails"
    assert verdict.effect is not None
    assert verdict.effect < 0


def test_a_small_effect_stays_undecided() -> None:
    near = [[value + 0.001 * (-1) ** seed for value in values] for seed, values in enumerate(DM)]
    (verdict,) = decide(scored("dm", near), scored("random", DM))
    assert verdict.verdict == "undecided"
    assert verdict.p is not None
    assert verdict.p > 0.05


def test_networks_of_one_set_are_one_value() -> None:
    """Nine networks on one set say nothing about other sets."""
    (verdict,) = decide(scored("dm", [[0.9] * 9]), scored("random", [[0.1] * 9]))
    assert (verdict.verdict, verdict.n, verdict.p, verdict.ci95) == ("undecided", 1, None, None)
    assert verdict.effect == pytest.approx(0.8)


def test_equal_differences_allow_no_test() -> None:
    (verdict,) = decide(scored("dm", [[0.5], [0.75]]), scored("random", [[0.25], [0.5]]))
    assert (verdict.verdict, verdict.p, verdict.ci95) == ("undecided", None, (0.25, 0.25))


def test_a_set_that_failed_goes_with_its_pair() -> None:
    (verdict,) = decide(scored("dm", [None, *DM[1:]]), scored("random", RANDOM))
    assert verdict.n == 3
    (nothing,) = decide(scored("dm", [None]), scored("random", [[0.1]]))
    assert (nothing.verdict, nothing.n, nothing.effect) == ("undecided", 0, None)
    assert nothing.accuracy == (None, None)
    assert verdict_line(nothing)["effect"] == "-"


def test_holms_method() -> None:
    """The example of R's p.adjust(c(.01, .02, .03, .04), "holm"), with one that can't be tested."""
    assert holm([0.01, None, 0.04, 0.03, 0.02]) == [
        pytest.approx(0.04),
        None,
        pytest.approx(0.06),
        pytest.approx(0.06),
        pytest.approx(0.06),
    ]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_p_is_adjusted_over_all_comparisons_of_the_file() -> None:
    three = tuple(CLAIM.model_copy(update={"say": str(number)}) for number in range(3))
    (alone,) = decide(scored("dm", DM), scored("random", RANDOM))
    for verdict in decide(scored("dm", DM), scored("random", RANDOM), claims=three):
        assert verdict.p_unadjusted == alone.p
        assert verdict.p == pytest.approx(3 * (alone.p or 0))


def test_each_worse_row_is_a_comparison() -> None:
    claim = Claim(say="DM is best", better="dm", worse=("random", "herding"))
    cells = (scored("dm", DM), scored("random", RANDOM), scored("herding", DM[::-1]))
    assert [(one.worse, one.verdict) for one in decide(*cells, claims=(claim,))] == [
        ("random", "holds"),
        ("herding", "undecided"),
    ]


def test_an_uncut_budget_has_the_presets_steps() -> None:
    unit = Unit(kind="distill", spec={"method": "dm"})
    row = Row(key=unit.key, kind="distill", spec=unit.spec, status="done", result={"steps": 2000}, wall_s=1)
    cell, rows = scored("dm", DM)
    dm = (cell.model_copy(update={"sets": (unit.key,)}), rows | {unit.key: row})
    cut = scored("random", RANDOM)[0].model_copy(update={"cut": "epochs 1 of 300"})
    (verdict,) = decide(dm, (cut, scored("random", RANDOM)[1]))
    assert verdict.budget == {"dm": "preset, 2,000 steps", "random": "epochs 1 of 300"}
    assert verdict_line(verdict)["budget"] == "dm: preset, 2,000 steps; random: epochs 1 of 300"


def test_what_all_lines_share_is_said_once() -> None:
    claim = CLAIM.model_copy(update={"worse": ("random", "herding")})
    several = decide(scored("dm", DM), scored("random", RANDOM), scored("herding", DM[::-1]), claims=(claim,))
    shared, lines = claims_table(several)
    assert shared == "All on cifar10, ipc 1, hard, convnet3, n 4 x 2."
    assert [line["rows"] for line in lines] == ["dm over random", "dm over herding"]
    assert not {"on", "n"} & lines[0].keys()
    assert claims_table(several[:1]) == ("", [verdict_line(several[0])])


class TestCells:
    """A claim names the cells that it compares."""

    CELLS = (
        table_cell(method="dm", size=("ipc", 1)),
        table_cell(method="random", size=("ipc", 1)),
        table_cell(method="dm", size=("ipc", 10), arch="resnet18"),
        table_cell(method="random", size=("ipc", 10), arch="resnet18"),
        table_cell(method="dm", size=("ipc", 10), arch="convnet3"),
    )

    @pytest.mark.parametrize("names", [{"ipc": 10}, {"arch": "resnet18"}, {"ipc": 10, "dataset": "cifar10"}])
    def test_by_what_the_table_has_several_of(self, names: dict[str, Any]) -> None:
        ((_, pair),) = pairs_of([CLAIM.model_copy(update=names)], self.CELLS)
        assert pair == (self.CELLS[2], self.CELLS[3])

    @pytest.mark.parametrize("names", [{}, {"ipc": 50}, {"budget": 10}, {"target": "mnist"}])
    def test_none_or_several_are_refused(self, names: dict[str, Any]) -> None:
        with pytest.raises(InputError, match=r"exactly one cell .* must fit, got [02]; .*ipc: 10, target"):
            pairs_of([CLAIM.model_copy(update=names)], self.CELLS)

    def test_a_row_that_is_not_there_is_refused(self) -> None:
        with pytest.raises(InputError, match=r"got 'randon'; did you mean 'random'\?; there are dm, random"):
            pairs_of([Claim(say="", better="dm", worse="randon")], self.CELLS)


SAID = {"say": "DM beats random images", "better": "dm", "worse": "random", "arch": "convnet1_w8"}
ROWS: dict[str, Any] = {"claims": [SAID]}


def test_the_run_writes_its_verdicts_and_answers_other_claims_later(tmp_path: Path) -> None:
    first = run(tmp_path / "run", spec(**ROWS))
    (verdict,) = first["claims"]
    stored = json.loads((tmp_path / "run" / "claims.json").read_text())
    assert stored["claims"] == first["claims"]
    assert "paired t-test over sets" in stored["test"]
    assert (verdict["n"], verdict["networks"]) == (2, 2)
    assert verdict["budget"]["dm"].startswith("steps 2 of ")
    assert verdict["budget"]["random"].startswith("epochs 1 of ")
    by_method = {cell["method"]: cell for cell in first["cells"] if cell["arch"] == "convnet1_w8"}
    gain = by_method["dm"]["accuracy_mean"] - by_method["random"]["accuracy_mean"]
    assert verdict["effect"] == pytest.approx(gain)
    assert "claims" not in (tmp_path / "run" / "config.yaml").read_text()

    events = (tmp_path / "run" / "events.jsonl").read_bytes()
    other = {"claims": [{**SAID, "better": "random", "worse": "dm"}]}
    again = run(tmp_path / "run", spec(**other), resume=True)
    assert again["claims"][0]["effect"] == pytest.approx(-gain)
    assert (tmp_path / "run" / "events.jsonl").read_bytes() == events
    assert "claims" not in run(tmp_path / "run", resume=True)
    assert not (tmp_path / "run" / "claims.json").exists(), "its claims are no longer asked"


def test_the_command_shows_them_in_terminal_and_page(tmp_path: Path) -> None:
    result = api.claims({**TINY, **ROWS}, executor="local", run_dir=tmp_path / "run")
    table = claims_tables(result)[0]
    assert [column.header for column in table.columns][:3] == ["claim", "rows", "verdict"]
    page = Tables()
    page.feed(Path(result.report).read_text(encoding="utf-8"))
    head, line = page.tables[0]
    assert head[:4] == ["claim", "verdict", "effect", "p"]
    assert line[:2] == ["DM beats random images", result.claims[0].verdict]
    assert "dm over random" in line


def test_a_file_without_claims_or_with_a_wrong_one_is_refused_before_it_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must have claims"):
        api.claims(TINY, executor="local", run_dir=tmp_path / "run")
    wrong = {**SAID, "worse": "herding"}
    with pytest.raises(InputError, match="got 'herding'; there are random, dm"):
        api.claims({**TINY, "claims": [wrong]}, executor="local", run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


FILES = sorted((Path(__file__).resolve().parents[2] / "configs" / "claims").glob("*.yaml"))


@pytest.mark.skipif(not FILES, reason="the wheel ships them")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_claims_of_a_shipped_file_fit_its_rows(file: Path) -> None:
    shipped = read_spec(file, "smoke").model_copy(update={"limits": Limits()})  # on digits, in all its sizes
    pairs = pairs_of(shipped.claims, build_graph(shipped, open_dataset).cells)
    assert len(pairs) >= len(shipped.claims) >= 4
    assert len({(claim.say, worse.method) for claim, (_, worse) in pairs}) == len(pairs)
    assert all(claim.where for claim in shipped.claims if claim.paper)
    assert file.read_text(encoding="utf-8").startswith(f"# ddray claims configs/claims/{file.name}\n")
