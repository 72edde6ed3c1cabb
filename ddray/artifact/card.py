"""The dataset card of an exported set: a README.md with the metadata that the Hugging Face Hub reads."""

from pathlib import Path
from typing import Any, Final

from ddray.artifact.distilled_set import DistilledSet, Meta
from ddray.config import yaml_of
from ddray.data.reference import DatasetRef

_SIZES: Final = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"))
_LARGEST: Final = "100K<n<1M"
_FROM_PICTURES: Final = {
    "raw": "pixels = pictures / 255  # [N, C, H, W], as networks are trained on them",
    "normalized": """mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ({mean}, {std}))
pixels = (pictures / 255 - mean) / std  # [N, C, H, W], as networks are trained on them""",
    "zca": """from safetensors.torch import load_file

# mean [D] and matrix [D, D], D = C * H * W, fitted on the real images that were distilled
whitening = load_file("{whitening}")


def whiten(pictures):
    \"\"\"Return [N, C, H, W] as networks are trained on them.\"\"\"
    flat = (pictures / 255).flatten(1) - whitening["mean"]
    return (flat @ whitening["matrix"]).view(pictures.shape)


pixels = whiten(pictures)""",
}
_OF_FOLDER: Final = """import torch
from torchvision.datasets import ImageFolder
from torchvision.transforms import PILToTensor

folder = ImageFolder("{out}", transform=PILToTensor(), allow_empty=True)
pictures = torch.stack([picture for picture, _ in folder]){grey}.float()  # 0..255
labels = torch.tensor(folder.targets)
"""
PARQUET: Final = ".parquet"
_OF_PARQUET: Final = """import pyarrow.parquet as pq
import torch

table = pq.read_table("{out}")
pixels = torch.tensor(table["tensor"].to_pylist())  # [N, C, H, W], exact, as networks are trained on them
{column}s = torch.tensor(table["{column}"].to_pylist())
"""
_LAYOUT: Final = """---
{front}---

# {name}

{num_images:,} images that ddray's method `{method}` distilled from {dataset}: networks trained on them stand
in for networks trained on all of it.

{facts}

## Read it

```python
{reading}```

Networks are trained and tested on images in the pixel space {space}; `pictures` [N, C, H, W] are 0..255:

```python
{encoding}
```

## Score it

```console
$ ddray evaluate {out}
```

## How it was made

```yaml
{config}```
"""


def is_parquet_name(path: Path) -> bool:
    """Return whether a path is named as a parquet file, in whatever case."""
    return path.suffix.lower() == PARQUET


def card(distilled: DistilledSet, out: Path, num_images: int, whitening: Path) -> str:
    """Return the README.md of a set's `num_images` images in a folder or parquet file `out`.

    `whitening` is where a whitened set's whitening is.
    """
    meta, is_table = distilled.meta, is_parquet_name(out)
    name = f"{meta.method} on {_dataset(meta)}, {_size(meta)}"
    front: dict[str, Any] = {
        "pretty_name": name,
        "task_categories": ["image-classification"],
        "size_categories": [next((label for most, label in _SIZES if num_images < most), _LARGEST)],
        "tags": ["dataset-distillation", "ddray", meta.method],
        "configs": [{"config_name": "default", "data_files": out.name if is_table else "*/*.png"}],
    }
    return _LAYOUT.format(
        front=yaml_of(front),
        name=name,
        num_images=num_images,
        method=meta.method,
        dataset=_dataset(meta),
        facts=_facts(distilled, num_images, is_table),
        reading=(_OF_PARQUET if is_table else _OF_FOLDER).format(
            out=out.name,
            column="label" if distilled.targets is None else "target",
            grey="[:, :1]" if meta.image_shape[0] == 1 else "",
        ),
        space=meta.pixel_space,
        encoding=_FROM_PICTURES[meta.pixel_space].format(
            mean=meta.mean, std=meta.std, whitening=whitening.relative_to(out.parent)
        ),
        out=out.name,
        config=yaml_of(meta.config),
    )


def _dataset(meta: Meta) -> str:
    """Return the dataset's name, without the folders that it lies in on the machine of the export."""
    return Path(DatasetRef.parse(meta.dataset).base).name


def _size(meta: Meta) -> str:
    if meta.budget is not None:
        return f"a storage of {meta.budget} images"
    return f"{meta.ipc} image{'s' if meta.ipc > 1 else ''} per class"


def _facts(distilled: DistilledSet, num_images: int, is_table: bool) -> str:
    """Return a table of what the set is."""
    meta = distilled.meta
    soft = meta.label_kind or "probabilities"
    rows = {
        "method": meta.method,
        "distilled from": f"{_dataset(meta)}, {meta.split or 'train'} (sha256 {meta.fingerprint[:12]}...)",
        "size": f"{_size(meta)}, {num_images:,} images of {' x '.join(map(str, meta.image_shape))}",
        "stored values": f"{meta.storage_floats:,}",
        "classes": f"{len(meta.class_names)}: {', '.join(meta.class_names[:20])}"
        + (", ..." if len(meta.class_names) > 20 else ""),
        "soft labels": f"{soft}, in the column soft_label"
        if is_table and distilled.soft_labels is not None
        else "",
        "pixel space": meta.pixel_space,
        "network": meta.arch,
        "learned rate": meta.learned_lr,
        "versions": ", ".join(f"{name} {version}" for name, version in sorted(meta.versions.items())),
    }
    texts = {name: " ".join(str(value).split()).replace("|", "/") for name, value in rows.items() if value}
    texts |= {} if meta.seed is None else {"seed": str(meta.seed)}
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in texts.items())])
