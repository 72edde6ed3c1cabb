"""Settings that KRR-ST and Boost-SSDD share."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from ddray.methods.families.ssl.budget import SslConfig


class KrrConfig(SslConfig):
    """Settings of the bilevel loop."""

    quick: ClassVar[Mapping[str, Any]] = {
        **SslConfig.quick,
        "batch_real": 8,
        "pool_size": 2,
        "inner_steps_max": 2,
    }

    lr_outer: float = Field(default=1e-3, gt=0)
    """Learning rate of the distilled parameters (AdamW without weight decay), falling linearly to 0."""
    batch_real: int = Field(default=1024, ge=1)
    """Real images per step; never more than there are."""
    augment_real: Literal["crop_flip", "none"] = "none"
    """`crop_flip`: the teacher sees each real batch under RandomCrop and a flip; `none`: its features are
    those of the pool."""
    ridge: float = Field(default=1e-6, gt=0)
    """lambda of Eq 3, as a fraction of the Gram matrix's trace."""
    pool_size: int = Field(default=10, ge=1)
    """L, inner networks."""
    inner_steps_max: int = Field(default=1000, ge=1)
    """Z, steps after which an inner network is replaced."""
    pool_reset: Literal["paper", "krrst_code"] = "paper"
    """`paper`: a replaced network counts from 0; `krrst_code`: its counter stays at Z, so that it is replaced
    each time it is drawn."""
    lr_inner: float = Field(default=0.1, gt=0)
    """Learning rate of the inner networks (SGD)."""
    momentum_inner: float = Field(default=0.9, ge=0, lt=1)
    """Momentum of the inner networks."""
    decay_inner: float = Field(default=1e-3, ge=0)
    """Weight decay of the inner networks."""
    inner_batch: int | None = Field(default=None, ge=2)
    """Rows of the set per inner step: images drawn at random, with all of their views; default: all."""
