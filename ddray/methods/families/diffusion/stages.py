"""D3HR's stages up to the statistics, as pool entries: generator -> latents -> inverted -> statistics.

Another entry made from a generator is the weights that Minimax's fine-tuning has changed (kind `minimax`).

A spec contains the specs of its inputs, so an entry's key covers everything that determines it and nothing
that comes later: other candidates, score weights or ipc never repeat an inversion. The run's seed plays no
part. Latents and inversions are saved batch by batch until the entry is complete: a killed process loses at
most the batch it was working on.
"""

import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddray.data import Dataset, Split
from ddray.errors import InputError
from ddray.methods.families.diffusion.folder import (
    PARTS,
    locate,
    read_folder,
    record_folder,
    warn_of_leak,
    weight_files,
)
from ddray.methods.families.diffusion.minimax import Finetuning, MinimaxRecipe, finetune
from ddray.methods.families.diffusion.model import DiffusionModel, Levels, network_kinds, open_pipeline
from ddray.methods.families.diffusion.train import DiffusionRecipe, train_generator
from ddray.pool.files import PoolFiles
from ddray.pool.spec import ModelPool, PoolEntry, PoolSpec
from ddray.seeding import derive, forked_global
from ddray.system.files import home, write_atomically
from ddray.system.progress import progress
from ddray.system.transfer import to_device

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
    InputError if it can't be read.
    """
    settings = recipe.dump()
    if recipe.init is not None:
        start = read_folder(Path(recipe.init))
        record_folder(start)
        warn_of_leak(start, base.dataset, base.split)
        settings["init"] = start.fingerprint
    return _derived(base, "diffusion", settings)


def latents_spec(base: PoolSpec, source: Mapping[str, Any], *, encoding: str, precision: str) -> PoolSpec:
    """Return the spec of the VAE latents [N, D] of all images: the posterior's `mode` or `sample`.

    `source` is the generator, as `{"spec": ...}` or as `{"fingerprint": ...}` of a folder, and `precision`
    that of its networks.
    """
    recipe = {"source": dict(source), "encoding": encoding, "precision": precision, **_edition(source)}
    parent = source["fingerprint"] if "fingerprint" in source else PoolSpec.parse(source["spec"]).key
    return _derived(base, "latents", recipe, parent)


def inverted_spec(latents: PoolSpec, levels: Levels, *, mapping: str, ids: Sequence[int]) -> PoolSpec:
    """Return the spec of the clean latents of a spec taken up to level T.

    `mapping` is `ddim` (inversion, Eq 3) or `ddpm` (noise, Eq 1), `ids` the generator's class labels.
    """
    recipe = {"latents": latents.dump(), **levels.dump(), "mapping": mapping, "class_ids": list(ids)}
    if mapping == "ddpm":
        del recipe["guidance"], recipe["class_ids"]
        recipe.pop("fixed_point", None)
    return _derived(latents, "inverted", recipe, latents.key)


def statistics_spec(inverted: PoolSpec) -> PoolSpec:
    """Return the spec of the per-class mean and variance [K, D] of inverted latents."""
    return _derived(inverted, "statistics", {"inverted": inverted.dump()}, inverted.key)


def minimax_spec(
    base: PoolSpec, source: Mapping[str, Any], ids: Sequence[int], recipe: MinimaxRecipe, parent: str
) -> PoolSpec:
    """Return the spec of a generator fine-tuned by `recipe`; `source` is as for `latents_spec`.

    `ids` are the generator's class labels, `parent` its key or its folder's fingerprint.
    """
    settings = {"source": dict(source), "class_ids": list(ids), **recipe.dump(), **_edition(source)}
    return _derived(base, "minimax", settings, parent)


def _edition(source: Mapping[str, Any]) -> dict[str, int]:
    """Return what tells entries made by a pool's generator from those of before its scale was kept."""
    return {"edition": 1} if "spec" in source else {}


def _derived(base: PoolSpec, kind: str, recipe: dict[str, Any], *parents: str) -> PoolSpec:
    return base.model_copy(update={"kind": kind, "recipe": recipe, "parents": parents})


@dataclass(frozen=True)
class StageTrainer:
    """Computes the entries of D3HR's specs."""

    dataset: Dataset
    split: Split
    """The real images that the specs name."""
    device: torch.device
    pool: ModelPool
    """Provides an entry's inputs."""

    def __call__(self, spec: PoolSpec) -> Content:
        """Return the tensors to store and the measurements of an entry of one of D3HR's kinds, or `minimax`.

        InputError if images or generator do not fit, DivergedError if training the generator diverges.
        """
        compute: dict[str, Callable[[PoolSpec], Content]] = {
            "diffusion": self._generator,
            "latents": self._latents,
            "inverted": self._inverted,
            "statistics": self._statistics,
            "minimax": self._minimax,
        }
        tensors, measured = compute[spec.kind](spec)
        return tensors, {**measured, "dataset_name": self.dataset.name}

    def _generator(self, spec: PoolSpec) -> Content:
        names = self.dataset.class_names
        init = None if spec.recipe["init"] is None else str(locate(spec.recipe["init"]))
        recipe = DiffusionRecipe.parse({**spec.recipe, "init": init}, prefix="recipe.")
        checkpoint = _scratch(spec) / "checkpoint.pt"
        model, measured = train_generator(
            self.split, names, recipe, seed=spec.seed, device=self.device, checkpoint=checkpoint
        )
        nets = {part: getattr(model, part) for part in PARTS}
        tensors = {f"{part}.{name}": t for part, net in nets.items() for name, t in net.state_dict().items()}
        configs = {part: _config_of(net.config) for part, net in nets.items()}
        configs["scheduler"] = dict(model.scheduler)
        seen = [*(dict(part) for part in model.seen), {"dataset": spec.dataset, "split": spec.split}]
        # Through JSON: configurations contain tuples and objects of the libraries.
        configs = json.loads(json.dumps(configs, default=str))
        return tensors, {**measured, "configs": configs, "class_names": list(names), "seen": seen}

    def _latents(self, spec: PoolSpec) -> Content:
        images, encoding = self.split.images, spec.recipe["encoding"]
        _check_uint8(self.split)
        model = load_generator(spec.recipe["source"], self.pool).to(self.device, spec.recipe["precision"])

        def encode(index: Tensor) -> Tensor:
            generator = derive(spec.seed, "encode", int(index[0]))
            return model.encode(to_device(images[index], self.device).float() / 255, encoding, generator)

        return self._in_batches(spec, model, encode, "encoding")

    def _inverted(self, spec: PoolSpec) -> Content:
        recipe, device = spec.recipe, self.device
        source = PoolSpec.parse(recipe["latents"])
        clean = self.pool.get([source])[0].tensors["latents"]
        model = load_generator(source.recipe["source"], self.pool).to(device, source.recipe["precision"])
        labels = torch.tensor(recipe.get("class_ids", range(self.dataset.num_classes)))[self.split.labels]
        stored = {name: value for name, value in recipe.items() if name in Levels.model_fields}
        levels = Levels.parse({"guidance": 1.0, **stored})

        def lift(index: Tensor) -> Tensor:
            start = to_device(clean[index], device)
            if recipe["mapping"] == "ddim":
                return model.invert(start, to_device(labels[index], device), levels)
            noise = torch.randn(start.shape, generator=derive(spec.seed, "noise", int(index[0])))
            return model.add_noise(start, to_device(noise, device), levels)

        return self._in_batches(
            spec, model, lift, "inverting" if recipe["mapping"] == "ddim" else "adding noise"
        )

    def _statistics(self, spec: PoolSpec) -> Content:
        inverted = self.pool.get([PoolSpec.parse(spec.recipe["inverted"])])[0].tensors["latents"]
        mean, variance = class_statistics(inverted, self.split.labels, self.dataset.num_classes)
        return {"mean": mean, "variance": variance}, {}

    def _minimax(self, spec: PoolSpec) -> Content:
        names = MinimaxRecipe.model_fields
        recipe = MinimaxRecipe.parse({k: v for k, v in spec.recipe.items() if k in names}, prefix="recipe.")
        _check_uint8(self.split)
        model = load_generator(spec.recipe["source"], self.pool).to(self.device)
        ids, can_flip = spec.recipe["class_ids"], self.dataset.can_flip
        finetuning = Finetuning(model, self.split, ids, recipe, spec.seed, can_flip)
        weights, loss = finetune(finetuning, _scratch(spec) / "checkpoint.pt")
        return {f"transformer.{name}": weight for name, weight in weights.items()}, {"loss": loss}

    def _in_batches(
        self, spec: PoolSpec, model: DiffusionModel, compute: Callable[[Tensor], Tensor], activity: str
    ) -> Content:
        """Return latents [N, D] by `compute`, batch by batch; batches already on disk are reused."""
        batches = torch.split(torch.arange(len(self.split)), batch_size(self.device, model.image_size))
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
        return {"latents": torch.cat(outputs)}, {}


def _config_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a network's configuration as diffusers' `from_config` takes all of it.

    It leaves out what the configuration lists as defaults of its constructor, though the values may have been
    changed since, as the scale of latents is.
    """
    return {name: value for name, value in config.items() if name != "_use_default_values"}


def entry_generator(entry: PoolEntry) -> DiffusionModel:
    """Return the generator stored in a pool entry of kind `diffusion`."""
    meta, nets = entry.meta, []
    for part, kind in network_kinds().items():
        with forked_global(0):
            net = kind.from_config(_config_of(meta["configs"][part]))
        prefix = f"{part}."
        net.load_state_dict(
            {k.removeprefix(prefix): v for k, v in entry.tensors.items() if k.startswith(prefix)}
        )
        nets.append(net)
    schedule, names = meta["configs"]["scheduler"], tuple(meta["class_names"])
    return DiffusionModel(nets[0], nets[1], schedule, str(meta["key"]), names, tuple(meta.get("seen", ())))


def load_generator(source: Mapping[str, Any], pool: ModelPool) -> DiffusionModel:
    """Return a source's generator, from its folder or from the pool, which trains it if necessary.

    InputError if the folder has moved, or its content has changed.
    """
    if "spec" in source:
        return entry_generator(pool.get([PoolSpec.parse(source["spec"])])[0])
    return open_pipeline(locate(source["fingerprint"], source.get("folder")))


def load_minimax(spec: PoolSpec, pool: ModelPool) -> DiffusionModel:
    """Return the fine-tuned generator of a spec of kind `minimax`; InputError as for `load_generator`."""
    entry, model = pool.get([spec])[0], load_generator(spec.recipe["source"], pool)
    weights = {name.removeprefix("transformer."): tensor for name, tensor in entry.tensors.items()}
    model.transformer.load_state_dict(weights, strict=False)
    return replace(model, fingerprint=spec.key)


def _check_uint8(split: Split) -> None:
    if split.images.dtype != torch.uint8:
        raise InputError("a diffusion model encodes uint8 images, got spectrograms; use another method")


def generator_floats(fingerprint: str) -> int | None:
    """Return how many values a generator's weights are, by its pool key or its folder's fingerprint.

    None if it is gone, or its files are no safetensors.
    """
    from safetensors import safe_open

    files = [PoolFiles(home() / "pool").tensors_path(fingerprint)]
    if not files[0].is_file():
        try:
            folders = [locate(fingerprint) / part for part in PARTS]
        except InputError:
            return None
        files = [path for folder in folders for path in weight_files(folder)]
    num = 0
    for path in files:
        with safe_open(path, framework="numpy") as file:
            num += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return num or None


def class_statistics(latents: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return mean and unbiased variance [K, D] of each class's latents [N, D], summed in float64.

    A class of one image has variance 0.
    """
    means, variances = [], []
    for label in range(num_classes):
        rows = latents[labels == label].double()
        means.append(rows.mean(0))
        variances.append(rows.var(0) if len(rows) > 1 else torch.zeros_like(rows[0]))
    return torch.stack(means).float(), torch.stack(variances).float()


def batch_size(device: torch.device, image_size: int) -> int:
    """Return images per batch: what fits on a GPU and keeps it busy; on a CPU, what a kill may lose.

    `image_size` is the side of the generator's images in pixels, whatever the dataset's.
    """
    return 64 if device.type == "cpu" else max(16, min(1024, 2**22 // image_size**2))


def _scratch(spec: PoolSpec) -> Path:
    """Return the folder for the finished batches of an incomplete entry."""
    return home() / "parts" / spec.key


def forget_parts(specs: Sequence[PoolSpec]) -> None:
    """Remove the batches, or the checkpoint, of entries that are now in the pool."""
    for spec in specs:
        shutil.rmtree(_scratch(spec), ignore_errors=True)


def _read_part(path: Path, rows: int) -> Tensor | None:
    """Return a batch that an earlier process wrote, or None if it must be computed."""
    try:
        part = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # missing or truncated: either way it is computed again
        return None
    return part if isinstance(part, Tensor) and len(part) == rows else None
