"""Losses, norms and augmentation of the generators against loops, hand-made cases and float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributions import Normal, kl_divergence

from ddray.methods.families.generative.contrast import Queue
from ddray.methods.families.generative.fit import Average
from ddray.methods.families.generative.losses import (
    augmented,
    divergence,
    guarded_root,
    hinge,
    info_nce,
    mmd2,
)
from ddray.methods.families.generative.nets import (
    ClassPerceptrons,
    ConditionalNorm,
    PlainGenerator,
    ProjectionHead,
    ResidualDiscriminator,
    ResidualGenerator,
    folded_state,
    halvings,
    middle,
)
from ddray.training.operations import CUT_X, CUT_Y, NUM_COLUMNS, SHIFT_X, SHIFT_Y

SCALES = (2.0, 5.0, 80.0)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_mmd_is_that_of_three_loops() -> None:
    """Biased: a sample's kernel with itself, 1 per scale, counts. The scale is s, not s^2."""
    x, y = drawn(5, 3), drawn(4, 3, seed=1) + 0.5

    def mean_kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        total = 0.0
        for row in a.tolist():
            for other in b.tolist():
                for scale in SCALES:
                    distance = sum((p - q) ** 2 for p, q in zip(row, other, strict=True))
                    total += math.exp(-distance / (2 * scale))
        return total / (len(a) * len(b))

    expected = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    assert float(mmd2(x, y, SCALES)) == pytest.approx(expected, rel=1e-9)
    stacked = mmd2(torch.stack([x, 2 * x]), torch.stack([y, y]), SCALES)
    assert stacked[0] == pytest.approx(expected, rel=1e-9)
    assert stacked[1] == pytest.approx(float(mmd2(2 * x, y, SCALES)), rel=1e-9)


def test_mmd_is_0_for_equal_samples_and_only_there() -> None:
    x = drawn(6, 4)

    assert float(mmd2(x, x[torch.randperm(6)], SCALES)) == pytest.approx(0, abs=1e-12)
    assert float(mmd2(x, x + 0.1, SCALES)) > 1e-4


def test_the_gradient_of_the_root_is_guarded_at_0() -> None:
    values = torch.tensor([0.0, -1e-9, 4.0], dtype=torch.float64, requires_grad=True)

    roots = guarded_root(values)
    roots.sum().backward()

    assert roots.tolist() == [0, 0, 2]
    assert math.isnan(float(guarded_root(torch.tensor(math.nan)))), "a training that diverges is noticed"
    assert values.grad is not None
    assert values.grad.tolist() == [0, 0, 0.25]
    x = drawn(5, 3).requires_grad_()
    guarded_root(mmd2(x, x.detach(), SCALES)).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()


def test_hinge_by_hand() -> None:
    real, fake, rebuilt = torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 0.5]), torch.tensor([1.0])

    assert float(hinge(real, (fake, 1.0))) == pytest.approx(0.25 + 0.75)
    assert float(hinge(real, (fake, 0.5), (rebuilt, 0.5))) == pytest.approx(0.25 + 0.375 + 1.0)


def test_the_divergence_is_torchs_summed_over_batch_and_units() -> None:
    mean, log_variance = drawn(3, 4), drawn(3, 4, seed=1)

    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).sum()

    assert float(divergence(mean, log_variance)) == pytest.approx(float(expected), rel=1e-9)
    assert float(divergence(torch.zeros(2, 3), torch.zeros(2, 3))) == 0


def test_the_contrast_is_a_cross_entropy_over_one_own_key_and_the_queue() -> None:
    queries, keys, queue = (F.normalize(drawn(n, 3, seed=n), dim=1) for n in (4, 4, 7))
    keys = F.normalize(drawn(4, 3, seed=9), dim=1)

    expected = 0.0
    for query, key in zip(queries, keys, strict=True):
        own_share = math.exp(float(query @ key) / 0.07)
        others = sum(math.exp(float(query @ other) / 0.07) for other in queue)
        expected -= math.log(own_share / (own_share + others)) / 4

    assert float(info_nce(queries, keys, queue, 0.07)) == pytest.approx(expected, rel=1e-9)
    assert float(info_nce(keys, keys, -keys[:1], 0.01)) < float(info_nce(queries, keys, -keys[:1], 0.01))


def test_the_queue_forgets_the_oldest_first() -> None:
    queue = Queue(5, 2)
    with torch.no_grad():
        for step in range(3):  # the keys 0 1, 2 3, 4 5
            keys = torch.arange(2.0).view(1, 2, 1).expand(2, 2, 2) + 2 * step
            queue.push(keys, step)

    assert sorted(queue.keys[0, :, 0].tolist()) == [1, 2, 3, 4, 5]
    queue.push(torch.arange(10.0, 18.0).view(1, 8, 1).expand(2, 8, 2), 0)
    assert sorted(queue.keys[1, :, 0].tolist()) == [13, 14, 15, 16, 17], "a step larger than the queue"


def rows_of(num: int, **columns: float) -> torch.Tensor:
    names = {"up": SHIFT_Y, "right": SHIFT_X, "cut_y": CUT_Y, "cut_x": CUT_X}
    rows = torch.full((num, NUM_COLUMNS), 0.5)
    for name, value in columns.items():
        rows[:, names[name]] = value
    return rows


def test_translation_moves_by_up_to_an_eighth_and_cutout_blanks_a_square_of_half_the_side() -> None:
    images = torch.arange(1.0, 257.0).view(1, 1, 16, 16)
    still = {"up": 0.5, "right": 0.5}

    moved = augmented(images, rows_of(1, up=0.999, right=0.0, cut_y=0.0, cut_x=0.0))
    cut = augmented(images, rows_of(1, **still, cut_y=0.5, cut_x=0.5))

    assert moved[0, 0, 4:14, 4:].tolist() == images[0, 0, 6:, 2:14].tolist(), "2 px up, 2 to the right"
    assert not moved[0, 0, 14:].any(), "what comes in is 0"
    assert not moved[0, 0, :, :2].any()
    covered = (cut == 0)[0, 0].nonzero()
    assert (len(covered), covered.amin(0).tolist(), covered.amax(0).tolist()) == (64, [4, 4], [11, 11])
    kept_pixels = cut[cut != 0]
    assert kept_pixels.tolist() == images[cut != 0].tolist()


def test_augmentation_is_drawn_per_image_and_differentiable() -> None:
    images = torch.ones(2, 1, 16, 16, requires_grad=True)
    rows = torch.cat([rows_of(1, cut_y=0.0, cut_x=0.0), rows_of(1, cut_y=0.99, cut_x=0.99)])

    result = augmented(images, rows)
    result.sum().backward()

    assert not torch.equal(result[0], result[1])
    assert images.grad is not None
    assert torch.equal(images.grad, (result != 0).float())


def test_the_projection_is_a_linear_logit_plus_the_class_embeddings_product() -> None:
    head = ProjectionHead(3, 2).eval()
    features, labels = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])

    logits = head(features, labels)

    weight, embedding = head.linear.weight.detach()[0], head.embedding.weight.detach()
    bias = head.linear.bias.detach()[0]
    for row, label in enumerate(labels.tolist()):
        expected = float(bias)
        for unit in range(3):
            expected += float(features[row, unit] * (weight[unit] + embedding[label, unit]))
        assert float(logits.detach()[row]) == pytest.approx(expected, abs=1e-6)


def test_the_norm_has_gain_and_bias_of_the_class() -> None:
    norm = ConditionalNorm(2, 3).double()
    maps, labels = drawn(5, 2, 4, 4), torch.tensor([0, 1, 2, 1, 0])

    result = norm(maps, labels)

    mean, variance = maps.mean((0, 2, 3)), maps.var((0, 2, 3), unbiased=False)
    for row, label in enumerate(labels.tolist()):
        for channel in range(2):
            standard = (maps[row, channel] - mean[channel]) / (variance[channel] + 1e-5).sqrt()
            expected = standard * (1 + norm.gain.weight[label, channel]) + norm.bias.weight[label, channel]
            assert torch.allclose(result[row, channel], expected, atol=1e-10)


def singular_values(net: nn.Module) -> list[float]:
    """Largest singular values of all weights that forward passes use."""
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding)]
    return [float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) for layer in layers]


def test_every_weight_of_the_discriminator_has_spectral_norm_1() -> None:
    net = ResidualDiscriminator((3, 8, 8), 3, 2)
    with torch.no_grad():
        for _ in range(30):  # power iterations
            net(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))

    assert singular_values(net.eval()) == pytest.approx([1.0] * len(singular_values(net)), rel=0.02)


def test_an_average_of_normalised_weights_is_normalised_when_it_is_folded() -> None:
    net = ResidualGenerator((1, 8, 8), 3, width=2, noise_dim=4, spectral=True)
    average = Average(net, 0.5)
    for step in range(3):
        for parameter in net.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
        average.update(step)
    plain = ResidualGenerator((1, 8, 8), 3, width=2, noise_dim=4, spectral=False).eval()

    plain.load_state_dict(folded_state(average.net))

    normed = [
        value for name, value in zip(names_of(plain), singular_values(plain), strict=True) if is_normed(name)
    ]
    assert normed == pytest.approx([1.0] * len(normed), rel=0.02)
    noise, labels = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    assert torch.allclose(plain(noise, labels), average.net(noise, labels), atol=1e-6)
    net(noise, labels)  # a copy's weights are not the original's


def test_a_folded_generator_has_the_batch_statistics_of_samples() -> None:
    net = ResidualGenerator((1, 8, 8), 3, width=2, noise_dim=4, spectral=True)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    with torch.no_grad():
        for _ in range(20):  # what it saw last was distributed otherwise
            net(10 + 5 * torch.randn(6, 4), labels)
    noise = torch.randn(2, 6, 4)
    seen: list[torch.Tensor] = []
    plain = ResidualGenerator((1, 8, 8), 3, width=2, noise_dim=4, spectral=False).eval()

    plain.load_state_dict(folded_state(net, [(part, labels) for part in noise]))

    first = plain.blocks[0].norms[0].norm
    first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for part in noise:
            plain(part, labels)
    means = torch.stack([maps.mean((0, 2, 3)) for maps in seen]).mean(0)
    variances = torch.stack([maps.transpose(0, 1).flatten(1).var(1) for maps in seen]).mean(0)
    assert torch.allclose(first.running_mean, means, atol=1e-6)
    assert torch.allclose(first.running_var, variances, rtol=1e-5)


def names_of(net: nn.Module) -> list[str]:
    layers = (nn.Conv2d, nn.Linear, nn.Embedding)
    return [name for name, layer in net.named_modules() if isinstance(layer, layers)]


def is_normed(name: str) -> bool:
    """Gains and biases of batch norm are not."""
    return not name.endswith(("gain", "bias"))


def test_an_average_is_a_copy_until_it_begins() -> None:
    net = nn.BatchNorm1d(2)
    average = Average(net, 0.75, start=1)
    with torch.no_grad():
        net.weight.fill_(4.0)
        net.num_batches_tracked += 3
        average.update(0)
        assert average.net.weight.tolist() == [4, 4]
        net.weight.fill_(8.0)
        net.running_mean.fill_(1.0)
        average.update(1)

    assert average.net.weight.tolist() == [5, 5]
    assert average.net.running_mean.tolist() == [0.25, 0.25]
    assert int(average.net.num_batches_tracked) == 3


@pytest.mark.parametrize(
    ("size", "num"), [((8, 8), 1), ((16, 16), 2), ((28, 28), 3), ((32, 32), 3), ((20, 12), 3)]
)
def test_generators_make_images_of_any_size(size: tuple[int, int], num: int) -> None:
    shape, noise, labels = (3, *size), torch.randn(2, 4), torch.tensor([0, 2])

    assert halvings(shape) == num
    for net in (
        ResidualGenerator(shape, 3, width=1, noise_dim=4, spectral=False),
        PlainGenerator(shape, 3, width=4, noise_dim=4),
    ):
        images = net(noise, labels)
        assert images.shape == (2, *shape)
        assert float(images.detach().abs().max()) <= 1
    assert ResidualDiscriminator(shape, 3, 1)(torch.randn(2, *shape), labels).shape == (2,)
    assert middle(torch.arange(16.0).view(1, 1, 4, 4), (1, 2, 2)).flatten().tolist() == [5, 6, 9, 10]


def test_a_class_perceptron_is_the_layers_of_its_class() -> None:
    net = ClassPerceptrons((1, 2, 2), 3, noise_dim=2, hidden=(5,)).double()
    noise = drawn(3, 4, 2)

    together = net(noise)

    for label in range(3):
        hidden = F.relu(noise[label] @ net.weights[0][label] + net.biases[0][label])
        expected = torch.sigmoid(hidden @ net.weights[1][label] + net.biases[1][label])
        assert torch.allclose(together[label], expected)
        alone = net(noise[label : label + 1], torch.tensor([label]))
        assert torch.allclose(alone[0], expected)
