"""`ddray doctor`: checks that everything a run needs is there."""

from pathlib import Path
from typing import Any

from ddray.commands import display
from ddray.commands.options import Emit, command
from ddray.config import AbsolutePath, Config
from ddray.errors import DdrayError


class DoctorOptions(Config):
    """What is checked."""

    address: str | None = None
    """Ray cluster to look at; default a local one."""
    run_dir: AbsolutePath = Path("runs")
    """Folder that all nodes must share."""
    data_dir: AbsolutePath | None = None
    """Where datasets are; default $DDRAY_DATA."""


@command(DoctorOptions, example="ddray doctor --run-dir /shared/runs")
def doctor(emit: Emit, **options: Any) -> None:
    """Check versions, devices, Ray, the data folder and a shared-storage write."""
    from ddray.cluster.doctor import examine

    parsed = DoctorOptions.pick(options)
    run_dir = parsed.run_dir.absolute()
    result = examine(address=parsed.address, run_dir=run_dir, data_dir=parsed.data_dir)
    lines = {check.check: f"{check.status}: {check.detail}" for check in result.checks}
    next_step = display.next_step("distill", "--method", "dm", "--dataset", "digits", "--ipc", 1)
    emit(result, lambda: [display.table_of("doctor", lines), *((next_step,) if result.ok else ())])
    if not result.ok:
        failed = [check.check for check in result.checks if check.status == "failed"]
        raise DdrayError(f"failed checks: {', '.join(failed)}; see above")
