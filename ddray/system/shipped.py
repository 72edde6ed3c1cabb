"""The YAML files that ship with ddray: beside the package in a checkout, inside it in a wheel."""

from pathlib import Path


def shipped(*parts: str) -> Path:
    """Return the path of a shipped file or folder, as `shipped("configs", "datadam")`; it may not exist."""
    package = Path(__file__).resolve().parents[1]
    bundled = package / "_shipped"
    return (bundled if bundled.is_dir() else package.parent).joinpath(*parts)
