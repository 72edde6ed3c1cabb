"""Options that several commands share; a field's docstring is its help."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from ddray.config import AbsolutePath, Config
from ddray.system.worker import device_kind

Precision = Literal["auto", "tf32", "fp32", "bf16"]
"""How convolutions and matrix products are computed (`system.numerics`)."""


class NumericOptions(Config):
    """How numbers are computed."""

    precision: Precision | None = None
    """tf32: float32, on GPUs with TF32 convolutions; fp32: float32 throughout; bf16: forward passes in
    bfloat16; auto: bf16 where a probe finds it faster; default tf32."""
    deterministic: bool | None = None
    """Only deterministic algorithms, so that a GPU gives the same bytes again (slower); default off."""

    def numerics(self) -> dict[str, Any]:
        """Return the options that are set."""
        return self.model_dump(include=set(NumericOptions.model_fields), exclude_none=True)


def _on_one_device(gpus: float) -> float:
    if gpus > 1:
        raise ValueError("must be <= 1, because all of it is computed on one GPU (fractions share one)")
    return gpus


Gpus = Annotated[float, Field(ge=0), AfterValidator(_on_one_device)]
"""GPUs of a worker."""


class DataFolder(Config):
    """Where datasets are."""

    data_dir: AbsolutePath | None = None
    """Where datasets are; default $DDRAY_DATA."""


class ContentOptions(Config):
    """How a dataset's files are read; a dataset's name carries what is set (`data.reference`)."""

    image_size: int | None = Field(default=None, ge=1)
    """Bring images to N x N pixels; default the catalog's size, or the folder's own."""
    label_column: str | None = Field(default=None, min_length=1)
    """Column with the classes in parquet shards, save_to_disk folders and CSV lists (in tars an ending or a
    JSON field); default label, fine_label, ..."""
    clip_seconds: float | None = Field(default=None, gt=0)
    """Seconds of a sound clip that are read; default 1."""
    clip_offset: float | None = Field(default=None, ge=0)
    """Seconds into a sound clip at which reading starts; default where it is loudest."""
    can_flip: bool | None = None
    """Whether mirrored images keep their class (augmentation); default the catalog's, for folders of images
    yes."""

    def content(self) -> dict[str, Any]:
        """Return the options of content that are set."""
        return self.model_dump(include=set(ContentOptions.model_fields), exclude_none=True)


class DataOptions(DataFolder, ContentOptions):
    """Where datasets come from, and how they are read."""

    download: bool = False
    """Let torchvision download what is missing."""

    def opening(self) -> dict[str, Any]:
        """Return what `open_dataset` takes besides the dataset."""
        return {"data_dir": self.data_dir, "download": self.download, **self.content()}


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


class GpuWorkers(Config):
    """What all options say of Ray workers that have a field `gpus_per_<worker>`."""

    @property
    def gpus(self) -> float:
        """GPUs of a worker; 0 until the default is resolved (`cluster.resources`)."""
        name = next(name for name in type(self).model_fields if name.startswith("gpus_per_"))
        return getattr(self, name) or 0.0

    @property
    def device(self) -> str:
        """The kind of device that workers compute on."""
        return device_kind(self.gpus)
