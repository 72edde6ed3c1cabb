"""D3HR's stages up to the statistics, as pool entries: generator -> latents -> inverted -> statistics.

A spec contains the specs of its inputs, so an entry's key covers everything that determines it and nothing
that comes later: other candidates, score weights or ipc never repeat an inversion. The run's seed plays no
part. Latents and inversions are saved batch by batch until the entry is complete: a killed process loses at
most the batch it was working on.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ddray.data import Dataset, Split
from ddray.errors import InputError
from ddray.methods.families.diffusion.folder import PARTS, locate, read_folder, record_folder, warn_of_leak
from ddray.methods.families.diffusion.model import DiffusionModel, Levels, open_pipeline
from ddray.methods.families.diffusion.train import DiffusionRecipe, train_generator
from ddray.pool.spec import ModelPool, PoolEntry, PoolSpec
from ddray.seeding import derive, forked_global
from ddray.system.files import home, write_atomically
from ddray.system.progress import progress

Content = tuple[Mapping[str, Tensor], Mapping[str, Any]]


def base_spec(dataset: Dataset, split_name: str, device: torch.device) -> PoolSpec:
    """Return the fields that all specs of a dataset's split share."""
    return PoolSpec(
        kind="diffusion",
        dataset=dataset.fingerprint,
        split=split_name,
        transform="raw",
        arch="dit",
        recipe={},
        seed=0,
        image_shape=dataset.image_shape,
        num_classes=dataset.num_classes,
        device=device.type,
    )


def generator_spec(base: PoolSpec, recipe: DiffusionRecipe) -> PoolSpec:
    """Return the spec of a generator trained by `recipe` on the dataset's split in `base`.

    The folder to start from is identified by its content: moving it changes nothing, editing it does.

    Raises:
        InputError: the folder to start from can't be read.
    """
    settings = recipe.dump()
    if recipe.init is not None:
        start = read_folder(Path(recipe.init))
        record_folder(start)
        warn_of_leak(start, base.dataset, base.split)
        settings["init"] = start.fingerprint
    return _derived(base, "diffusion", settings, parents=())


def latents_spec(base: PoolSpec, source: Mapping[str, Any], *, encoding: str, precision: str) -> PoolSpec:
    """Return the spec of the VAE latents [N, D] of all images.

    Args:
        base: dataset, split and device.
        source: the generator, by `{"spec": ...}` or by `{"fingerprint": ...}` of a folder.
        encoding: `mode` | `sample` of the posterior.
        precision: of the networks.
    """
    recipe = {"source": dict(source), "encoding": encoding, "precision": precision}
    parent = source["fingerprint"] if "fingerprint" in source else PoolSpec.parse(source["spec"]).key
    return _derived(base, "latents", recipe, parents=(parent,))


def inverted_spec(latents: PoolSpec, levels: Levels, *, mapping: str, ids: Sequence[int]) -> PoolSpec:
    """Return the spec of the latents taken up to level T.

    Args:
        latents: spec of the clean latents.
        levels: how far, and under what guidance.
        mapping: `ddim` (inversion, Eq 3) | `ddpm` (noise, Eq 1).
        ids: the generator's labels of the classes.
    """
    recipe = {"latents": latents.dump(), **levels.dump(), "mapping": mapping, "class_ids": list(ids)}
    if mapping == "ddpm":
        del recipe["guidance"], recipe["class_ids"]
    return _derived(latents, "inverted", recipe, parents=(latents.key,))


def statistics_spec(inverted: PoolSpec) -> PoolSpec:
    """Return the spec of the per-class mean and variance [K, D] of inverted latents."""
    return _derived(inverted, "statistics", {"inverted": inverted.dump()}, parents=(inverted.key,))


def _derived(base: PoolSpec, kind: str, recipe: dict[str, Any], parents: tuple[str, ...]) -> PoolSpec:
    changes = {
        "kind": kind,
        "arch": "dit",
        "transform": "raw",
        "seed": 0,
        "recipe": recipe,
        "parents": parents,
    }
    return base.model_copy(update=changes)


def train_stage(
    spec: PoolSpec, dataset: Dataset, split: Split, device: torch.device, pool: ModelPool
) -> Content:
    """Compute the entry of one of D3HR's specs: tensors to store, and measurements.

    Args:
        spec: of a generator, latents, their inversion or their statistics.
        dataset: names of the classes.
        split: the real images that the spec names.
        device: where to compute.
        pool: provides the entry's inputs.

    Raises:
        InputError: the images or the generator do not fit.
        DivergedError: training the generator diverged.
    """
    tensors, measured = _STAGES[spec.kind](spec, dataset, split, device, pool)
    return tensors, {**measured, "dataset_name": dataset.name}


def _latents(
    spec: PoolSpec, dataset: Dataset, split: Split, device: torch.device, pool: ModelPool
) -> Content:
    """Encode all images."""
    if split.images.dtype != torch.uint8:
        raise InputError("a diffusion model encodes uint8 images, got spectrograms; use another method")
    model = load_generator(spec.recipe["source"], pool).to(device, _precision(spec, device))

    def encode(index: Tensor) -> Tensor:
        generator = derive(spec.seed, "encode", int(index[0]))
        return model.encode(split.images[index].to(device).float() / 255, spec.recipe["encoding"], generator)

    size = batch_size(device, model.image_size)
    return {"latents": _in_batches(spec, encode, len(split), size, "encoding")}, {}


def _statistics(
    spec: PoolSpec, dataset: Dataset, split: Split, device: torch.device, pool: ModelPool
) -> Content:
    """Compute the mean and variance of each class's inverted latents."""
    inverted = pool.get([PoolSpec.parse(spec.recipe["inverted"])])[0].tensors["latents"]
    mean, variance = class_statistics(inverted, split.labels, dataset.num_classes)
    return {"mean": mean, "variance": variance}, {}


def _generator(
    spec: PoolSpec, dataset: Dataset, split: Split, device: torch.device, pool: ModelPool
) -> Content:
    """Train the generator."""
    class_names = dataset.class_names
    init = None if spec.recipe["init"] is None else str(locate(spec.recipe["init"]))
    recipe = DiffusionRecipe.parse({**spec.recipe, "init": init}, prefix="recipe.")
    model, measured = train_generator(
        split, class_names, recipe, seed=spec.seed, device=device, checkpoint=_scratch(spec) / "checkpoint.pt"
    )
    tensors = {
        f"{part}.{name}": tensor
        for part in PARTS
        for name, tensor in getattr(model, part).state_dict().items()
    }
    network_configs = {part: dict(getattr(model, part).config) for part in PARTS}
    # Through JSON: configurations contain tuples and objects of the libraries.
    configs = json.loads(json.dumps({**network_configs, "scheduler": model.scheduler}, default=str))
    seen = [*(dict(part) for part in model.seen), {"dataset": spec.dataset, "split": spec.split}]
    return tensors, {**measured, "configs": configs, "class_names": list(class_names), "seen": seen}


def entry_generator(entry: PoolEntry) -> DiffusionModel:
    """Return the generator stored in a pool entry of kind `diffusion`."""
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    configs = entry.meta["configs"]
    nets = {}
    for part, kind in zip(PARTS, (DiTTransformer2DModel, AutoencoderKL), strict=True):
        with forked_global(0):
            nets[part] = kind.from_config(configs[part])
        prefix = f"{part}."
        weights = {k.removeprefix(prefix): v for k, v in entry.tensors.items() if k.startswith(prefix)}
        nets[part].load_state_dict(weights)
    return DiffusionModel(
        nets["transformer"],
        nets["vae"],
        configs["scheduler"],
        fingerprint=str(entry.meta["key"]),
        class_names=tuple(entry.meta["class_names"]),
        seen=entry.meta.get("seen", ()),
    )


def load_generator(source: Mapping[str, Any], pool: ModelPool) -> DiffusionModel:
    """Return a source's generator, from its folder or from the pool, which trains it if necessary.

    Raises:
        InputError: the folder has moved, or its content has changed.
    """
    if "spec" in source:
        return entry_generator(pool.get([PoolSpec.parse(source["spec"])])[0])
    return open_pipeline(locate(source["fingerprint"], source.get("folder")))


def _inverted(
    spec: PoolSpec, dataset: Dataset, split: Split, device: torch.device, pool: ModelPool
) -> Content:
    """Take all latents up to level T."""
    recipe = spec.recipe
    source = PoolSpec.parse(recipe["latents"])
    clean = pool.get([source])[0].tensors["latents"]
    model = load_generator(source.recipe["source"], pool).to(device, _precision(source, device))
    labels = torch.tensor(recipe.get("class_ids", range(dataset.num_classes)))[split.labels]
    levels = Levels(
        num_inference_steps=recipe["num_inference_steps"],
        num_steps=recipe["num_steps"],
        guidance=recipe.get("guidance", 1.0),
    )

    def lift(index: Tensor) -> Tensor:
        start = clean[index].to(device)
        if recipe["mapping"] == "ddim":
            return model.invert(start, labels[index].to(device), levels)
        noise = torch.randn(start.shape, generator=derive(spec.seed, "noise", int(index[0])))
        return model.add_noise(start, noise.to(device), levels)

    activity = "inverting" if recipe["mapping"] == "ddim" else "adding noise"
    size = batch_size(device, model.image_size)
    return {"latents": _in_batches(spec, lift, len(split), size, activity)}, {}


def class_statistics(latents: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance [K, D] of each class's latents [N, D], summed in float64.

    A class of one image has variance 0.
    """
    means, variances = [], []
    for label in range(num_classes):
        class_latents = latents[labels == label].double()
        means.append(class_latents.mean(0))
        variances.append(
            class_latents.var(0) if len(class_latents) > 1 else torch.zeros_like(class_latents[0])
        )
    return torch.stack(means).float(), torch.stack(variances).float()


def batch_size(device: torch.device, image_size: int) -> int:
    """Return images per batch: what fits on a GPU and keeps it busy; on a CPU, what a kill may lose.

    Args:
        device: where to compute.
        image_size: side of the generator's images in pixels, whatever the dataset's.
    """
    return 64 if device.type == "cpu" else max(16, min(1024, 2**22 // image_size**2))


def _precision(spec: PoolSpec, device: torch.device) -> torch.dtype:
    return getattr(torch, spec.recipe["precision"]) if device.type == "cuda" else torch.float32


def _scratch(spec: PoolSpec) -> Path:
    """Return the folder for the finished batches of an incomplete entry."""
    return home() / "parts" / spec.key


def forget_parts(specs: Sequence[PoolSpec]) -> None:
    """Remove the batches, or the checkpoint, of entries that are now in the pool."""
    for spec in specs:
        shutil.rmtree(_scratch(spec), ignore_errors=True)


def _in_batches(
    spec: PoolSpec, compute: Callable[[Tensor], Tensor], num: int, size: int, activity: str
) -> Tensor:
    """Return `compute` of all images [num, D], `size` at a time; batches already on disk are reused."""
    batches = torch.split(torch.arange(num), size)
    outputs: list[Tensor] = []
    with progress(activity, len(batches)) as show:
        for step, index in enumerate(batches):
            path = _scratch(spec) / f"{step:06d}.pt"
            part = _read_part(path, len(index))
            if part is None:
                part = compute(index).cpu()
                write_atomically(path, lambda file, part=part: torch.save(part, file))  # type: ignore[misc]
            outputs.append(part)
            show(step + 1, f"{len(index)} images a batch")
    return torch.cat(outputs)


def _read_part(path: Path, rows: int) -> Tensor | None:
    """Return a batch that an earlier process wrote, or None if it must be computed."""
    try:
        part = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # missing or truncated: either way it is computed again
        return None
    return part if isinstance(part, Tensor) and len(part) == rows else None


_STAGES: Final = {
    "diffusion": _generator,
    "latents": _latents,
    "inverted": _inverted,
    "statistics": _statistics,
}
