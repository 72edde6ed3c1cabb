"""D3HR's group sampling (Eq 5-9): of `num_candidates` groups of `ipc` Gaussian latents, the best one.

Candidates are not kept: a block of them is drawn sample by sample into one buffer, three running sums per
dimension give its scores (the authors' form needs the block's groups), and across blocks only the best
candidate's index is kept. Each block has its own generator, so a candidate depends only on the seed and its
index, and the winner is drawn again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Final, Literal, TypeVar

import torch
from torch import Tensor

from ddray.errors import InputError, unknown
from ddray.seeding import derive_seed

Form = Literal["paper", "repo"]
Weights = tuple[float, float, float]
Result = TypeVar("Result")

# Elements of a buffer, fixed for a type of device: a candidate's draws depend on it. On a CPU the five
# buffers of a block stay in the L2 cache, and each operation stays below the size at which torch uses several
# threads: whole blocks are distributed over threads instead. On a GPU one on 32 MiB outlasts its launch.
_BLOCK: Final = {"cpu": 2**15 - 1, "cuda": 2**23}
_GROUPS: Final = 2**27  # elements of a block's whole groups, at most, on a GPU: 512 MiB
_CHUNK: Final = 4096


def group_sample(
    mean: Tensor,
    std: Tensor,
    *,
    ipc: int,
    num_candidates: int,
    generator: torch.Generator,
    weights: Weights = (1.0, 1.0, 0.5),
    form: Form = "paper",
    chunk: int | None = None,
) -> tuple[Tensor, float]:
    """Return the best of `num_candidates` groups of `ipc` draws from N(mean, std^2), and its score.

    Candidate j is the same whatever `num_candidates` and `chunk` are: more candidates never score worse.

    Args:
        mean: [D] of the class's latents, on the device to compute on.
        std: [D], >= 0.
        ipc: latents in a group; those returned are [ipc, D].
        num_candidates: m, >= 1; 1 is plain random sampling.
        generator: only its initial seed is used; its state does not change.
        weights: of mean, standard deviation and skewness (Eq 5).
        form: `paper` | `repo`, see `group_scores`.
        chunk: candidates scored before the best of them is taken, in whole blocks: one thread's task on a
            CPU, the work between two syncs on a GPU.

    Raises:
        InputError: shapes do not fit, or a number is out of range.
    """
    latents, score = best_group(
        mean,
        std,
        ipc=ipc,
        num_candidates=num_candidates,
        generator=generator,
        weights=weights,
        form=form,
        chunk=chunk,
    )
    return latents, float(score)


def best_group(
    mean: Tensor,
    std: Tensor,
    *,
    ipc: int,
    num_candidates: int,
    generator: torch.Generator,
    weights: Weights = (1.0, 1.0, 0.5),
    form: Form = "paper",
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `group_sample` does, the score as a float64 scalar on the device.

    A GPU is waited for twice: for facts about mean and deviation, and for the number of the best candidate.
    """
    _check(mean, std, ipc, num_candidates, weights, form)
    mean, std = mean.detach().float().contiguous(), std.detach().float().contiguous()
    seed, rows = generator.initial_seed(), block_rows(len(mean), mean.device, ipc if form == "repo" else 1)
    score = _paper_scorer if form == "paper" else _repo_scorer
    scorer = partial(score, mean, std, ipc, weights, rows, _rounded(mean, std))
    best_index = _best_candidate(scorer, seed, mean, ipc, num_candidates, rows, chunk)
    block, row = divmod(best_index, rows)
    normal = torch.stack([draw[row].clone() for draw in _draws(seed, block, rows, mean, ipc)])
    latents = mean + std * normal
    exact = group_scores(latents[None].double(), mean.double(), std.double(), weights=weights, form=form)
    return latents, exact[0]


def _best_candidate(
    scorer: Callable[[], Scorer],
    seed: int,
    mean: Tensor,
    ipc: int,
    num_candidates: int,
    rows: int,
    chunk: int | None,
) -> int:
    """Return the index of the best candidate, `rows` a block; `scorer` makes one for a thread."""
    dim = len(mean)
    blocks = math.ceil(num_candidates / rows)
    threads = torch.get_num_threads() if mean.device.type == "cpu" else 1
    step = max(1, math.ceil((chunk or _CHUNK) / rows))
    if threads > 1 and chunk is None:  # few candidates of many dimensions: keep every thread busy
        step = min(step, math.ceil(blocks / (4 * threads)))

    def best_of(first: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            scores = scorer()
            buffer = torch.empty(rows, dim, device=mean.device)  # reused: new ones would pile up
            indices = range(first, min(first + step, blocks))
            block_scores = [scores(_draws(seed, block, rows, mean, ipc, buffer)) for block in indices]
            best = torch.cat(block_scores)[: num_candidates - first * rows].min(0)
            return best.values, best.indices + first * rows

    starts = range(0, blocks, step)
    best_score = torch.full((), math.inf, device=mean.device)
    best_index = torch.zeros((), dtype=torch.int64, device=mean.device)
    for value, index in _in_order(best_of, starts, min(len(starts), threads)):  # ties: the first wins
        best_index = torch.where(value < best_score, index, best_index)
        best_score = torch.minimum(value, best_score)
    return int(best_index)


def group_scores(
    latents: Tensor, mean: Tensor, std: Tensor, *, weights: Weights = (1.0, 1.0, 0.5), form: Form = "paper"
) -> Tensor:
    """Return the scores [M] of groups `latents` [M, n, D], by definition; lower is more representative.

    `paper`: the sum over dimensions of w1 (mean error)^2 + w2 (error of the standard deviation about the
    population mean)^2 + w3 skewness^2 over the group (Eq 6-8). `repo`: w1 ||mean error|| + w2 ||error of the
    unbiased standard deviation|| + w3 ||skewness||, where a latent's skewness is the sum over dimensions of
    ((x - the group's mean) / the group's deviation)^3, times D / ((D - 1) (D - 2)): the axes of the code. A
    term that its number of samples leaves undefined (skewness below 3, in the form `repo` deviation and
    skewness below 2) is dropped; the skewness leaves out a dimension whose deviation is below the resolution
    of float32. `mean` and `std` [D] are the population's, `weights` are (w1, w2, w3).
    """
    num, dim = latents.shape[1:]
    mean_error = latents.mean(1) - mean
    flat = _flat(mean, std)
    if form == "repo":
        total: Tensor = weights[0] * mean_error.norm(dim=1)
        if num == 1:
            return total
        deviation, centre = torch.std_mean(latents, 1, keepdim=True)
        total = total + weights[1] * (deviation[:, 0] - std).norm(dim=1)
        if dim > 2:
            spread = deviation.clamp(min=torch.finfo(latents.dtype).tiny)
            cubes = ((latents - centre) / spread).masked_fill(flat, 0).pow(3).sum(2)
            total = total + weights[2] * (_skewness_factor(dim) * cubes).norm(dim=1)
        return total
    total = weights[0] * mean_error.square().sum(1)  # Eq 6
    deviation = (latents - mean).square().mean(1).sqrt()
    total = total + weights[1] * (deviation - std).square().sum(1)  # Eq 7
    if num > 2:
        normal = ((latents - mean) / torch.where(flat, 1, std)).masked_fill(flat, 0)
        total = total + weights[2] * (_skewness_factor(num) * normal.pow(3).sum(1)).square().sum(1)  # Eq 8
    return total


def _in_order(work: Callable[[int], Result], starts: Sequence[int], workers: int) -> Iterator[Result]:
    """Yield `work(start)` of each start in order; threads run only a few tasks ahead."""
    if workers <= 1:
        yield from map(work, starts)
        return
    with ThreadPoolExecutor(workers) as threads:
        ahead: deque[Future[Result]] = deque()
        for start in starts:
            ahead.append(threads.submit(work, start))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def block_rows(dim: int, device: torch.device, samples: int = 1) -> int:
    """Return how many candidates share a generator: by D, the type of device, and `samples`.

    The form `repo` holds that many latents of each candidate at once, which a GPU's memory bounds.
    """
    size = _BLOCK.get(device.type, _BLOCK["cpu"])
    if device.type == "cuda":
        size = min(size, _GROUPS // samples)
    return max(1, size // dim)


def _check(mean: Tensor, std: Tensor, ipc: int, num_candidates: int, weights: Weights, form: str) -> None:
    if mean.ndim != 1 or len(mean) == 0 or std.shape != mean.shape or std.device != mean.device:
        raise InputError(
            f"group sampling takes mean [D] and std [D] on one device, got {list(mean.shape)} on "
            f"{mean.device} and {list(std.shape)} on {std.device}"
        )
    if ipc < 1 or num_candidates < 1:
        raise InputError(f"ipc and num_candidates must be >= 1, got {ipc} and {num_candidates}")
    if len(weights) != 3 or min(weights) < 0:
        raise InputError(f"weights must be three numbers >= 0, got {weights}")
    if form not in ("paper", "repo"):
        raise unknown("form", form, ("paper", "repo"))


def _draws(
    seed: int, block: int, rows: int, like: Tensor, ipc: int, buffer: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield a block's standard normal draws, latent after latent of each group, in one buffer [rows, D]."""
    generator = torch.Generator(like.device).manual_seed(derive_seed(seed, "group", block))
    buffer = torch.empty(rows, len(like), device=like.device) if buffer is None else buffer
    for _ in range(ipc):
        yield buffer.normal_(generator=generator)


def _flat(mean: Tensor, std: Tensor) -> Tensor:
    """Return the mask [D] of dimensions without skewness: in float32 their latents equal the mean."""
    return std <= torch.finfo(torch.float32).eps * mean.abs()


def _rounded(mean: Tensor, std: Tensor) -> Callable[[Tensor], None]:
    """Return a function that replaces draws z [rows, D] by those of the rounded latents mean + std z.

    Far from 0 a small deviation spans only a few float32 steps, so the cubes of the rounded draws differ from
    those of z. Such dimensions are rare; all others are left alone.

    Raises:
        InputError: mean or deviation is not finite, or a deviation is negative.
    """
    is_coarse = (std < 2**-10 * mean.abs()) & ~_flat(mean, std)
    is_valid = torch.isfinite(mean) & torch.isfinite(std) & (std >= 0)
    any_coarse, all_valid = torch.stack([is_coarse.any(), is_valid.all()]).tolist()
    if not all_valid:
        raise InputError("group sampling takes a finite mean and a finite std >= 0")
    if not any_coarse:
        return lambda z: None
    coarse = torch.nonzero(is_coarse).flatten()
    centre, spread = mean[coarse], std[coarse]

    def apply(z: Tensor) -> None:
        z[:, coarse] = ((centre + spread * z[:, coarse]) - centre) / spread

    return apply


Scorer = Callable[[Iterator[Tensor]], Tensor]


def _paper_scorer(
    mean: Tensor, std: Tensor, ipc: int, weights: Weights, rows: int, rounded: Callable[[Tensor], None]
) -> Scorer:
    """Return a function from a block's draws to its scores [rows]; with x = mean + std z only z matters."""
    first, second, third, square = (torch.empty(rows, len(mean), device=mean.device) for _ in range(4))
    first_weight, second_weight = std.square() * (weights[0] / ipc**2), std.square() * weights[1]
    skewed = ipc > 2 and weights[2] > 0
    third_weight = (~_flat(mean, std)).float() * (weights[2] * _skewness_factor(ipc) ** 2) if skewed else None

    def scores(draws: Iterator[Tensor]) -> Tensor:
        for sample, z in enumerate(draws):
            rounded(z)
            if sample == 0:
                first.copy_(z)
                torch.mul(z, z, out=second)
                if skewed:
                    torch.mul(second, z, out=third)
                continue
            first.add_(z)
            torch.mul(z, z, out=square)
            second.add_(square)
            if skewed:
                third.addcmul_(square, z)
        total = first.square_() @ first_weight  # Eq 6
        second.mul_(1 / ipc).sqrt_().sub_(1)
        total += second.square_() @ second_weight  # Eq 7
        if third_weight is not None:
            total += third.square_() @ third_weight  # Eq 8
        return total

    return scores


def _repo_scorer(
    mean: Tensor, std: Tensor, ipc: int, weights: Weights, rows: int, rounded: Callable[[Tensor], None]
) -> Scorer:
    """Return the same for the form of the authors' code, which needs a block's whole groups [n, rows, D]."""
    dim, variance, varying = len(mean), std.square(), (~_flat(mean, std)).float()
    group = torch.empty(ipc, rows, dim, device=mean.device)

    def scores(draws: Iterator[Tensor]) -> Tensor:
        for sample, z in enumerate(draws):
            rounded(z)
            group[sample].copy_(z)
        centre = group.mean(0)
        total = weights[0] * (centre.square() @ variance).sqrt()
        if ipc == 1:
            return total
        deviation = torch.linalg.vector_norm(group.sub_(centre), dim=0) / math.sqrt(ipc - 1)
        total += weights[1] * ((deviation - 1).square() @ variance).sqrt()
        if dim > 2 and weights[2] > 0:
            group.mul_(varying / deviation.clamp_(min=torch.finfo(group.dtype).tiny)).pow_(3)
            total += weights[2] * _skewness_factor(dim) * torch.linalg.vector_norm(group.sum(2), dim=0)
        return total

    return scores


def _skewness_factor(num: int) -> float:
    """Return n / ((n - 1) (n - 2)) of the adjusted skewness."""
    return num / ((num - 1) * (num - 2))
