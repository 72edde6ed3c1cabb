"""Options of `ddray distill`, which `ddray tune` shares, and of `ddray pool train`."""

from pydantic import Field

from ddray.config import AbsolutePath, Names, named
from ddray.system.options import DataOptions, DeviceOptions, NumericOptions, RunOptions


class PlanOptions(DataOptions, NumericOptions):
    """What is distilled, and with which settings."""

    method: str
    """Method or baseline, such as datadam, dm, random."""
    dataset: str = "digits"
    """Dataset name, or a folder (see `ddray data list`)."""
    ipc: int | None = None
    """Images per class (self-supervised methods: --budget)."""
    budget: int | None = None
    """Images of storage, for self-supervised methods."""
    preset: str = "paper"
    """paper: as printed; repo: as in the authors' code."""
    config: AbsolutePath | None = None
    """YAML that overrides preset and shipped config."""
    sets: Names = named("set", "sets")
    """key=value, such as method.lr_img=0.5; repeatable."""
    steps: int | None = None
    """Steps of a run (in a search: of a full trial); 0 writes the initial images. With --resume, a larger
    number extends a run."""
    seed: int = 0
    """Every draw is derived from it."""


class DistillOptions(RunOptions, DeviceOptions):
    """How and where a distillation is run."""

    out: AbsolutePath | None = None
    """Artifact; default <run dir>/distilled.pt."""
    val_seed: int | None = None
    """Leave out the val tenth that tune and nas with this seed score on."""
    val_images: int | None = Field(default=None, ge=1)
    """Leave out this many images instead: those that nas with this seed and --val-images ranks by."""


class PoolOptions(DataOptions, DeviceOptions):
    """What a pool is to hold."""

    kind: str
    """supervised: networks trained on labels; ssl: the self-supervised methods' teacher; diffusion: D3HR's
    generator."""
    dataset: str = "digits"
    """Dataset name, or a folder (see `ddray data list`)."""
    arch: str | None = None
    """supervised: default auto, the field's ConvNet; ssl: default resnet18."""
    num_models: int | None = None
    """supervised: networks, on seeds that count up; default 1."""
    epochs: int | None = None
    """Epochs of training; supervised: default 20."""
    sets: Names = named("set", "sets")
    """key=value of the recipe, such as batch=64; repeatable."""
    seed: int | None = None
    """supervised: the first network's, ssl: the teacher's; default 0."""
    out: AbsolutePath | None = None
    """Pool folder, default $DDRAY_HOME/pool; diffusion: DiTPipeline folder."""
