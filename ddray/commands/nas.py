"""`ddray nas`: architectures ranked on distilled sets."""

from typing import Any

from ddray.commands import display
from ddray.commands.options import Emit, command, retyped
from ddray.ranking.options import NasModes, NasOptions, NasRequest
from ddray.system.options import DataFolder, RunOptions


@command(
    NasRequest,
    NasOptions,
    NasModes,
    RunOptions,
    example="ddray nas --proxy digits.pt --baseline random --sample 36",
)
def nas(emit: Emit, **options: Any) -> None:
    """Rank architectures on distilled sets, and compare with their ranking on the full set."""
    from ddray import api
    from ddray.ranking.command import check_described
    from ddray.ranking.spaces import described

    if "describe" in options:
        check_described(options)
        space = options.get("space", NasOptions().space)
        listed = described(options["describe"], space)
        emit(listed, lambda: display.archs_table(space, listed.archs))
        return
    result = api.nas(**options)
    emit(result, lambda: display.nas_tables(result, retyped(options, DataFolder)))
