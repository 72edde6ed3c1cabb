"""The sweep through SGD against autograd through the whole graph, differences and hand calculation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ddray.methods.families.unrolled import Gradient, Swept, sweep
from ddray.nets import Net, build_net
from ddray.training.dsa import DsaPlan, dsa_for
from ddray.training.student import Student, descend, flat_parameters

SHAPE, CLASSES = (2, 8, 8), 3
ROWS = [torch.tensor(rows) for rows in ([0, 1, 2], [3, 1], [0, 4], [1, 2, 4], [3, 0])]  # images recur
Augment = Callable[[int, Tensor], Tensor]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_net(arch: str = "convnet2_w4_sigmoid") -> Net:
    """A network in float64; without kinks, so that differences are exact."""
    return build_net(arch, SHAPE, CLASSES, seed=3).double().train()


class Training:
    """A training of T steps on five images with soft labels, towards random parameters."""

    def __init__(self, num_steps: int, net: Net | None = None, augment: Augment | None = None) -> None:
        self.net = net or small_net()
        self.student, self.start = Student(self.net), flat_parameters(self.net)
        self.target = self.start + 0.3 * normal(1, len(self.start))
        self.leaves = [normal(2, 5, *SHAPE), normal(3, 5, CLASSES)]
        self.rates = torch.linspace(0.5, 0.9, num_steps, dtype=torch.float64)
        self.augment = augment or (lambda step, images: images)

    def loss(self, step: int, flat: Tensor, leaves: Sequence[Tensor]) -> Tensor:
        images, labels = (leaf[ROWS[step]] for leaf in leaves)
        logits = self.student.logits(flat, self.augment(step, images))
        return F.cross_entropy(logits, labels.softmax(1))

    def outer(self, end: Tensor) -> tuple[Tensor, Tensor]:
        return (end - self.target).square().sum(), 2 * (end - self.target)

    def swept(self, gradient: Gradient = "exact") -> Swept:
        return sweep(self.loss, self.leaves, self.start, self.rates, self.outer, gradient)

    def whole_graph(self) -> tuple[Tensor, list[Tensor]]:
        """The loss and its gradients in leaves and rates, by one graph of the module's own parameters."""
        variables = [leaf.clone().requires_grad_(True) for leaf in (*self.leaves, self.rates)]
        images, labels, rates = variables
        params = {name: param.detach().clone() for name, param in self.net.named_parameters()}
        params = {name: param.requires_grad_(True) for name, param in params.items()}
        for step in range(len(rates)):
            batch = self.augment(step, images[ROWS[step]])
            logits = torch.func.functional_call(self.net, params, (batch,))
            probabilities = labels[ROWS[step]].exp() / labels[ROWS[step]].exp().sum(1, keepdim=True)
            loss = -(probabilities * logits.log_softmax(1)).sum(1).mean()
            slopes = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            moves = zip(params.items(), slopes, strict=True)
            params = {name: param - rates[step] * slope for (name, param), slope in moves}
        end = torch.cat([param.flatten() for param in params.values()])
        total = (end - self.target).square().sum()
        return total.detach(), list(torch.autograd.grad(total, variables))

    def trained_loss(self, leaves: Sequence[Tensor], rates: Tensor) -> float:
        *_, end = descend(self.loss, leaves, self.start, rates)
        return float(self.outer(end)[0])


def errors(swept: Swept, reference: Sequence[Tensor]) -> list[float]:
    """The largest relative errors of the gradients in images, soft labels and rates."""
    pairs = zip((*swept.leaves, swept.rates), reference, strict=True)
    return [float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs]


@pytest.mark.parametrize("num_steps", [1, 5])
@pytest.mark.parametrize("arch", ["convnet2_w4", "convnet2_w4_bn", "convnet1_w4_nonorm_max"])
def test_the_gradients_are_those_of_the_whole_graph(arch: str, num_steps: int) -> None:
    training = Training(num_steps, small_net(arch))

    swept = training.swept()
    loss, reference = training.whole_graph()

    torch.testing.assert_close(swept.loss, loss, rtol=1e-12, atol=0)
    assert max(errors(swept, reference)) < 1e-10


def test_tesla_is_another_gradient_from_two_steps_on() -> None:
    one, five = Training(1), Training(5)

    assert max(errors(one.swept("tesla"), one.whole_graph()[1])) < 1e-10
    assert min(errors(five.swept("tesla"), five.whole_graph()[1])) > 1e-3


@pytest.mark.parametrize(("gradient", "agrees"), [("exact", True), ("tesla", False)])
def test_central_differences(gradient: Gradient, agrees: bool) -> None:
    training = Training(5)
    swept = training.swept(gradient)
    variables = [*training.leaves, training.rates]

    differences, slopes = [], []
    for number, slope in enumerate((*swept.leaves, swept.rates)):
        direction = normal(10 + number, *slope.shape)
        ends = []
        for sign in (1, -1):
            moved = [*variables]
            moved[number] = moved[number] + sign * 1e-5 * direction
            ends.append(training.trained_loss(moved[:2], moved[2]))
        differences.append((ends[0] - ends[1]) / 2e-5)
        slopes.append(float((slope * direction).sum()))

    assert (slopes == pytest.approx(differences, rel=1e-6)) is agrees


def test_an_augmentation_drawn_before_is_differentiated_and_one_drawn_anew_is_not() -> None:
    dsa, generator = dsa_for(can_flip=True), torch.Generator().manual_seed(0)
    plans = [dsa.draw(len(rows), generator) for rows in ROWS]
    fixed = Training(5, augment=lambda step, images: dsa.apply(images, plans[step]))

    def redrawn(step: int, images: Tensor) -> Tensor:
        plan: DsaPlan = dsa.draw(len(images), generator)
        return dsa.apply(images, plan)

    _, reference = fixed.whole_graph()

    assert max(errors(fixed.swept(), reference)) < 1e-10
    assert min(errors(Training(5, augment=redrawn).swept(), reference)) > 1e-3


@pytest.mark.parametrize(("gradient", "slope"), [("exact", 2 * 0.3 - 0.3**2), ("tesla", 2 * 0.3)])
def test_two_steps_towards_a_number(gradient: Gradient, slope: float) -> None:
    """The loss (th - x)^2 / 2: th_2 = (1 - a)^2 th_0 + (2a - a^2) x."""
    number, start = torch.tensor([3.0]).double(), torch.tensor([1.0]).double()
    rates = torch.full((2,), 0.3, dtype=torch.float64)

    swept = sweep(
        lambda step, point, leaves: (point - leaves[0]).square().sum() / 2,
        [number],
        start,
        rates,
        lambda end: (end.sum(), torch.ones_like(end)),
        gradient,
    )

    assert float(swept.loss) == pytest.approx(0.7**2 + (2 * 0.3 - 0.3**2) * 3)
    assert float(swept.leaves[0]) == pytest.approx(slope)
    if gradient == "exact":  # d/da of (1 - a) (th - x) + x for each step
        assert swept.rates.tolist() == pytest.approx([2 * 0.7, 2 * 0.7])


def test_a_step_of_softmax_regression_by_hand() -> None:
    weight, images, direction = normal(0, 3, 4), normal(1, 5, 4), normal(2, 3, 4)
    labels = torch.tensor([0, 2, 1, 0, 1])

    swept = sweep(
        lambda step, point, leaves: F.cross_entropy(leaves[0] @ point.view(3, 4).T, labels),
        [images],
        weight.flatten(),
        torch.tensor([0.2]).double(),
        lambda end: (torch.dot(end, direction.flatten()), direction.flatten()),
    )

    slope, of_images = torch.zeros(3, 4).double(), []
    for image, label in zip(images, labels.tolist(), strict=True):
        odds = (weight @ image).exp()
        p = odds / odds.sum()
        residual = p - torch.eye(3).double()[label]
        slope += torch.outer(residual, image) / 5
        jacobian = torch.diag(p) - torch.outer(p, p)
        of_images.append(-0.2 / 5 * (direction.T @ residual + weight.T @ jacobian @ direction @ image))
    torch.testing.assert_close(swept.end.view(3, 4), weight - 0.2 * slope)
    torch.testing.assert_close(swept.leaves[0], torch.stack(of_images))
    assert float(swept.rates[0]) == pytest.approx(-float((slope * direction).sum()))


def test_no_step_leaves_everything_as_it_is() -> None:
    training = Training(0)

    swept = training.swept()

    assert torch.equal(swept.end, training.start)
    assert float(swept.loss) == float(training.outer(training.start)[0])
    assert swept.rates.shape == (0,)
    assert [bool(leaf.any()) for leaf in swept.leaves] == [False, False]


def test_a_sweep_changes_none_of_its_arguments() -> None:
    training = Training(5)
    tensors = (*training.leaves, training.rates, training.start)
    before = [tensor.clone() for tensor in tensors]

    training.swept()

    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in tensors)


def test_only_one_steps_graph_is_alive_at_a_time() -> None:
    """Values saved for the backward pass never outnumber those of a single step."""
    training, alive, most = Training(5), 0, 0

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            nonlocal alive, most
            self.tensor = tensor
            alive += tensor.numel()
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= self.tensor.numel()

    def peak(function: Callable[[], Any]) -> int:
        nonlocal most
        most = 0
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            function()
        return most

    whole, five = peak(training.whole_graph), peak(training.swept)
    one = peak(Training(1).swept)

    assert five < 1.5 * one
    assert whole > 3 * five
