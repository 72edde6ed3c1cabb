"""Pictures that a finished distillation writes beside its artifact."""

from pathlib import Path

from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.drawing.images import bases_grid, png, save_grid
from ddray.drawing.tsne import save_tsne
from ddray.system.files import write_atomically


def save_pictures(distilled: DistilledSet, artifact: Path, *, representations: Tensor | None = None) -> None:
    """Write `<artifact>.png`; for self-supervised sets also `.bases.png` and `.tsne.png`.

    Args:
        distilled: the set.
        artifact: its file.
        representations: the teacher's representations of real images [N, D], if the set has targets.

    Raises:
        StorageError: a file can't be written.
    """
    save_grid(distilled, artifact.with_suffix(".png"))
    bases = distilled.compact.get("image_bases")
    if bases is not None:
        picture = png(bases_grid(bases))
        write_atomically(artifact.with_suffix(".bases.png"), lambda file: file.write(picture))
    if distilled.targets is not None and representations is not None:
        save_tsne(
            representations,
            distilled.targets,
            artifact.with_suffix(".tsne.png"),
            seed=distilled.meta.seed or 0,
        )
