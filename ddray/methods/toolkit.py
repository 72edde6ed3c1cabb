"""What methods are built from: the names that a method in a package of its own may rely on.

CONTRIBUTING.md builds a method from them, and `ddray.testing` holds it to the contract of all methods. Other
modules of `ddray.methods` may change with any release.
"""

from pydantic import Field

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.partition import Partition
from ddray.distillation.method import BudgetDistiller, DistillContext, Distiller, MethodConfig, Target
from ddray.errors import InputError
from ddray.methods.families.factory import make_method
from ddray.methods.families.matching.batches import ClassBatches, RealBranch, chunks
from ddray.methods.families.matching.initial import initial_images
from ddray.methods.families.matching.means import MatchingConfig, MeanMatching, means_method
from ddray.methods.families.matching.partitioned import by_class
from ddray.methods.families.selection import (
    FeatureConfig,
    coreset_method,
    herding_order,
    kcenter_order,
    per_class,
    pool_features,
    selection_method,
    take,
)
from ddray.methods.families.state import (
    cpu_copy,
    images_state,
    load_images_state,
    load_optimizer_state,
    optimizer_state,
)
from ddray.nets import Net, build_net, reinitialize
from ddray.pool.spec import PoolSpec, supervised_specs, teacher_spec
from ddray.seeding import derive, derive_numpy, derive_seed
from ddray.training.dsa import siamese
from ddray.training.embedding import embed_images
from ddray.training.recipe import TeacherRecipe

# The interface; its `DistillContext.generator` makes the draws of a run.
__all__ = ["BudgetDistiller", "DistillContext", "Distiller", "Field", "MethodConfig", "Target"]
__all__ += ["InputError"]
# Its result.
__all__ += ["DistilledSet", "Partition"]
# Methods by their parts.
__all__ += ["coreset_method", "herding_order", "kcenter_order", "make_method", "means_method"]
__all__ += ["selection_method"]
# Real images.
__all__ += ["ClassBatches", "RealBranch", "by_class", "chunks", "initial_images", "per_class", "take"]
# Matching; `siamese` is one augmentation for real and synthetic images.
__all__ += ["MatchingConfig", "MeanMatching", "siamese"]
# Networks.
__all__ += ["FeatureConfig", "Net", "build_net", "embed_images", "pool_features", "reinitialize"]
# Networks of the pool.
__all__ += ["PoolSpec", "TeacherRecipe", "supervised_specs", "teacher_spec"]
# Random draws.
__all__ += ["derive", "derive_numpy", "derive_seed"]
# Checkpoints.
__all__ += ["cpu_copy", "images_state", "load_images_state", "load_optimizer_state", "optimizer_state"]
