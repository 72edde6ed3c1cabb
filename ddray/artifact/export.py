"""Distilled sets for other tools: a folder of pictures by class, a parquet file, DD-Ranking's tensors."""

import io
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ddray.artifact.card import PARQUET, card, is_parquet_name
from ddray.artifact.distilled_set import ZCA, DistilledSet
from ddray.errors import InputError, unknown
from ddray.system.files import write_atomically, write_folder, write_text

log = logging.getLogger(__name__)

META: Final = "meta.json"
CARD: Final = "README.md"
_WHITENING: Final = "whitening"
_MOST_IN_LISTS: Final = 2**28  # values of a part of a column: offsets of lists are of 32 bits
_ARCHIVES: Final = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z")
_LONGEST: Final = 60  # characters of a class's name in a folder's: at most 240 bytes


def export_set(distilled: DistilledSet, out: Path, form: str | None = None) -> Path | None:
    """Write a set in a form of `FORMS` (default parquet if `out` ends in .parquet, else folder).

    Return its dataset card; None for a form without one.

    Raises:
        InputError: the form is unknown or does not fit the name, `out` exists, or the set has no pictures.
        StorageError: it can't be written.
    """
    if form not in (None, *FORMS):
        raise unknown("form", str(form), FORMS)
    is_parquet = is_parquet_name(out)
    form = form or ("parquet" if is_parquet else "folder")
    if form == "parquet" and not is_parquet:
        raise InputError(f"a parquet file's name must end in {PARQUET}, got {out.name}")
    if form != "parquet" and (is_parquet or out.suffix.lower() in _ARCHIVES):
        raise InputError(
            f"the form {form} is a folder, whose name must not end as a file's, got {out.name}; use "
            f"{out.name.partition('.')[0]} (and pack that folder then)"
        )
    return FORMS[form](distilled, out)


def whitening_file(out: Path) -> Path:
    """Return the file with the whitening of a set that was exported to a folder or parquet file."""
    if is_parquet_name(out):
        return out.with_name(f"{_WHITENING}-{out.stem}.safetensors")
    return out / f"{_WHITENING}.safetensors"


def _write_whitening(distilled: DistilledSet, path: Path) -> None:
    """Write the whitening of a whitened set as float32 `mean` [D] and `matrix` [D, D]."""
    from safetensors.torch import save

    if distilled.zca:
        tensors = {name.removeprefix("zca_"): distilled.zca[name].contiguous() for name in ZCA}
        write_atomically(path, lambda file: file.write(save(tensors)))


def pictures(distilled: DistilledSet) -> Tensor:
    """Return the set as 8-bit pictures, uint8 [N, C, H, W].

    De-normalised and de-whitened pixels outside [0, 1] are clamped, with a warning.

    Raises:
        InputError: the set holds spectrograms.
    """
    if min(distilled.meta.mean) < 0:  # no picture's mean is below 0
        raise InputError(f"only images give pictures, {distilled.meta.dataset} has log-spectrograms")
    pixels = distilled.space().decode(distilled.decode().images)
    outside = float(((pixels < -1 / 510) | (pixels > 1 + 1 / 510)).float().mean())
    if outside > 0:
        log.warning(
            "%.1f%% of the pixels lie outside [0, 1] and are clamped in pictures; the parquet file's column "
            "tensor has the exact values",
            100 * outside,
        )
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8)


def export_folder(distilled: DistilledSet, folder: Path) -> Path:
    """Write `<folder>/<label>_<class>/<number>.png`, `meta.json` and a card; return the card, README.md.

    `ddray evaluate`, `nas` and `--dataset` read it. With a whitened set goes its `whitening.safetensors`.
    Images of a self-supervised set have no labels and go to `<folder>/unlabelled`. The folder gets its name
    only once it is complete.

    Raises:
        InputError: the folder exists, or the set holds spectrograms.
        StorageError: it can't be written.
    """
    if folder.exists():
        raise InputError(f"the folder to export to must be new, {folder} exists; name another")
    if distilled.soft_labels is not None:
        log.warning("pictures have no soft labels: their classes alone are written to %s", folder)
    if distilled.meta.schedule is not None:
        log.warning("pictures have no order: %s holds no steps, which `--protocol steps` needs", folder)
    pixels = pictures(distilled)
    names = folder_names(distilled.meta.class_names)
    labels = distilled.decode().labels.tolist()
    folders = [names[label] for label in labels] if labels else ["unlabelled"] * len(pixels)

    def write(draft: Path) -> None:
        for name in names if labels else ():
            (draft / name).mkdir()  # also of a class without images: the labels stay
        for index, (picture, name) in enumerate(zip(pixels, folders, strict=True)):
            (draft / name).mkdir(exist_ok=True)
            (draft / name / f"{index:05d}.png").write_bytes(encode_picture(picture))
        text = json.dumps(distilled.meta.dump(), indent=2, sort_keys=True)
        (draft / META).write_text(text + "\n", encoding="utf-8")
        _write_whitening(distilled, whitening_file(draft))
        text = card(distilled, folder, len(pixels), whitening_file(folder))
        (draft / CARD).write_text(text, encoding="utf-8")

    write_folder(folder, write)
    return folder / CARD


def export_parquet(distilled: DistilledSet, path: Path) -> Path:
    """Write one row per image: image {bytes, path} as PNG, label (or target), and tensor, its exact values.

    `tensor` is float32 [C, H, W] in the set's pixel space, soft_label [K] as stored. The schema's metadata
    has the set's meta under `ddray`, and what Hugging Face's readers need. `ddray evaluate` and `nas` read
    the file as the set, `--dataset` a folder of such files named `train-*.parquet`. Beside it go a card,
    which is returned (README.md, or where there is one already README-<name>.md), and of a whitened set
    `whitening-<name>.safetensors`.

    Raises:
        InputError: the file exists, or the set holds spectrograms.
        StorageError: the file can't be written.
    """
    if path.exists():
        raise InputError(f"the file to export to must be new, {path} exists; name another")
    import pyarrow as pa
    import pyarrow.parquet as pq

    train = distilled.decode()
    encoded = [{"bytes": encode_picture(picture), "path": None} for picture in pictures(distilled)]
    image = pa.array(encoded, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    columns: dict[str, Any] = {"image": (image, {"_type": "Image"}), "tensor": _images_column(train.images)}
    if train.targets is None:
        feature = {"names": list(distilled.meta.class_names), "_type": "ClassLabel"}
        columns["label"] = pa.array(train.labels.tolist(), pa.int64()), feature
    else:
        columns["target"] = _column(train.targets)
    if (soft := _soft_labels(distilled, len(train.images))) is not None:
        columns["soft_label"] = _column(soft)
    features = {name: feature for name, (_, feature) in columns.items()}
    meta = {
        "huggingface": json.dumps({"info": {"features": features}}),
        "ddray": json.dumps(distilled.meta.dump(), sort_keys=True),
    }
    table = pa.table({name: values for name, (values, _) in columns.items()}, metadata=meta)
    _write_whitening(distilled, whitening_file(path))
    write_atomically(path, lambda file: pq.write_table(table, file))
    readme = path.with_name(CARD)
    readme = path.with_name(f"README-{path.stem}.md") if readme.exists() else readme
    write_text(readme, card(distilled, path, len(train.images), whitening_file(path)))
    return readme


def export_ddranking(distilled: DistilledSet, folder: Path) -> None:
    """Write what DD-Ranking reads: `<folder>/images.pt`, `labels.pt` and `lr.pt`, sorted by class.

    Images are as networks are trained on them, in the set's pixel space (its `use_zca` for a whitened set);
    labels are classes int64 [N], or logits [N, K] of soft ones; the rate is the learned one, or that of the
    set's own evaluation. It has no regression on values: their classes are written.

    Raises:
        InputError: the folder exists, or the set is self-supervised.
        StorageError: it can't be written.
    """
    if folder.exists():
        raise InputError(f"the folder to export to must be new, {folder} exists; name another")
    train = distilled.decode()
    if train.targets is not None:
        raise InputError("a set for DD-Ranking must have labels, this one has targets")
    kind, order = distilled.meta.label_kind, train.labels.argsort(stable=True)
    labels = train.labels
    soft = _soft_labels(distilled, len(labels))
    if soft is not None and kind != "values":
        labels = soft if kind == "logits" else soft.clamp_min(1e-30).log()
    elif kind == "values":
        log.warning("DD-Ranking has no regression: %s gets the classes of the set's values", folder)
    if distilled.meta.schedule is not None:
        log.warning("DD-Ranking has no steps: %s gets neither their order nor their rates", folder)
    tensors = {"images": train.images[order], "labels": labels[order]}
    lr = distilled.meta.config.get("evaluate", {}).get("lr")
    lr = distilled.meta.learned_lr if lr in (None, "learned") else lr
    if lr is not None:
        tensors["lr"] = torch.tensor(float(lr))

    def write(draft: Path) -> None:
        for name, tensor in tensors.items():
            torch.save(tensor.contiguous(), draft / f"{name}.pt")

    write_folder(folder, write)


def _soft_labels(distilled: DistilledSet, num: int) -> Tensor | None:
    """Return soft labels [num, K] of the decoded images, as stored, of `meta.label_kind`; None without."""
    soft = distilled.soft_labels
    return None if soft is None else soft.repeat_interleave(num // len(soft), 0)


def _column(values: Tensor) -> tuple[Any, dict[str, Any]]:
    """Return float32 [N, ...] as a column of fixed-size lists, and its Hugging Face feature."""
    import pyarrow as pa

    flat, length = pa.array(values.contiguous().flatten().numpy()), values[0].numel()
    feature = {"feature": {"dtype": "float32", "_type": "Value"}, "length": length, "_type": "Sequence"}
    return pa.FixedSizeListArray.from_arrays(flat, length), feature


def _images_column(images: Tensor) -> tuple[Any, dict[str, Any]]:
    """Return float32 [N, C, H, W] as a column of nested lists, and its Hugging Face feature, Array3D."""
    import pyarrow as pa

    def nested(part: Tensor) -> Any:
        column = pa.array(part.contiguous().flatten().numpy())
        for length in reversed(part.shape[1:]):
            offsets = pa.array(range(0, len(column) + 1, length), pa.int32())
            column = pa.ListArray.from_arrays(offsets, column)
        return column

    parts = torch.split(images, max(1, _MOST_IN_LISTS // images[0].numel()))
    feature = {"shape": list(images.shape[1:]), "dtype": "float32", "_type": "Array3D"}
    return pa.chunked_array([nested(part) for part in parts]), feature


def folder_names(classes: tuple[str, ...]) -> list[str]:
    """Return folder names that sort as the labels do; they keep the letters of every script."""
    width = len(str(len(classes) - 1))
    names = (re.sub(r"[\W_]+", "-", unicodedata.normalize("NFC", name)).strip("-") for name in classes)
    return [f"{label:0{width}d}_{name[:_LONGEST]}" for label, name in enumerate(names)]


def encode_picture(picture: Tensor, form: str = "PNG", **options: int) -> bytes:
    """Return uint8 or float [C, H, W] as the bytes of a file; InputError if it is neither grey nor RGB."""
    from torchvision.transforms.functional import to_pil_image

    if picture.shape[0] not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels, got {picture.shape[0]}")
    buffer = io.BytesIO()
    to_pil_image(picture).save(buffer, format=form, **options)
    return buffer.getvalue()


FORMS: Final[Mapping[str, Callable[[DistilledSet, Path], Path | None]]] = {
    "folder": export_folder,
    "parquet": export_parquet,
    "ddranking": export_ddranking,
}
"""Forms of export by name: functions of a set and where it goes."""
