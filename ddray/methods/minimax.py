"""Minimax: a generator fine-tuned to be representative and diverse (Gu et al., CVPR 2024, arXiv 2311.15529).

The generator's biases and class embeddings are fine-tuned on the images for a few epochs by the diffusion
loss, plus per class of a batch `lambda_r` (1 - the lowest cosine of its predicted clean latents with its last
64 real ones) and `lambda_d` times the highest with its last 64 predictions (Eq 4-6). Images are then sampled
as the method `dit` samples them. The fine-tuned weights are a pool entry (kind `minimax`) whose parent is the
generator, so that runs of other ipc or seed share them.

**Deviations** (authors' code | ours)

- generator: DiT-XL/2-256 as released, which has seen all of ImageNet; alone it is 3 to 7 points behind | any
  DiTPipeline folder (`method.diffusion`), or a small one trained on the images: the published cells are
  claimed of neither the small one nor other folders.
- trained: biases, the class embedder, added scales of the first 14 of 28 blocks (DiffFit) | biases and class
  embedders, of which diffusers has one in every block; no scales are added.
- loss: mean squared error and a variational bound, which trains the learned variance | the same for
  generators that learned one; those trained here did not: mean squared error alone. The bound's last step
  has the normal distribution function, theirs an approximation of it.
- terms: clean latents predicted from the noise at a random level, real ones sampled from the posterior;
  divided by all classes of the batch, first visits too | the same.
- weights that are sampled: the average (.9999, from the first step) at step 12,000 of the released weights,
  30% of it theirs | the average at the last step; digits, 1,440 steps, take .998 for a share of 6%.
- images: centre crop of 256 px, mirrored | the dataset's, resized to the model's size; mirrored where a class
  allows it.
- autoencoder: "ema" in fine-tuning, "mse" in sampling | the generator's.
- sampling: as `dit` says.
- images of a run: at most 1,000 of a class, and full batches alone | all, and the last batch as it is.
- scores: hard labels, networks with instance norm | recipe `minimax`, any network.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from ddray.distillation.method import DistillContext
from ddray.methods.families.diffusion import stages
from ddray.methods.families.diffusion.generated import (
    GeneratedConfig,
    Generation,
    generated_preset,
    sampled_source,
)
from ddray.methods.families.diffusion.minimax import MinimaxRecipe
from ddray.methods.families.diffusion.source import Source
from ddray.methods.families.factory import make_method
from ddray.methods.families.selection import apart
from ddray.pool.spec import PoolSpec, transform_of


class MinimaxConfig(GeneratedConfig):
    """Minimax's settings."""

    search_space: ClassVar = {
        "finetune.lambda_r": {"loguniform": [0.0005, 0.05]},
        "finetune.lambda_d": {"loguniform": [0.0005, 0.05]},
        "guidance": {"uniform": [1.0, 6.0]},
    }
    dataset_settings: ClassVar = {
        "digits": {"evaluate": {"epochs": 300}, "method": {"finetune": {"ema": 0.998}}}
    }
    quick: ClassVar[Mapping[str, Any]] = {**GeneratedConfig.quick, "finetune": {"epochs": 1, "memory": 2}}

    finetune: MinimaxRecipe = MinimaxRecipe()
    """How the generator is fine-tuned."""


def plan(ctx: DistillContext, config: MinimaxConfig) -> tuple[Source, PoolSpec]:
    """Return the generator and the spec of its fine-tuning; InputError if settings and images don't fit."""
    source = sampled_source(ctx, config)
    base = stages.base_spec(ctx.dataset, ctx.split_name, ctx.device)
    base = base.model_copy(update={"transform": transform_of(ctx.dataset, "raw")})  # fine-tuning mirrors
    return source, stages.minimax_spec(base, source.recipe, source.ids, config.finetune, source.parent)


def pool_specs(ctx: DistillContext, config: MinimaxConfig) -> list[PoolSpec]:
    """Return the spec of the fine-tuning, and of the generator where it is trained here."""
    source, spec = plan(ctx, config)
    return [*source.specs, spec]


def start(ctx: DistillContext, config: MinimaxConfig) -> Generation:
    """Load the fine-tuned generator; the pool computes what is missing."""
    source, spec = plan(ctx, config)
    model = stages.load_minimax(spec, ctx.pool)
    stages.forget_parts([*source.specs, spec])
    return Generation(ctx, config, model, source.ids)


METHOD: Final = make_method(
    MinimaxConfig, generated_preset, start, specs_of=pool_specs, has_steps=False, coupling=apart
)
