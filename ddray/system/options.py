"""Options that several commands share; a field's docstring is its help."""

from ddray.config import AbsolutePath, Config


class DataFolder(Config):
    """Where datasets are."""

    data_dir: AbsolutePath | None = None
    """Where datasets are; default $DDRAY_DATA."""


class DataOptions(DataFolder):
    """Where datasets come from."""

    download: bool = False
    """Let torchvision download what is missing."""


class RunOptions(Config):
    """The folder of a run."""

    run_dir: AbsolutePath | None = None
    """Folder of the run; default runs/<command>-<number>."""
    resume: bool = False
    """Continue the run in --run-dir."""


class DeviceOptions(Config):
    """Where to compute."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:<n>."""
