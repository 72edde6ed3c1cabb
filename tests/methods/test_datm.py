"""DATM: the range of starts, labels from experts that are right, learned logits, the threshold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray import api
from ddray.errors import InputError
from ddray.jobs.plan import resolve
from ddray.methods.datm import DATMConfig
from ddray.methods.families.right_images import first_right, mean_right_logits
from ddray.methods.families.trajectories import soft_cross_entropy
from ddray.nets import build_net
from ddray.testing import random_dataset
from tests.methods.test_mtt import METHOD, started


def config_of(**changes: Any) -> DATMConfig:
    return DATMConfig.parse({"experts": {"epochs": 100}, **changes})


class TestStarts:
    def test_their_bound_grows_linearly_to_its_last_value(self) -> None:
        """U(i) = T + floor((T+ - T) i / I_end): 10, 11 from 100 on, ..., 19 from 900 on, 20 from 1,000 on."""
        config = config_of(min_start=3, first_max_start=10, max_start=20, grow_steps=1000)
        steps = (0, 99, 100, 199, 950, 999, 1000, 5000)
        bounds = [config.starts(step).stop for step in steps]
        assert bounds == [10, 10, 11, 11, 19, 19, 20, 20]
        assert {config.starts(step).start for step in steps} == {3}

    def test_without_growth_it_is_max_start(self) -> None:
        assert config_of(min_start=40, max_start=60).starts(0) == range(40, 60)
        above = config_of(min_start=2, first_max_start=9, max_start=8, grow_steps=10)
        assert above.starts(0) == range(2, 8)

    @pytest.mark.parametrize("starts", [(5, None, 5), (8, 9, 8), (4, 4, 8)])
    def test_an_empty_range_is_refused(self, starts: tuple[int, int | None, int]) -> None:
        names = ("min_start", "first_max_start", "max_start")
        growth = {} if starts[1] is None else {"grow_steps": 10}
        with pytest.raises(InputError, match=r"min_start must be < (first_)?max_start = "):
            config_of(**dict(zip(names, starts, strict=True)), **growth)

    @pytest.mark.parametrize(
        ("growth", "values"),
        [({"first_max_start": 1, "grow_steps": 0}, "1 and 0"), ({"grow_steps": 9}, "none and 9")],
    )
    def test_half_of_a_growth_is_refused(self, growth: dict[str, int], values: str) -> None:
        with pytest.raises(InputError, match=f"first_max_start and grow_steps must be .* got {values}"):
            config_of(max_start=4, **growth)


@pytest.mark.parametrize("ipc", [1, 10])
def test_a_search_may_start_earlier_and_end_earlier_than_the_preset(ipc: int) -> None:
    forecast = api.forecast_tune("datm", dataset="digits", ipc=ipc, num_samples=3, gpus_per_trial=0)
    assert forecast.num_samples == 3


def test_a_search_that_its_protocol_can_not_score_is_refused_before_it_starts() -> None:
    search: dict[str, Any] = {"dataset": "digits", "ipc": 1, "num_samples": 3, "gpus_per_trial": 0}
    with pytest.raises(InputError, match=r"needs a set with a schedule, .* got one of method datm without"):
        api.forecast_tune("datm", protocol="steps", **search)
    assert (
        api.forecast_tune("datm", protocol="steps", sets=("evaluate.rate=0.02",), **search).num_samples == 3
    )
    assert api.forecast_tune("dd", protocol="steps", **search).num_samples == 3


class TestRightImages:
    LABELS = torch.tensor([0, 1, 0, 1, 0, 1, 0, 2])
    EXPERTS = torch.randn(3, 8, 3, generator=torch.Generator().manual_seed(6)).double()
    ORDER = torch.tensor([6, 1, 0, 3, 2, 7, 5, 4])

    def experts(self) -> list[Any]:
        return [lambda rows, logits=logits: logits[rows] for logits in self.EXPERTS]

    def chosen_by_loops(self, ipc: int) -> list[int]:
        """Class by class, expert by expert, image by image; then the rest, then copies."""
        rows: list[int] = []
        for label in range(3):
            members = [int(row) for row in self.ORDER if self.LABELS[row] == label]
            ranked: list[int] = []
            for logits in self.EXPERTS:
                for row in members:
                    if int(logits[row].argmax()) == label and row not in ranked:
                        ranked.append(row)
                if len(ranked) >= min(ipc, len(members)):
                    break
            ranked += [row for row in members if row not in ranked]
            rows += [ranked[column % len(ranked)] for column in range(ipc)]
        return rows

    @pytest.mark.parametrize("ipc", [1, 2, 3, 4])
    def test_rows_are_those_of_loops_over_experts(self, ipc: int) -> None:
        """Also where too few images of a class are right for any expert, or there are too few."""
        rows, is_copy = first_right(self.experts(), self.LABELS, ipc, self.ORDER)
        assert rows.tolist() == self.chosen_by_loops(ipc)
        assert self.LABELS[rows].tolist() == [label for label in range(3) for _ in range(ipc)]
        assert is_copy.tolist() == [c >= n for n in (4, 3, 1) for c in range(ipc)]

    def test_a_label_is_the_mean_of_all_experts_that_are_right(self) -> None:
        rows = torch.arange(8)
        logits = mean_right_logits(self.experts(), rows, self.LABELS)
        checked = 0
        for row, label in enumerate(self.LABELS.tolist()):
            right = [each[row] for each in self.EXPERTS if int(each[row].argmax()) == label]
            if right:
                torch.testing.assert_close(logits[row], torch.stack(right).mean(0))
                checked += 1
        assert 0 < checked < 8
        assert torch.equal(logits.argmax(1), self.LABELS)

    def test_where_no_expert_is_right_the_class_takes_the_largest_value(self) -> None:
        experts = [lambda rows: torch.tensor([[3.0, 1.0, 0.0]]), lambda rows: torch.tensor([[1.0, 2.0, 3.0]])]
        logits = mean_right_logits(experts, torch.tensor([0]), torch.tensor([1]))
        assert logits.tolist() == [[1.5, 2.0, 1.5]]
        assert mean_right_logits(experts, torch.tensor([0]), torch.tensor([2])).tolist() == [[1.0, 2.0, 3.0]]


def test_soft_cross_entropy_is_that_of_probabilities() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    expected = F.cross_entropy(logits, labels.softmax(1))
    torch.testing.assert_close(soft_cross_entropy(logits, labels), expected)


def test_the_initial_set_is_right_for_experts_and_holds_their_logits(planned: Any) -> None:
    ctx, distiller = started(planned, "datm", experts={**METHOD["experts"], "epochs": 40, "lr": 0.1})
    distilled, entries = distiller.snapshot(), ctx.pool.get(distiller.pool_specs(ctx))
    assert distilled.meta.label_kind == "logits"
    assert distilled.labels.tolist() == [0, 0, 1, 1, 2, 2]
    nets = [build_net("convnet1_w8", ctx.dataset.image_shape, 3, seed=0).eval() for _ in entries]
    totals: list[Tensor] = []
    for net, entry in zip(nets, entries, strict=True):
        torch.nn.utils.vector_to_parameters(entry.tensors["snapshots"][-1].clone(), net.parameters())
        totals.append(net(distilled.images).detach())
    assert distilled.soft_labels is not None
    right = torch.stack([logits.argmax(1) == distilled.labels for logits in totals])
    assert right.any(0).all()
    means = (torch.stack(totals) * right[..., None]).sum(0) / right.sum(0)[:, None]
    torch.testing.assert_close(distilled.soft_labels, means, rtol=1e-4, atol=1e-4)


def test_random_images_take_the_first_experts_logits(planned: Any) -> None:
    ctx, distiller = started(planned, "datm", init="random")
    entry, _ = ctx.pool.get(distiller.pool_specs(ctx))
    net = build_net("convnet1_w8", ctx.dataset.image_shape, 3, seed=0).eval()
    torch.nn.utils.vector_to_parameters(entry.tensors["snapshots"][-1].clone(), net.parameters())
    distilled = distiller.snapshot()
    assert distilled.soft_labels is not None
    torch.testing.assert_close(distilled.soft_labels, net(distilled.images).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("threshold", [1e-9, 1e9])
def test_an_iteration_above_the_threshold_changes_nothing(planned: Any, threshold: float) -> None:
    _, distiller = started(planned, "datm", threshold=threshold)
    before = distiller.state_dict()
    loss = distiller.step()["loss"]
    after = distiller.state_dict()
    is_skipped = bool(loss > threshold)
    for name in ("images", "soft_labels", "rate"):
        for part in ("value", "velocity"):
            assert torch.equal(after[name][part], before[name][part]) == is_skipped
    assert distiller.measures == {"skipped": float(is_skipped)}
    assert is_skipped == (threshold < 1)


def test_a_student_that_explodes_is_skipped(planned: Any) -> None:
    """After an iteration that was not, so that there are momenta to keep."""
    _, distiller = started(planned, "datm", threshold=1e9)
    distiller.step()
    distiller._engine._rate.value.fill_(1e30)
    before = distiller.state_dict()
    assert distiller.step()["loss"] == 1e9
    after = distiller.state_dict()
    for name in ("images", "soft_labels", "rate"):
        assert before[name]["velocity"].abs().max() > 0
        assert all(torch.equal(after[name][part], value) for part, value in before[name].items())


def test_labels_move_by_their_own_rate_and_momentum(planned: Any) -> None:
    """Two steps by hand: v = .9 v + g, y = y - lr v."""
    _, distiller = started(planned, "datm", lr_label=0.5, threshold=1e9)
    soft = distiller._engine._soft
    values, velocities = [soft.value.clone()], []
    for _ in range(2):
        distiller.step()
        values.append(soft.value.clone())
        velocities.append(soft.velocity.clone())
    assert velocities[0].abs().max() > 0
    torch.testing.assert_close(values[1], values[0] - 0.5 * velocities[0])
    torch.testing.assert_close(values[2], values[1] - 0.5 * velocities[1])


@pytest.mark.parametrize(
    ("preset", "dataset", "size", "ipc", "expected"),
    [
        ("repo", "cifar10", 32, 1, (80, 0, None, 4, 0, 10, 5.0, 100.0, 1e-7, 1.1)),
        ("repo", "cifar10", 32, 5, (80, 0, None, 4, 0, None, 5.0, 100.0, 1e-7, 1.1)),
        ("repo", "cifar10", 32, 10, (80, 0, 10, 20, 1000, 100, 2.0, 100.0, 1e-5, 1.0)),
        ("repo", "tiny_imagenet", 64, 10, (40, 10, None, 50, 0, 500, 10.0, 100.0, 1e-4, 1.0)),
        ("paper", "tiny_imagenet", 64, 10, (60, 10, None, 50, 0, 250, 10.0, 100.0, 1e-4, 1.0)),
    ],
)
def test_presets_are_those_of_the_table(
    preset: str, dataset: str, size: int, ipc: int, expected: tuple[Any, ...]
) -> None:
    data = random_dataset((ipc,) * 10, (3, size, size), name=dataset)
    config = resolve("datm", data, ipc=ipc, preset=preset).config
    method = config.method
    starts = (method.min_start, method.first_max_start, method.max_start, method.grow_steps)
    rates = (method.lr_label, method.lr_img, method.lr_lr, method.threshold)
    assert (method.inner_steps, *starts, method.batch_syn, *rates) == expected
    assert (method.experts.epochs, method.experts.rho, method.experts.alpha) == (100, 0.01, 0.3)
    assert (config.evaluate.lr, config.evaluate.batch, config.pixel_space) == ("learned", 128, "zca")
