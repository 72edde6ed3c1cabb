"""DiT: images of each class as a diffusion transformer samples them (Peebles & Xie, ICCV 2023).

A baseline of Minimax's tables (Gu et al., CVPR 2024), which is this with other weights: from pure noise, 50
steps of DDPM's ancestral sampling on respaced levels, classifier-free guidance of 4. Nothing is inverted and
no statistics are matched: D3HR's Base-RS is another baseline.

**Deviations** (DiT's code | ours)

- generator: DiT-XL/2-256 as released, which has seen all of ImageNet | any DiTPipeline folder
  (`method.diffusion`), or a small one trained on the images. Only with that folder does a row stand beside
  the published column; its decoder was the "mse" one.
- variance of a step: learned, between beta and beta~ | the same if the generator learned one; those trained
  here did not: beta~.
- guidance: the first 3 of 4 channels of the noise; the fourth and the variance are the conditional model's |
  the same; `guided_channels` 4 guides all.
- null label: 1000 | the generator's number of classes.
- images: ipc per class, drawn one class after another | the same, in batches of 64.
"""

from typing import ClassVar, Final

from ddray.distillation.method import DistillContext
from ddray.methods.families.diffusion import stages
from ddray.methods.families.diffusion.generated import (
    GeneratedConfig,
    Generation,
    generated_preset,
    sampled_source,
)
from ddray.methods.families.factory import make_method
from ddray.methods.families.selection import apart
from ddray.pool.spec import PoolSpec


class DiTConfig(GeneratedConfig):
    """DiT's settings."""

    search_space: ClassVar = {
        "guidance": {"uniform": [1.0, 6.0]},
        "num_inference_steps": {"choice": [20, 50, 100]},
    }
    dataset_settings: ClassVar = {"digits": {"evaluate": {"epochs": 300}}}


def pool_specs(ctx: DistillContext, config: DiTConfig) -> list[PoolSpec]:
    """Return the generator's spec; none for a folder."""
    return sampled_source(ctx, config).specs


def start(ctx: DistillContext, config: DiTConfig) -> Generation:
    """Load the generator, which the pool trains if it is missing."""
    source = sampled_source(ctx, config)
    model = stages.load_generator(source.recipe, ctx.pool)
    stages.forget_parts(source.specs)
    return Generation(ctx, config, model, source.ids)


METHOD: Final = make_method(
    DiTConfig, generated_preset, start, specs_of=pool_specs, has_steps=False, coupling=apart
)
