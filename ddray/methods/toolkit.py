"""What methods are built from: the names that a method in a package of its own may rely on.

| for | names |
|---|---|
| the interface | `Distiller`, `BudgetDistiller`, `DistillContext`, `Target`, `MethodConfig`, `Field` |
| errors | `InputError` |
| its result | `DistilledSet`, `Partition` |
| methods by their parts | `make_method`, `selection_method`, `coreset_method`, `means_method` |
| real images | `ClassBatches`, `RealBranch`, `chunks`, `initial_images`, `take`, `per_class`, `by_class` |
| matching | `MatchingConfig`, `MeanMatching`, `siamese` (one augmentation for real and synthetic images) |
| networks | `Net`, `build_net`, `reinitialize`, `embed_images`, `pool_features`, `FeatureConfig` |
| networks of the pool | `PoolSpec`, `supervised_specs`, `teacher_spec`, `TeacherRecipe` |
| random draws | `DistillContext.generator`, `derive`, `derive_numpy`, `derive_seed` |
| checkpoints | `cpu_copy`, `images_state`, `load_images_state`, `optimizer_state`, `load_optimizer_state` |

CONTRIBUTING.md builds a method from them, and `ddray.testing` holds it to the contract of all methods. Other
modules of `ddray.methods` may change with any release.
"""

from pydantic import Field

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.partition import Partition
from ddray.distillation.method import BudgetDistiller, DistillContext, Distiller, MethodConfig, Target
from ddray.errors import InputError
from ddray.methods.families.factory import make_method
from ddray.methods.families.matching.batches import ClassBatches, RealBranch, chunks, initial_images
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

__all__ = [
    "BudgetDistiller",
    "ClassBatches",
    "DistillContext",
    "DistilledSet",
    "Distiller",
    "FeatureConfig",
    "Field",
    "InputError",
    "MatchingConfig",
    "MeanMatching",
    "MethodConfig",
    "Net",
    "Partition",
    "PoolSpec",
    "RealBranch",
    "Target",
    "TeacherRecipe",
    "build_net",
    "by_class",
    "chunks",
    "coreset_method",
    "cpu_copy",
    "derive",
    "derive_numpy",
    "derive_seed",
    "embed_images",
    "herding_order",
    "images_state",
    "initial_images",
    "kcenter_order",
    "load_images_state",
    "load_optimizer_state",
    "make_method",
    "means_method",
    "optimizer_state",
    "per_class",
    "pool_features",
    "reinitialize",
    "selection_method",
    "siamese",
    "supervised_specs",
    "take",
    "teacher_spec",
]
