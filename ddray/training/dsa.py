"""DSA: differentiable Siamese augmentation, one draw for real and synthetic images alike.

Two functions share the name in the literature:

- `dsa` (DSA, arXiv:2102.08259, mode 'S'; DM, DataDAM, MTT, ...): ONE operation of the strategy per batch.
- `dsa_idc` (IDC, arXiv:2205.14959; DSDM): flip, colour and cutout always, plus one operation of the rest.

The two axes of a crop, a cutout or a scale have draws of their own, in both authors' code and here: no
parameter is shared between them. In DSA's Siamese mode every image of a class gets the first image's draw; in
evaluation every image has its own.

**Deviations** (authors' code | ours)

- repeating a draw for the real and the synthetic images: the global generator is set to seed, seed + 1, ...
  before each draw, both times (`dsa_idc`: real and synthetic images are augmented as one batch) | a plan,
  drawn once from a generator of the run, is applied as often as needed.
"""

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from ddray.errors import InputError, unknown
from ddray.system.transfer import to_device
from ddray.training.operations import NUM_COLUMNS, OPERATIONS, DsaParams

Variant = Literal["dsa", "dsa_idc"]
FULL_STRATEGY: Final = "color_crop_cutout_flip_scale_rotate"


@dataclass(frozen=True, eq=False)
class DsaPlan:
    """The outcome of a draw: `num` parameter sets.

    Attributes:
        choices: int64 [num] on the CPU, the drawn operation of each set, so that dispatch needs no sync.
        params: float32 [num, 11], uniform draws, independent of the image size.
    """

    choices: Tensor
    params: Tensor

    def __len__(self) -> int:
        return len(self.choices)

    def rows(self, part: slice) -> "DsaPlan":
        """Return the sets of a part of the samples."""
        return DsaPlan(self.choices[part], self.params[part])


class Dsa:
    """A differentiable augmentation with a strategy.

    Args:
        strategy: operation names joined by "_", of color, crop, cutout, flip, scale, rotate.
        variant: which of the two functions (see the module's docstring).
        params: strengths of the operations.

    Raises:
        InputError: an unknown or repeated operation, or an unknown variant.
    """

    def __init__(self, strategy: str, *, variant: Variant = "dsa", params: DsaParams | None = None) -> None:
        names = strategy.split("_")
        for name in names:
            if name not in OPERATIONS:
                raise unknown("DSA operation", name, OPERATIONS)
        if len(set(names)) != len(names):
            raise InputError(f"DSA strategy must name each operation once, got {strategy!r}")
        if variant not in ("dsa", "dsa_idc"):
            raise unknown("DSA variant", variant, ("dsa", "dsa_idc"))
        self.strategy, self.variant, self.params = strategy, variant, params or DsaParams()
        # dsa_idc applies flip and color, then the drawn operation, then cutout.
        first, last = (("flip", "color"), ("cutout",)) if variant == "dsa_idc" else ((), ())
        self._before = [name for name in first if name in names]
        self._after = [name for name in last if name in names]
        self._drawn = [name for name in names if name not in (*first, *last)]

    def draw(self, num: int, generator: torch.Generator, *, shared_op: bool) -> DsaPlan:
        """Draw `num` parameter sets.

        Args:
            num: the number of samples (evaluation) or of classes (Siamese matching).
            generator: a CPU generator; one on a GPU works at the cost of a sync.
            shared_op: one operation for all sets (evaluation: parameters per sample), or one per set
                (Siamese: a fresh draw per class).

        Raises:
            InputError: `num` is below 1.
        """
        if num < 1:
            raise InputError(f"the number of DSA parameter sets must be at least 1, got {num}")
        home, count = generator.device, max(len(self._drawn), 1)
        choices = torch.randint(count, (1 if shared_op else num,), generator=generator, device=home).cpu()
        params = torch.rand(num, NUM_COLUMNS, generator=generator, device=home)
        return DsaPlan(choices.expand(num).contiguous(), params)

    def apply(
        self, images: Tensor, plan: DsaPlan, index: Tensor | None = None, among: slice | None = None
    ) -> Tensor:
        """Return augmented images, in their order and memory format; differentiable with respect to them.

        Args:
            images: [N, C, H, W].
            plan: a draw. Applying one plan to real and synthetic images is what makes the pair Siamese.
            index: int64 [N], the parameter set of each sample, such as its class; None: sample n uses set n.
                On the CPU it saves a device sync.
            among: the sets of a larger batch that these samples are from; gradients are then in its memory
                format, whose sums differ in their last digits. None: `images` are the batch.

        Raises:
            InputError: the plan has no set for a sample.
        """
        sets = self._sets(len(images), plan, index)
        if len(sets) == 0:
            return images
        # Half precision would coarsen offsets and angles; the operations cast what they mix with pixels.
        dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
        params = to_device(plan.params, images.device).to(dtype)
        rows = (
            params[: len(sets)] if index is None else params.index_select(0, to_device(sets, params.device))
        )
        choices = plan.choices[sets]
        drawn = torch.unique_consecutive(choices if among is None else plan.choices[among])
        if len(self._drawn) <= 1 or len(drawn) == 1:
            augmented = self._chain(images, rows, sets, int(choices[0]))
        else:
            is_sorted = len(drawn) == len(drawn.unique())
            augmented = self._by_choice(images, rows, sets, choices, is_sorted=is_sorted)
        if _is_channels_last(images) and not _is_channels_last(augmented):
            augmented = augmented.contiguous(memory_format=torch.channels_last)
        return augmented

    def _sets(self, num: int, plan: DsaPlan, index: Tensor | None) -> Tensor:
        """Return each sample's parameter set, int64 [num] on the CPU."""
        sets = torch.arange(num) if index is None else index.cpu()
        if len(sets) != num or (num and (int(sets.min()) < 0 or int(sets.max()) >= len(plan))):
            raise InputError(
                f"DSA needs one of the plan's {len(plan)} parameter sets for each of {num} images"
            )
        return sets

    def _by_choice(
        self, images: Tensor, rows: Tensor, sets: Tensor, choices: Tensor, *, is_sorted: bool
    ) -> Tensor:
        """Augment the samples of each drawn operation together, and return them in the original order.

        `is_sorted`: those of an operation follow each other.
        """
        if is_sorted:  # slices are views, nothing is gathered
            run_choices, lengths = torch.unique_consecutive(choices, return_counts=True)
            split = (torch.split(tensor, lengths.tolist()) for tensor in (images, rows, sets))
            parts = zip(*split, run_choices.tolist(), strict=True)
            return torch.cat([self._chain(*part) for part in parts])
        order = torch.argsort(choices, stable=True)
        there, back = to_device(torch.stack([order, torch.argsort(order)]), images.device)
        images, rows = images.index_select(0, there), rows.index_select(0, there)
        parted = self._by_choice(images, rows, sets[order], choices[order], is_sorted=True)
        return parted.index_select(0, back)

    def _chain(self, images: Tensor, rows: Tensor, sets: Tensor, choice: int) -> Tensor:
        """Apply the fixed operations and the drawn one to samples that share the choice.

        `rows` [n, 11] are the samples' parameters, `sets` int64 [n] on the CPU whose they are.
        """
        if bool((sets == sets[0]).all()):
            rows = rows[:1]
        for name in (*self._before, *self._drawn[choice : choice + 1], *self._after):
            images = OPERATIONS[name](images, rows, self.params)
        return images


def _is_channels_last(images: Tensor) -> bool:
    """Whether the images are channels-last and not also in the default order."""
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def dsa_for(can_flip: bool, variant: Variant = "dsa") -> Dsa:
    """Return the papers' augmentation, without flip where a mirrored image changes its class."""
    return Dsa(FULL_STRATEGY if can_flip else FULL_STRATEGY.replace("flip_", ""), variant=variant)


def siamese(
    can_flip: bool, variant: Literal["dsa", "dsa_idc", "none"], strategy: str | None = None
) -> Dsa | None:
    """Return the augmentation by its settings' names; None if no operation is left.

    Args:
        can_flip: whether a mirrored image keeps its class; if not, flips are dropped.
        variant: which of the two functions; `none` gives None.
        strategy: operations joined by "_"; None: all of them.

    Raises:
        InputError: the strategy names an unknown operation.
    """
    if variant == "none":
        return None
    if strategy is None:
        return dsa_for(can_flip, variant)
    names = [name for name in strategy.split("_") if can_flip or name != "flip"]
    return Dsa("_".join(names), variant=variant) if names else None
