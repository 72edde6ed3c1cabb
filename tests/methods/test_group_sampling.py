from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from ddray.errors import InputError
from ddray.methods.families.diffusion import groups as _group_sampling
from ddray.methods.families.diffusion.groups import _draws, block_rows, group_sample, group_scores

CPU = torch.device("cpu")


def population(dim: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(dim, generator=generator), torch.rand(dim, generator=generator) + 0.5


def candidates(mean: torch.Tensor, std: torch.Tensor, ipc: int, num: int, seed: int) -> np.ndarray[Any, Any]:
    """Return all candidates [num, ipc, D], materialised."""
    rows = block_rows(len(mean), CPU)
    blocks = [
        torch.stack([draw.clone() for draw in _draws(seed, block, rows, mean, ipc)], 1)
        for block in range(math.ceil(num / rows))
    ]
    return (mean + std * torch.cat(blocks)[:num]).double().numpy()


def paper_score(group: Any, mean: Any, std: Any, weights: tuple[float, float, float]) -> float:
    """Eq 5-8 for one group [n, D], dimension by dimension."""
    n, total = len(group), 0.0
    for d in range(group.shape[1]):
        x, mu, sigma = group[:, d], mean[d], std[d]
        total += weights[0] * (sum(x) / n - mu) ** 2
        total += weights[1] * (math.sqrt(sum((x - mu) ** 2) / n) - sigma) ** 2
        if n > 2:
            skew = n / ((n - 1) * (n - 2)) * sum(((x - mu) / sigma) ** 3)
            total += weights[2] * skew**2
    return float(total)


def repo_score(group: Any, mean: Any, std: Any, weights: tuple[float, float, float]) -> float:
    """The authors' code's score for one group: norms; cubes standardised over the group, summed over D."""
    n, d = group.shape
    centre = sum(group) / n
    total = weights[0] * np.linalg.norm(centre - mean)
    if n == 1:
        return float(total)
    deviation = np.sqrt(sum((latent - centre) ** 2 for latent in group) / (n - 1))
    total += weights[1] * np.linalg.norm(deviation - std)
    skews = [d / ((d - 1) * (d - 2)) * sum(((latent - centre) / deviation) ** 3) for latent in group]
    return float(total + weights[2] * math.sqrt(sum(skew**2 for skew in skews)))


@pytest.mark.parametrize("form", ["paper", "repo"])
@pytest.mark.parametrize(("ipc", "dim"), [(1, 40), (2, 40), (3, 40), (10, 256), (4, 4096)])
def test_it_picks_the_brute_force_winner(form: Any, ipc: int, dim: int) -> None:
    mean, std = population(dim)
    weights = (1.0, 0.7, 0.5)
    num = 60
    generator = torch.Generator().manual_seed(3)
    naive = paper_score if form == "paper" else repo_score
    groups = candidates(mean, std, ipc, num, 3)
    scores = [naive(group, mean.double().numpy(), std.double().numpy(), weights) for group in groups]

    latents, score = group_sample(
        mean, std, ipc=ipc, num_candidates=num, generator=generator, weights=weights, form=form
    )

    best = int(np.argmin(scores))
    assert latents.shape == (ipc, dim)
    assert torch.equal(latents.double(), torch.from_numpy(groups[best]))
    assert score == pytest.approx(scores[best], rel=1e-6)
    assert sorted(scores)[1] > sorted(scores)[0]


@pytest.mark.parametrize("form", ["paper", "repo"])
def test_the_definition_of_a_score_is_the_naive_one(form: Any) -> None:
    mean, std = population(7)
    groups = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    naive = paper_score if form == "paper" else repo_score

    scores = group_scores(groups, mean.double(), std.double(), weights=(1.0, 2.0, 3.0), form=form)

    expected = [
        naive(group.numpy(), mean.double().numpy(), std.double().numpy(), (1.0, 2.0, 3.0)) for group in groups
    ]
    assert scores.tolist() == pytest.approx(expected, rel=1e-9)


def test_candidates_do_not_depend_on_their_number_nor_on_the_chunk_nor_on_threads() -> None:
    mean, std = population(100)
    rows = block_rows(100, CPU)
    counts = (1, 2, rows - 1, rows, rows + 1, 3 * rows + 5)

    def run(num: int, chunk: int | None = None) -> tuple[torch.Tensor, float]:
        generator = torch.Generator().manual_seed(11)
        return group_sample(mean, std, ipc=3, num_candidates=num, generator=generator, chunk=chunk)

    results = [run(num) for num in counts]
    scores = [score for _, score in results]
    assert scores == sorted(scores, reverse=True)
    for num, (latents, score) in zip(counts, results, strict=True):
        for chunk in (1, rows, 2 * rows + 1, 10**6):
            again, same = run(num, chunk)
            assert same == score
            assert torch.equal(again, latents)
    torch.set_num_threads(2)
    try:
        again, same = run(counts[-1], 1)
    finally:
        torch.set_num_threads(1)
    assert same == scores[-1]
    assert torch.equal(again, results[-1][0])


def test_the_generator_gives_its_seed_and_is_left_alone() -> None:
    mean, std = population(16)
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()

    first = group_sample(mean, std, ipc=2, num_candidates=9, generator=generator)[0]
    second = group_sample(mean, std, ipc=2, num_candidates=9, generator=generator)[0]
    other = group_sample(mean, std, ipc=2, num_candidates=9, generator=torch.Generator().manual_seed(6))[0]

    assert torch.equal(generator.get_state(), before)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_one_candidate_is_a_plain_draw_from_the_class() -> None:
    mean, std = population(4096)

    latents, _ = group_sample(mean, std, ipc=50, num_candidates=1, generator=torch.Generator().manual_seed(0))

    z = (latents - mean) / std
    assert float(z.mean()) == pytest.approx(0, abs=0.01)
    assert float(z.std()) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("form", ["paper", "repo"])
def test_a_dimension_without_variance_stays_where_it_is(form: Any) -> None:
    mean, std = torch.arange(8.0), torch.zeros(8)

    latents, score = group_sample(
        mean, std, ipc=3, num_candidates=4, generator=torch.Generator().manual_seed(0), form=form
    )

    assert torch.equal(latents, mean.expand(3, 8))
    assert math.isfinite(score)


SPREADS = {
    "one flat": (torch.zeros(40), torch.tensor([1.0] + [0.0] * 39)),
    "one flat off 0": (torch.full((40,), 3.0), torch.tensor([1.0] + [0.0] * 39)),
    "below float32": (torch.full((40,), 1000.0), torch.tensor([1.0] * 10 + [1e-5] * 30)),
    "a few steps of float32": (torch.full((40,), 1000.0), torch.tensor([1.0] * 10 + [3e-4] * 30)),
}


@pytest.mark.parametrize("form", ["paper", "repo"])
@pytest.mark.parametrize("spread", SPREADS)
def test_dimensions_of_little_variance_do_not_spoil_the_choice(form: Any, spread: str) -> None:
    """Streamed scores must be those of the actual latents, or more candidates can score worse."""
    mean, std = SPREADS[spread]
    groups = torch.from_numpy(candidates(mean, std, 4, 200, 3))
    exact = group_scores(groups, mean.double(), std.double(), form=form)
    varying = ~(std <= 2**-23 * mean.abs())
    if form == "paper":
        narrow = [
            paper_score(
                group[:, varying].numpy(),
                mean[varying].double().numpy(),
                std[varying].double().numpy(),
                (1, 1, 0.5),
            )
            for group in groups
        ]
        assert exact.tolist() == pytest.approx(narrow, rel=1e-5, abs=1e-8)

    scores = []
    for num in (1, 20, 200):
        generator = torch.Generator().manual_seed(3)
        latents, score = group_sample(mean, std, ipc=4, num_candidates=num, generator=generator, form=form)
        assert torch.equal(latents.double(), groups[exact[:num].argmin()])
        scores.append(score)

    assert scores == sorted(scores, reverse=True)


def test_work_that_waits_does_not_grow_with_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code's 5e9 candidates are 1.2 million tasks."""
    ahead, most = 0, 0

    def work(start: int) -> int:
        return -start

    class Counted(ThreadPoolExecutor):
        def submit(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal ahead, most
            ahead += 1
            most = max(most, ahead)
            return super().submit(*args, **kwargs)

    monkeypatch.setattr(_group_sampling, "ThreadPoolExecutor", Counted)
    values = []
    for value in _group_sampling._in_order(work, range(3000), 2):
        ahead -= 1
        values.append(value)

    assert values == [-start for start in range(3000)]
    assert most <= 10


def test_the_search_takes_its_work_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, std = population(100)
    real, seen = _group_sampling._in_order, []

    def watched(work: Any, starts: Any, workers: int) -> Any:
        seen.append(len(starts))
        return real(work, starts, workers)

    monkeypatch.setattr(_group_sampling, "_in_order", watched)
    generator = torch.Generator().manual_seed(0)
    group_sample(mean, std, ipc=2, num_candidates=20_000, generator=generator, chunk=1)
    assert seen == [math.ceil(20_000 / block_rows(100, CPU))]


def test_a_weight_of_zero_leaves_its_term_out() -> None:
    mean, std = population(50)
    settings = {"ipc": 5, "num_candidates": 300}
    groups = torch.from_numpy(candidates(mean, std, 5, 300, 1))

    latents, score = group_sample(
        mean, std, **settings, generator=torch.Generator().manual_seed(1), weights=(1.0, 0.0, 0.0)
    )

    errors = (groups.mean(1) - mean).square().sum(1)
    assert score == pytest.approx(float(errors.min()), rel=1e-5)
    assert torch.equal(latents.double(), groups[errors.argmin()])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mean": torch.zeros(3, 2)}, "group sampling takes mean"),
        ({"std": torch.ones(4)}, "group sampling takes mean"),
        ({"std": -torch.ones(3)}, "std >= 0"),
        ({"mean": torch.full((3,), torch.nan)}, "a finite mean"),
        ({"ipc": 0}, "ipc and num_candidates must be >= 1"),
        ({"num_candidates": 0}, "ipc and num_candidates must be >= 1"),
        ({"weights": (1.0, -1.0, 0.0)}, "three numbers >= 0"),
        ({"form": "papr"}, "did you mean 'paper'"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], reason: str) -> None:
    settings = {
        "mean": torch.zeros(3),
        "std": torch.ones(3),
        "ipc": 2,
        "num_candidates": 2,
        "generator": torch.Generator(),
        **changes,
    }
    with pytest.raises(InputError, match=reason):
        group_sample(settings.pop("mean"), settings.pop("std"), **settings)


def test_a_block_is_by_the_kind_of_device_and_bounded_on_a_gpu() -> None:
    """Never by free memory: candidates depend on it. The authors' form holds all latents of a group."""
    gpu = torch.device("cuda", 3)
    assert block_rows(256, CPU) == block_rows(256, CPU, samples=1000) == 127
    assert block_rows(256, gpu) == block_rows(256, gpu, samples=16) == 2**15
    assert block_rows(256, gpu, samples=64) * 64 * 256 == 2**27
    assert block_rows(2**20, gpu, samples=1000) == 1
