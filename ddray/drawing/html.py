"""HTML pages: one self-contained file each, from a template, that needs no network."""

import json
from pathlib import Path
from typing import Any

from ddray.drawing.text import percent
from ddray.system.files import write_text


def write_html(path: Path, template: str, **values: Any) -> None:
    """Write a page.

    Args:
        path: the file.
        template: the name of a file in `templates/`.
        values: what the template shows.

    Raises:
        StorageError: the page can't be written.
    """
    from jinja2 import Environment, PackageLoader, select_autoescape
    from plotly.offline import get_plotlyjs

    loader = Environment(loader=PackageLoader("ddray.drawing"), autoescape=select_autoescape())
    loader.filters["percent"] = percent
    write_text(path, loader.get_template(template).render(**values, plotly=get_plotlyjs()))


def write_run_page(run_dir: Path, template: str, **values: Any) -> None:
    """Write `<run>/report.html`; it also shows the run's config.yaml and environment.json.

    Raises:
        StorageError: the page can't be written.
    """
    config = (run_dir / "config.yaml").read_text(encoding="utf-8")
    environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    write_html(run_dir / "report.html", template, config=config, environment=environment, **values)
