"""A command starts fast: what is slow to import waits until it is needed."""

from __future__ import annotations

import subprocess
import sys


def test_help_needs_neither_torch_nor_ray() -> None:
    code = "import sys, ddray.cli; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
