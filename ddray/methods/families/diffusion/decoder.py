"""D3HR's settings; images from its statistics: group sampling, DDIM sampling, decoding; decoder `d3hr`.

A set that holds statistics of latents gives any number of images, which a generator makes from them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Final, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from ddray.artifact.decoders import Decoder
from ddray.artifact.distilled_set import DistilledSet, Meta
from ddray.config import added
from ddray.distillation.method import MethodConfig
from ddray.errors import InputError
from ddray.methods.families.diffusion.folder import absolute, resolve_ids
from ddray.methods.families.diffusion.groups import Form, best_group
from ddray.methods.families.diffusion.model import DiffusionModel, Encoding, Levels
from ddray.methods.families.diffusion.stages import load_generator
from ddray.methods.families.diffusion.train import DiffusionRecipe
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolSpec
from ddray.seeding import derive
from ddray.system.files import home
from ddray.system.transfer import to_device


class D3HRConfig(MethodConfig):
    """D3HR's settings; defaults are the paper's."""

    protocol: ClassVar = "soft"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "d4m": {
            "method": {
                **{"sampling": "kmeans", "km_expand": 1, "encoding": "sample"},
                **{"num_inference_steps": 50, "inversion_steps": 35, "guidance": 8.0},
            }
        }
    }
    quick: ClassVar[Mapping[str, Any]] = {
        "generator": {"epochs": 1, "vae_epochs": 1, "vae_width": 8, "depth": 1, "heads": 1, "head_dim": 8},
        "num_candidates": 5,
        "num_inference_steps": 2,
    }

    diffusion: str | None = None
    """Folder of a DiTPipeline; default: a generator trained on the images, by `generator`."""
    generator: DiffusionRecipe = DiffusionRecipe()
    """How a generator is trained where none is given."""
    class_ids: tuple[int, ...] | None = None
    """The generator's label of each class; default: by name or number."""
    num_inference_steps: int = Field(default=50, ge=1)
    """S, steps of the full schedule to noise."""
    inversion_steps: int | None = Field(default=None, ge=1)
    """T, steps of inversion and of sampling (Fig 5); default: 31 of 50, in proportion."""
    guidance: float = Field(default=4.0, ge=0)
    """Scale of classifier-free guidance, in inversion and sampling; 1: none."""
    fixed_point: int = added(0, ge=0)
    """Fixed-point iterations of each inversion step, towards the latent from which a DDIM step leads back."""
    encoding: Encoding = "mode"
    """Latent of an image: the posterior's mode, or a sample of it."""
    mapping: Literal["ddim", "ddpm"] = "ddim"
    """Domain mapping: inversion (Eq 3), or added noise (Eq 1; Table 3's Base-DDPM with `sampling=random`)."""
    sampling: Literal["group", "random", "kmeans"] = "group"
    """`random`: one group (Table 3's Base-RS); `kmeans`: centres of a class's clean latents, noised (D4M)."""
    km_expand: int = added(0, ge=0)
    """Mini-batch k-means on so many times ipc latents at a time (D4M's name for it); 0: k-means on all."""
    num_candidates: int = Field(default=100_000, ge=1)
    """m, groups to choose from."""
    lambda_mean: float = Field(default=1.0, ge=0)
    """Weight of the mean's term (Eq 6)."""
    lambda_std: float = Field(default=1.0, ge=0)
    """Weight of the standard deviation's term (Eq 7)."""
    lambda_skew: float = Field(default=0.5, ge=0)
    """Weight of the skewness's term (Eq 8)."""
    form: Form = "paper"
    """Form of the score: Eq 5-8, or that of the authors' code."""
    shared_draws: bool = False
    """The same standard normal draws for every class (authors' code)."""
    variance_scale: float = Field(default=1.0, gt=0)
    """Factor on the variance that is sampled from (Table A5)."""
    store: Literal["images", "statistics"] = "images"
    """`statistics`: mean and variance of each class, from which any ipc is made later (Sec 6.7)."""
    batch: int = Field(default=64, ge=1)
    """Images sampled and decoded at a time."""
    precision: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the networks on a GPU; a CPU computes in float32."""

    _absolute = field_validator("diffusion")(absolute)

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if self.store == "statistics" and self.sampling == "kmeans":
            raise ValueError("store=statistics needs sampling=group or random: k-means needs the images")
        if self.km_expand and self.sampling != "kmeans":
            raise ValueError(f"km_expand={self.km_expand} needs sampling=kmeans, got {self.sampling}")
        if self.inversion_steps is not None and self.inversion_steps > self.num_inference_steps:
            raise ValueError(
                f"inversion_steps must be <= num_inference_steps ({self.num_inference_steps}), got "
                f"{self.inversion_steps}"
            )
        return self

    @property
    def edition(self) -> int:
        """Counts two mends: the axes of the authors' skewness, and the scale of own generators' latents."""
        return int(self.form == "repo") + int(self.diffusion is None)

    @property
    def has_space(self) -> bool:
        """Not with k-means: the ranges are of group sampling."""
        return self.sampling != "kmeans"

    def levels(self) -> Levels:
        """Return the steps and the guidance of inversion and sampling."""
        steps = self.inversion_steps or max(1, round(self.num_inference_steps * 31 / 50))
        return Levels(
            num_inference_steps=self.num_inference_steps,
            num_steps=steps,
            guidance=self.guidance,
            fixed_point=self.fixed_point,
        )


@dataclass
class Sampler:
    """Generates images of classes from mean and variance [K, D] of their latents at level T."""

    mean: Tensor
    variance: Tensor
    model: DiffusionModel
    config: D3HRConfig
    class_names: tuple[str, ...]
    seed: int
    """Of the run; class c's draws depend only on it and c."""
    device: torch.device

    def __post_init__(self) -> None:
        model, class_ids = self.model.to(self.device, self.config.precision), self.config.class_ids
        ids = resolve_ids(model.class_names, model.num_classes, self.class_names, class_ids)
        self._ids = torch.tensor(ids)
        self._mean, self._variance = self.mean.to(self.device), self.variance.to(self.device)

    def choose(self, label: int, ipc: int) -> tuple[Tensor, Tensor]:
        """Return the chosen latents [ipc, D] of a class and their score per dimension, on the device."""
        config = self.config
        latents, score = best_group(
            self._mean[label],
            (self._variance[label] * config.variance_scale).sqrt(),
            ipc=ipc,
            num_candidates=1 if config.sampling == "random" else config.num_candidates,
            generator=derive(self.seed, "distill", "group", 0 if config.shared_draws else label),
            weights=(config.lambda_mean, config.lambda_std, config.lambda_skew),
            form=config.form,
        )
        return latents, (score / latents.shape[1]).float()

    def decode(self, latents: Tensor, labels: Tensor, image_shape: tuple[int, int, int]) -> Tensor:
        """Return raw pixels [N, *image_shape] in [0, 1] of latents [N, D] of level T, on the device.

        The labels [N] are on the CPU.
        """
        clean = self.model.sample(latents, to_device(self._ids[labels], self.device), self.config.levels())
        return self.model.decode(clean, image_shape)


def _read(meta: Meta, tensors: Mapping[str, Tensor], zca: Mapping[str, Tensor]) -> DistilledSet:
    """Return a set without images, which holds a file's statistics."""
    blank, none = torch.zeros(0, *meta.image_shape), torch.zeros(0, dtype=torch.int64)
    return DistilledSet(blank, none, meta, zca, compact=tensors)


def _validate(distilled: DistilledSet) -> None:
    tensors, num_classes = distilled.compact, len(distilled.meta.class_names)
    if set(tensors) != {"mean", "variance"} or any(t.dtype != torch.float32 for t in tensors.values()):
        raise InputError(f"decoder d3hr must come with float32 mean and variance, got {sorted(tensors)}")
    mean, variance = tensors["mean"], tensors["variance"]
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in (mean, variance))
    if mean.ndim != 2 or len(mean) != num_classes or variance.shape != mean.shape or not finite:
        raise InputError(
            f"mean and variance must be finite [{num_classes}, D], got {list(mean.shape)} and "
            f"{list(variance.shape)}"
        )
    if bool((variance < 0).any()):
        raise InputError(f"variance must be >= 0, got {float(variance.min())}")
    distilled.check_storage()


def generate(distilled: DistilledSet, ipc: int | None, device: torch.device) -> DistilledSet:
    """Generate `ipc` images per class (None: as distilled) from a set of statistics (Sec 6.7).

    InputError if ipc is below 1, or the generator no longer exists.
    """
    meta = distilled.meta
    ipc = meta.ipc if ipc is None else ipc
    if ipc < 1:
        raise InputError(f"ipc must be >= 1, got {ipc}")
    config = D3HRConfig.parse(meta.config.get("method", {}), prefix="method.")
    sampler = Sampler(
        **distilled.compact,
        model=load_generator(_source(config, meta.generator or ""), LocalPool(_refuse)),
        config=config,
        class_names=meta.class_names,
        seed=meta.seed or 0,
        device=device,
    )
    num_classes = len(meta.class_names)
    latents = torch.cat([sampler.choose(label, ipc)[0] for label in range(num_classes)])
    labels = torch.arange(num_classes).repeat_interleave(ipc)
    batches = zip(torch.split(latents, config.batch), torch.split(labels, config.batch), strict=True)
    pixels = torch.cat([sampler.decode(*batch, meta.image_shape).cpu() for batch in batches])
    return replace(
        distilled,
        images=distilled.space().encode(pixels),
        labels=labels,
        compact={},
        meta=meta.model_copy(update={"ipc_decoded": ipc, "decoder": None}),
    )


def _source(config: D3HRConfig, fingerprint: str) -> Mapping[str, Any]:
    """Return a set's generator, the folder it was given or its pool entry; InputError if there is neither."""
    if config.diffusion is not None:
        return {"folder": config.diffusion, "fingerprint": fingerprint}
    path = home() / "pool" / fingerprint / "entry.json"
    try:
        return {"spec": json.loads(path.read_text(encoding="utf-8"))["spec"]}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the set needs its generator, {path.parent} does not hold it; copy that folder there, or distil "
            "with method.diffusion=FOLDER"
        ) from error


def _refuse(spec: PoolSpec) -> Any:
    raise InputError(f"the set needs its generator, pool entry {spec.key} is damaged; copy it again")


STATISTICS: Final = Decoder(
    read=_read,
    validate=_validate,
    decode=lambda distilled: generate(distilled, None, torch.device("cpu")).decode(),
    generate=generate,
)
