"""D3HR's settings."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from ddray.distillation.method import MethodConfig
from ddray.methods.families.diffusion.folder import absolute
from ddray.methods.families.diffusion.groups import Form
from ddray.methods.families.diffusion.model import Encoding, Levels
from ddray.methods.families.diffusion.train import DiffusionRecipe


class D3HRConfig(MethodConfig):
    """D3HR's settings; defaults are the paper's."""

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
    encoding: Encoding = "mode"
    """Latent of an image: the posterior's mode, or a sample of it."""
    mapping: Literal["ddim", "ddpm"] = "ddim"
    """Domain mapping: inversion (Eq 3), or added noise (Eq 1; Table 3's Base-DDPM with `sampling=random`)."""
    sampling: Literal["group", "random", "kmeans"] = "group"
    """`random`: one group (Table 3's Base-RS); `kmeans`: centres of a class's clean latents, noised (D4M)."""
    num_candidates: int = Field(default=100_000, ge=1)
    """m, groups to choose from."""
    lambda_mean: float = Field(default=1.0, ge=0)
    """Weight of the mean's term (Eq 6)."""
    lambda_std: float = Field(default=1.0, ge=0)
    """Weight of the standard deviation's term (Eq 7)."""
    lambda_skew: float = Field(default=0.5, ge=0)
    """Weight of the skewness's term (Eq 8)."""
    form: Form = "paper"
    """Form of the score."""
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
        if self.inversion_steps is not None and self.inversion_steps > self.num_inference_steps:
            raise ValueError(
                f"inversion_steps must be <= num_inference_steps ({self.num_inference_steps}), got "
                f"{self.inversion_steps}"
            )
        return self

    def levels(self) -> Levels:
        """Return the steps and the guidance of inversion and sampling."""
        steps = self.inversion_steps or max(1, round(self.num_inference_steps * 31 / 50))
        return Levels(num_inference_steps=self.num_inference_steps, num_steps=steps, guidance=self.guidance)
