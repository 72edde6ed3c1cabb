"""`ddray doctor`: checks that everything a run needs is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ddray.commands import display
from ddray.commands.options import DataDir, Json, absolute, output
from ddray.errors import DdrayError


def doctor(
    address: Annotated[
        str | None, typer.Option("--address", help="Ray cluster to look at; default a local one.")
    ] = None,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Folder that all nodes must share.")] = Path(
        "runs"
    ),
    data_dir: DataDir = None,
    as_json: Json = False,
) -> None:
    """Check versions, devices, Ray, the data folder and a shared-storage write."""
    with output(as_json) as emit:
        from ddray.cluster.doctor import examine

        result = examine(address=address, run_dir=Path(os.path.abspath(run_dir)), data_dir=absolute(data_dir))
        emit(
            result,
            display.table_of(
                "doctor", {c["check"]: f"{c['status']}: {c['detail']}" for c in result["checks"]}
            ),
        )
        if not result["ok"]:
            failed = [c["check"] for c in result["checks"] if c["status"] == "failed"]
            raise DdrayError(f"failed checks: {', '.join(failed)}; see above")
