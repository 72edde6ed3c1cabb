"""Protocol `steps`: the steps by hand, one rate for other sets, what is refused."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet, TrainSet
from ddray.artifact.schedule import Schedule
from ddray.data import normalized_space
from ddray.errors import DivergedError, InputError
from ddray.evaluation import steps as steps_protocol
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import EvalContext
from ddray.evaluation.steps import PROTOCOL, Steps, class_order
from ddray.jobs import score as scoring
from ddray.jobs.score import evaluate
from ddray.nets import Net, build_net
from ddray.seeding import derive_seed
from ddray.testing import plan_method

CPU = torch.device("cpu")
ARCH = "convnet1_w4"
ORDER = ((2, 0), (1,), (2, 0), (1, 2))


def context(dataset: Any) -> EvalContext:
    return EvalContext(dataset, dataset.test(), normalized_space(dataset), CPU)


def three(dataset: Any) -> TrainSet:
    """Three images, of classes 0, 2, 1."""
    images = torch.randn(3, *dataset.image_shape, generator=torch.Generator().manual_seed(0))
    return TrainSet(images, torch.tensor([0, 2, 1]))


def trained(net: Net, train: TrainSet, order: Any, rates: Any) -> Net:
    """The network after the steps by torch's optimiser."""
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for rows, rate in zip(order, rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(net(train.images[list(rows)]), train.supervision[list(rows)]).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The weights of the networks that are scored."""
    weights: list[list[Tensor]] = []
    score = EvalContext.score

    def noted(self: EvalContext, net: Net) -> Any:
        weights.append([parameter.detach().clone() for parameter in net.parameters()])
        return score(self, net)

    monkeypatch.setattr(EvalContext, "score", noted)
    return weights


@pytest.mark.parametrize(
    ("init_seed", "seed", "expected_seed"),
    [(None, 3, derive_seed(3, "evaluate", "net")), (11, 3, 11), (11, 4, 11)],
)
def test_a_network_takes_the_steps_in_their_order(
    toy: Any, scored: list[list[Tensor]], init_seed: int | None, seed: int, expected_seed: int
) -> None:
    dataset, rates = toy(), (0.5, 0.1, 0.3, 0.2)
    init = "random" if init_seed is None else "fixed"
    schedule = Schedule(order=ORDER, rates=rates, init=init, init_seed=init_seed)
    train = three(dataset)

    result = Steps(schedule).evaluate(train, context(dataset), arch=ARCH, seed=seed)

    net = build_net(ARCH, dataset.image_shape, 3, seed=expected_seed)
    before = [parameter.detach().clone() for parameter in net.parameters()]
    expected = trained(net, train, ORDER, rates)
    for ours, theirs, start in zip(scored[0], expected.parameters(), before, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)
        assert not torch.equal(ours, start)
    assert result.accuracy == context(dataset).score(expected).accuracy
    assert (result.arch, result.seed, result.num_images) == (ARCH, seed, 3)


def test_a_common_rate_replaces_the_schedules(toy: Any, scored: list[list[Tensor]]) -> None:
    dataset = toy()
    schedule = Schedule(order=ORDER, rates=(0.5, 0.1, 0.3, 0.2))
    common = Schedule(order=ORDER, rates=(0.25,) * 4)

    for steps in (Steps(schedule, rate=0.25), Steps(common), Steps(schedule)):
        steps.evaluate(three(dataset), context(dataset), arch=ARCH, seed=0)

    assert all(torch.equal(*pair) for pair in zip(scored[0], scored[1], strict=True))
    assert not any(torch.equal(*pair) for pair in zip(scored[0], scored[2], strict=True))


def test_other_sets_take_an_image_of_each_class_per_step(toy: Any, scored: list[list[Tensor]]) -> None:
    assert class_order(torch.tensor([1, 0, 0, 2, 1, 0])) == [[0, 1, 3], [2, 4], [5]]
    dataset = toy()
    images = torch.randn(4, *dataset.image_shape, generator=torch.Generator().manual_seed(0))
    train = TrainSet(images, torch.tensor([0, 0, 1, 2]))

    Steps(None, rate=0.1, epochs=2).evaluate(train, context(dataset), arch=ARCH, seed=0)

    net = build_net(ARCH, dataset.image_shape, 3, seed=derive_seed(0, "evaluate", "net"))
    expected = trained(net, train, [[0, 2, 3], [1]] * 2, [0.1] * 4)
    for ours, theirs in zip(scored[0], expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


def test_weights_of_steps_that_are_done_are_dropped(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = []
    real = steps_protocol.descend

    def counted(*args: Any) -> Any:
        refs: list[Any] = []
        for flat in real(*args):
            refs.append(weakref.ref(flat))
            del flat
            yield refs[-1]()
            alive.append(sum(ref() is not None for ref in refs))

    monkeypatch.setattr(steps_protocol, "descend", counted)
    Steps(None, rate=0.1, epochs=9).evaluate(three(toy()), context(toy()), arch=ARCH, seed=0)
    assert (len(alive), max(alive)) == (9, 1)


def test_soft_labels_are_learned(toy: Any, scored: list[list[Tensor]]) -> None:
    dataset = toy()
    soft = torch.rand(3, 3, generator=torch.Generator().manual_seed(1)).softmax(1)
    train = replace(three(dataset), soft_labels=soft)
    rates = (0.5, 0.1, 0.3, 0.2)

    Steps(Schedule(order=ORDER, rates=rates)).evaluate(train, context(dataset), arch=ARCH, seed=0)

    net = build_net(ARCH, dataset.image_shape, 3, seed=derive_seed(0, "evaluate", "net"))
    expected = trained(net, train, ORDER, rates)
    torch.testing.assert_close(scored[0][-1], [*expected.parameters()][-1].detach(), rtol=1e-4, atol=1e-6)


def test_batch_norm_is_refused(toy: Any) -> None:
    with pytest.raises(InputError, match=r"needs a network without batch norm, got convnet1_w4_bn"):
        Steps(None, rate=0.1).evaluate(three(toy()), context(toy()), arch="convnet1_w4_bn", seed=0)


def test_steps_that_diverge_are_named(toy: Any) -> None:
    with pytest.raises(DivergedError, match=r"by the set's steps diverged"):
        Steps(None, rate=1e38).evaluate(three(toy()), context(toy()), arch=ARCH, seed=0)


@pytest.mark.parametrize("option", [{"epochs": 3}, {"augment": "dsa"}, {"train_limit": 4}, {"recipe": "idc"}])
def test_what_the_set_decides_is_refused(option: dict[str, Any]) -> None:
    name = next(iter(option)).replace("_", "-")
    with pytest.raises(InputError, match=rf"--{name} must be left out with --protocol steps"):
        EvaluateOptions(protocol="steps", **option)


def test_settings_are_checked_before_there_is_a_set() -> None:
    with pytest.raises(InputError, match="rate"):
        EvaluateOptions(protocol="steps", sets=("rate=0",))


def a_set(dataset: Any, method: str = "dd", **method_settings: Any) -> DistilledSet:
    settings = {"method": {"batch_real": 8, **method_settings}, "steps": 2} if method == "dd" else {}
    _, ctx, distiller = plan_method(method, dataset, ipc=2, **{**settings, "arch": ARCH})
    distiller.setup(ctx)
    for _ in range(distiller.num_steps):
        distiller.step()
    return distiller.snapshot()


def test_a_distilled_set_is_scored_by_its_steps(toy: Any, tmp_path: Any) -> None:
    dataset = toy()
    distilled = a_set(dataset)
    distilled.save(tmp_path / "set.pt")

    options = EvaluateOptions(protocol="steps", seeds=2)
    result = evaluate(tmp_path / "set.pt", options, device=CPU, dataset=dataset)

    assert distilled.meta.schedule is not None
    ctx = context(dataset)
    expected = [
        Steps(distilled.meta.schedule).evaluate(distilled.decode(), ctx, arch=ARCH, seed=seed).accuracy
        for seed in (0, 1)
    ]
    assert result.results[0]["per_seed"] == expected
    assert result.results[0]["arch"] == ARCH


def test_passes_over_a_set_with_a_schedule_are_refused(toy: Any, tmp_path: Any) -> None:
    dataset = toy()
    a_set(dataset).save(tmp_path / "set.pt")
    options = EvaluateOptions(protocol="steps", sets=("epochs=5",))
    with pytest.raises(InputError, match=r"--set epochs must be left out .* got 5: its \d+ steps decide"):
        evaluate(tmp_path / "set.pt", options, device=CPU, dataset=dataset)


def test_a_fixed_initialisation_is_one_network(
    toy: Any, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = toy()
    a_set(dataset, net_init="fixed", num_nets=2, distill_epochs=1).save(tmp_path / "set.pt")
    assert "num_nets=2 is not used: a fixed initialisation is one network" in caplog.text
    result = evaluate(
        tmp_path / "set.pt", EvaluateOptions(protocol="steps", seeds=2), device=CPU, dataset=dataset
    )
    first, second = result.results[0]["per_seed"]
    assert first == second
    assert "a fixed initialisation is one network: its 2 scores are the same" in caplog.text
    options = EvaluateOptions(protocol="steps", archs=("convnet2_w4",))
    with pytest.raises(InputError, match=f"--arch must be {ARCH} for a set with a fixed .* got convnet2_w4"):
        evaluate(tmp_path / "set.pt", options, device=CPU, dataset=dataset)


def test_a_set_without_schedule_needs_a_rate(toy: Any, tmp_path: Any) -> None:
    dataset = toy()
    a_set(dataset, "random").save(tmp_path / "set.pt")

    with pytest.raises(InputError, match=r"needs a set with a schedule, .* got one of method random without"):
        evaluate(tmp_path / "set.pt", EvaluateOptions(protocol="steps"), device=CPU, dataset=dataset)
    options = EvaluateOptions(protocol="steps", seeds=1, sets=("rate=0.02", "epochs=1"))
    result = scoring.evaluate(tmp_path / "set.pt", options, device=CPU, dataset=dataset)
    assert len(result.results) == 1
    assert PROTOCOL.published_metric == "top1_accuracy"
