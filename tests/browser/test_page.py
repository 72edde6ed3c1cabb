"""The report in a real headless browser (Debian's chromium through its driver): `make browser`."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ddray.ranking.report import write_nas_report
from ddray.report.page import write_page
from ddray.runs.executor import LocalExecutor
from ddray.tables.options import BenchOptions
from ddray.tables.run import prepare, run_bench
from ddray.tables.spec import BenchSpec
from tests.ranking.test_nas_page import figures, result
from tests.ranking.test_nas_page import lines as architectures
from tests.report.pages import ENVIRONMENT, trial_row, write_search

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is in the browser extra")

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="needs chromium and chromedriver"),
]

SPEC = {
    "name": "browser",
    "dataset": "digits",
    "methods": [
        "random",
        "class_mean",
        {"name": "dm", "label": "dm, 20 steps of four images", "steps": 20, "set": {"method.batch_real": 4}},
        {"name": "dm", "label": "wild", "steps": 2, "set": {"method.lr_img": 1e30}},
    ],
    "ipc": [1, 10],
    "set": {"arch": "convnet1_w8", "compile": "off"},
    "evaluate": {"archs": ["convnet1_w8", "convnet1_w8_bn"], "epochs": 2, "seeds": 2},
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of a bench, with all its sections, of a search and of a sweep."""
    folder = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDRAY_HOME", str(folder / "home"))
        plan = prepare(BenchSpec.parse(SPEC), BenchOptions(executor="local"))
        run_bench(plan, LocalExecutor(), run_dir=folder / "run")
        write_page([folder / "run"], folder / "page.html")
    for name in ("tune", "nas"):
        (folder / name).mkdir()
    shutil.copy(next((folder / "run" / "artifacts").glob("*.pt")), folder / "tune" / "distilled.pt")
    failed = {"status": "failed", "error": "the loss must stay finite, got nan", "result": {"number": 2}}
    trials = [trial_row(trial_id, **(failed if trial_id == 2 else {})) for trial_id in range(8)]
    write_search(folder / "tune", trials)
    (folder / "nas" / "config.yaml").write_text("command: nas\n")
    (folder / "nas" / "environment.json").write_text(json.dumps(ENVIRONMENT))
    proxy = figures("a proxy of some name", top1_test_accuracy=0.7)
    write_nas_report(folder / "nas", result(proxy), architectures("a proxy of some name"))
    return {
        "bench": folder / "page.html",
        "tune": folder / "tune" / "report.html",
        "nas": folder / "nas" / "report.html",
    }


@pytest.fixture(scope="module")
def page(pages: dict[str, Path]) -> Path:
    return pages["bench"]


Open = Callable[..., Any]


@pytest.fixture(scope="module")
def browser() -> Iterator[Open]:
    """Open a page at some width and colour scheme; one browser per page."""
    opened = []

    def start(page: Path, *, width: int = 1200, dark: bool = False) -> Any:
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for argument in (
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
            "--host-resolver-rules=MAP * ~NOTFOUND",  # any network request fails
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
        opened.append(driver)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        driver.get(page.as_uri())
        return driver

    yield start
    for driver in opened:
        driver.quit()


@pytest.fixture(scope="module")
def desktop(browser: Open, page: Path) -> Any:
    return browser(page)


def test_it_loads_without_errors_and_draws_every_plot(desktop: Any) -> None:
    errors = [entry for entry in desktop.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert errors == []
    plots = desktop.find_elements("css selector", ".js-plotly-plot")
    assert len(plots) >= 2 + 2 + 2
    empty = (
        "return [...document.querySelectorAll('.js-plotly-plot')].filter(p => !p.querySelector('.main-svg'))"
    )
    assert desktop.execute_script(empty) == []
    spilled = (
        "const width = p => p.querySelector('.main-svg').getBoundingClientRect().width;"
        "return [...document.querySelectorAll('.js-plotly-plot')]"
        ".filter(p => width(p) > p.parentElement.clientWidth + 1).length"
    )
    assert desktop.execute_script(spilled) == 0, "a plot is wider than its container"
    broken = "return [...document.images].filter(i => !i.complete || i.naturalWidth === 0).length"
    assert desktop.execute_script(broken) == 0
    assert desktop.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_a_click_on_a_head_sorts_by_number_and_again_reverses(desktop: Any) -> None:
    head = next(
        head
        for head in desktop.find_elements("css selector", "table.sortable th")
        if head.text.startswith("accuracy")
    )

    def column() -> list[float]:
        script = (
            "const h = arguments[0], t = h.closest('table');"
            "return [...t.tBodies[0].rows].map(r => Number(r.cells[h.cellIndex].dataset.value))"
        )
        return list(desktop.execute_script(script, head))

    before = column()
    desktop.execute_script("arguments[0].scrollIntoView({block: 'center'})", head)
    head.click()
    assert head.get_attribute("aria-sort") == "descending"
    assert column() == sorted(before, reverse=True)
    head.click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert column() == sorted(before)


def test_a_plot_answers_a_hover(desktop: Any) -> None:
    plot = desktop.find_elements("css selector", ".js-plotly-plot")[0]
    desktop.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    bar = plot.find_element("css selector", ".bars .point path")
    webdriver.ActionChains(desktop).move_to_element(bar).perform()
    end = time.monotonic() + 10
    while not plot.find_elements("css selector", ".hoverlayer .hovertext"):
        assert time.monotonic() < end, "no hover text was seen"
        time.sleep(0.1)
    assert "%" in plot.find_element("css selector", ".hoverlayer .hovertext").text


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["bench", "tune", "nas"])
def test_it_fits_a_phone_and_a_desk_with_the_accuracy_on_the_first_screen(
    browser: Open, pages: dict[str, Path], name: str, width: int
) -> None:
    driver = browser(pages[name], width=width, dark=name == "tune")
    wide = driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0, f"the page is {wide} px wider than the screen"
    spilled = driver.execute_script(
        """
        const kinds = "h1, h2, h3, p, li, .card, figure, img, .js-plotly-plot";
        const spills = e => e.getBoundingClientRect().right > window.innerWidth;
        return [...document.body.querySelectorAll(kinds)]
          .filter(e => spills(e) && !e.closest(".wide, nav, pre, .set")).map(e => e.outerHTML.slice(0, 80));
        """
    )
    assert spilled == []
    text, right, bottom = driver.execute_script(
        """
        const seen = document.querySelector(arguments[0]), box = seen.getBoundingClientRect();
        return [seen.textContent, box.right, box.bottom];
        """,
        {"bench": "table td.num", "tune": ".card b", "nas": "td:nth-child(2)"}[name],
    )
    assert any(character.isdigit() for character in text)
    assert right <= width
    assert bottom <= 900, f"{text} stands {bottom} px below the top"


def test_the_method_stays_in_view_while_a_table_is_scrolled(browser: Open, page: Path) -> None:
    driver = browser(page, width=400)
    before, after = driver.execute_script(
        """
        const box = [...document.querySelectorAll(".wide")].find(e => e.scrollWidth > e.clientWidth + 100);
        const cell = box.querySelector("tbody td"), left = () => cell.getBoundingClientRect().left;
        const first = left(); box.scrollLeft = 100; return [first, left()];
        """
    )
    assert after == before


def test_rows_are_filtered_by_words_and_the_table_is_a_csv(desktop: Any) -> None:
    field = desktop.find_element("css selector", "input[data-filter='#board-hard']")
    rows = "return [...document.querySelectorAll('#board-hard table')].at(-1).tBodies[0].rows"
    figures = desktop.execute_script(
        f"""
        const isOther = row => row.innerText.includes("random") && !row.innerText.includes("ipc 10");
        const small = [...({rows[7:]})].find(isOther);
        const cell = small.querySelector("td.num"), before = cell.textContent;
        cell.textContent = "10.4 \u00b1 1.0"; return [cell, before];
        """
    )
    field.send_keys("random ipc 10")
    visible = desktop.execute_script(f"return [...({rows[7:]})].filter(r => !r.hidden).map(r => r.innerText)")
    assert visible
    assert all("random" in text and "ipc 10" in text for text in visible)
    desktop.execute_script("arguments[0].textContent = arguments[1]", *figures)
    field.clear()
    field.send_keys(" ")
    link = desktop.find_element("css selector", "#board-hard a[download]")
    lines = desktop.execute_async_script(
        "const done = arguments[1]; fetch(arguments[0]).then(r => r.text()).then(done)",
        link.get_attribute("href"),
    ).splitlines()
    assert lines[0].startswith("method,dataset")
    assert len(lines) - 1 == desktop.execute_script(f"return ({rows[7:]}).length")


def test_the_menu_of_a_plane_changes_its_method(desktop: Any) -> None:
    visible = """
        const plot = document.querySelector("#plane ~ .js-plotly-plot, #plane ~ div .js-plotly-plot");
        return [...plot.data].filter(t => t.marker.symbol === "star" && t.visible).map(t => t.name);
        """
    change = """
        const plot = document.querySelector("#plane ~ .js-plotly-plot, #plane ~ div .js-plotly-plot");
        const button = plot.layout.updatemenus[0].buttons[1];
        return Plotly[button.method](plot, ...button.args).then(() => button.label);
        """
    before = desktop.execute_script(visible)
    label = desktop.execute_script(change)
    assert len(before) == 1
    assert before != [label]
    assert desktop.execute_script(visible) == [label]


@pytest.mark.parametrize("dark", [False, True])
def test_text_can_be_read_in_light_and_dark(browser: Open, page: Path, dark: bool) -> None:
    driver = browser(page, dark=dark)
    pairs = driver.execute_script(
        """
        const kinds = 'p, td, h2, summary, pre, .xtick text, .legendtext, .colorbar text, .bartext';
        const seen = [...document.querySelectorAll(kinds)];
        const ground = e => { for (; e; e = e.parentElement) {
          const c = getComputedStyle(e).backgroundColor; if (!/, 0\\)$|transparent/.test(c)) return c; }
          return getComputedStyle(document.body).backgroundColor; };
        return seen.filter(e => e.textContent.trim()).map(e => {
          const s = getComputedStyle(e); return [e instanceof SVGElement ? s.fill : s.color, ground(e)]; });
        """
    )
    assert len(pairs) > 50
    colours = {tuple(pair) for pair in pairs}
    for ink, ground in colours:
        assert contrast(ink, ground) >= 4.5, f"{ink} on {ground}"
    body = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(body) < 0.2) == dark


def luminance(colour: str) -> float:
    """Return the WCAG relative luminance of `rgb(r, g, b)`."""
    values = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    """Return the WCAG contrast of two colours."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
