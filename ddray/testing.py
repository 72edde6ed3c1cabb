"""The contract of every method, as tests: a method in a package of its own is held to it with three lines.

    from ddray.testing import MethodContract

    class TestCentroids(MethodContract):
        name = "centroids"

pytest runs them, in seconds if the method's settings say how (`MethodConfig.quick`). Networks of the pool are
trained once for all tests of a session.
"""

import io
import pickle
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.artifact.reading import load
from ddray.config import Config
from ddray.data import Dataset, Split, open_dataset
from ddray.distillation.loop import run_distillation
from ddray.distillation.method import DistillContext, Distiller, coupling_of, schedule_of
from ddray.distillation.shards import Shard, join_sets, shard_classes
from ddray.errors import InputError
from ddray.jobs.context import check_longer, declared_specs, make_context, make_distiller
from ddray.jobs.plan import PRESETS, Plan, budget_method, resolve
from ddray.jobs.shards import check_shards
from ddray.methods import get_method
from ddray.pool.local import LocalPool
from ddray.pool.spec import PoolSpec
from ddray.tuning.settings import Settings, method_protocol
from ddray.tuning.space import conditions, grid, method_space, sample

__all__ = ["MethodContract", "plan_method", "random_dataset"]

_SHAPES = {"digits": (1, 16, 16), "cifar10": (3, 32, 32), "tiny_imagenet": (3, 64, 64)}
_SETTINGS = {"lr", "steps", "num_steps", "param_groups", "seed"}


def random_dataset(
    counts: tuple[int, ...] = (9, 7, 8),
    shape: tuple[int, int, int] = (3, 16, 16),
    *,
    name: str = "toy",
    can_flip: bool = True,
    seed: int = 0,
) -> Dataset:
    """Return a dataset of random uint8 images, classes unsorted, whose test set is its training set.

    Args:
        counts: images of each class.
        shape: (C, H, W).
        name: its name.
        can_flip: whether a mirrored image keeps its class.
        seed: decides images and order.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    images = torch.randint(0, 256, (len(labels), *shape), generator=generator, dtype=torch.uint8)
    split = Split(images, labels)
    return Dataset(
        name=name,
        class_names=tuple(f"class {label}" for label in range(len(counts))),
        image_shape=shape,
        mean=tuple(0.4 + 0.05 * channel for channel in range(shape[0])),
        std=tuple(0.2 + 0.05 * channel for channel in range(shape[0])),
        can_flip=can_flip,
        load_train=lambda: split,
        load_test=lambda: split,
    )


def plan_method(
    method: str, dataset: Dataset, /, *, ipc: int = 1, seed: int = 0, preset: str = "paper", **settings: Any
) -> tuple[Plan, DistillContext, Distiller]:
    """Return plan, context (all of train, on the CPU) and a fresh method object.

    Args:
        method: its name.
        dataset: what to distil.
        ipc: images per class, or as many images per class of budget.
        seed: the run's.
        preset: `paper` or `repo`.
        **settings: nested run settings, over a small network and no compilation.
    """
    layers = [{"arch": "convnet2_w8", "compile": "off", **settings}]
    plan = resolve(method, dataset, ipc=ipc, seed=seed, preset=preset, layers=layers)
    ctx = make_context(plan, dataset.train(), split_name="train", device=torch.device("cpu"))
    return plan, ctx, make_distiller(plan)


class MethodContract:
    """Tests of one method; a subclass sets `name`.

    Attributes:
        name: the method's name.
        deterministic: names of methods that give the same set for every seed at ipc 1.
        other_networks: names of methods whose presets match in another network than the field's ConvNet.
    """

    name: ClassVar[str]
    deterministic: ClassVar[Collection[str]] = ()
    other_networks: ClassVar[Collection[str]] = ()

    @pytest.fixture
    def method(self) -> str:
        """Return the method's name."""
        return self.name

    @pytest.fixture(autouse=True)
    def _shared_pool(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("DDRAY_HOME", str(tmp_path_factory.getbasetemp() / "contracts"))

    @pytest.mark.parametrize("ipc", [1, 3])
    def test_it_distils_digits_into_a_valid_set(self, method: str, ipc: int, tmp_path: Path) -> None:
        """Finite losses; a set of the size that was asked for, which names its origin and survives a file."""
        digits = _digits()
        ctx, distiller = _started(method, digits, steps=2, ipc=ipc)
        for _ in range(distiller.num_steps):
            loss = distiller.step()["loss"]
            assert loss.shape in ((), (1,)), f"a step's loss must be a scalar, got shape {tuple(loss.shape)}"
            assert torch.isfinite(loss).all(), f"a step's loss must be finite, got {loss}"
        distilled = distiller.snapshot()
        distilled.save(tmp_path / "distilled.pt")
        loaded = load(tmp_path / "distilled.pt")
        meta, floats = loaded.meta, 10 * ipc * 256
        if budget_method(method) is None:
            assert loaded.images.shape == (10 * ipc, 1, 16, 16), "ipc images per class, of the data's shape"
            assert loaded.labels.tolist() == [k for k in range(10) for _ in range(ipc)], "sorted by class"
            soft = 0 if loaded.soft_labels is None else loaded.soft_labels.numel()
            assert meta.storage_floats == floats + soft, "what is stored is counted"
        else:
            assert loaded.targets is not None, "a method without classes stores targets"
            assert len(loaded.images) == len(loaded.targets) >= 1, "a target for each image"
            assert meta.budget == 10 * ipc, "the set names its budget"
            assert meta.storage_floats <= floats, "a budget is not exceeded"
        assert (meta.method, meta.dataset, meta.ipc) == (method, "digits", ipc), "the set names its origin"
        assert (meta.fingerprint, meta.arch) == (digits.fingerprint, ctx.arch), "the set names its origin"
        assert torch.equal(loaded.images, distilled.images), "a file changes nothing"

    def test_a_class_with_fewer_images_than_ipc_is_distilled(self, method: str) -> None:
        """What learns images makes ipc of every class, a selection gives what there is."""
        _, distiller = _started(method, random_dataset((9, 7, 2)), steps=1, ipc=4)
        for _ in range(distiller.num_steps):
            distiller.step()
        distilled = distiller.snapshot()
        distilled.validate()
        if budget_method(method) is None:
            counts = torch.bincount(distilled.labels, minlength=3).tolist()
            assert counts[:2] == [4, 4], "ipc images of the other classes"
            assert 2 <= counts[2] <= 4, "at least what the class has"

    def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(
        self, method: str, tmp_path: Path
    ) -> None:
        """Only the run's seed decides: neither the global generator nor an earlier run."""

        def run(seed: int, name: str) -> DistilledSet:
            _, distiller = _started(method, random_dataset(), steps=2, seed=seed)
            torch.rand(seed + 3)
            for _ in range(distiller.num_steps):
                distiller.step()
            distilled = distiller.snapshot()
            distilled.save(tmp_path / name)
            return distilled

        first, _ = run(0, "a.pt"), run(0, "b.pt")
        assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes(), "same seed, same bytes"
        others = [run(seed, "c.pt").images for seed in (1, 2, 3)]
        if method in self.deterministic:
            largest = max(float((first.images - images).abs().max()) for images in others)
            assert largest < 1e-6, f"{method} is deterministic, but seeds differ by {largest}"
        else:
            assert not all(torch.equal(first.images, images) for images in others), "seeds must matter"

    def test_a_run_does_not_touch_the_global_generators(
        self, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Every draw comes from `ctx.generator`, `derive` or `derive_numpy`."""
        monkeypatch.setenv("DDRAY_HOME", str(tmp_path / "home"))  # so that networks are trained here too
        before, before_numpy = torch.get_rng_state(), _numpy_state()
        _, distiller = _started(method, random_dataset(), steps=1)
        for _ in range(distiller.num_steps):
            distiller.step()
        assert torch.equal(torch.get_rng_state(), before), "torch's global generator was used"
        assert _numpy_state() == before_numpy, "numpy's global generator was used"

    @pytest.mark.parametrize("cut", [0, 1, 3])
    def test_save_load_continue_equals_uninterrupted(self, method: str, cut: int) -> None:
        """Bit for bit, wherever a run is cut."""
        first, second, whole = (_started(method, random_dataset(), steps=4, ipc=2)[1] for _ in range(3))
        losses = [whole.step()["loss"] for _ in range(whole.num_steps)]
        cut = min(cut, first.num_steps)
        for _ in range(cut):
            first.step()
        state = _through_a_file(first.state_dict())
        second.load_state_dict(state)
        rest = [second.step()["loss"] for _ in range(second.num_steps - cut)]
        assert _same(second.snapshot().images, whole.snapshot().images), "other images after a resume"
        assert _same(second.state_dict(), whole.state_dict()), "another state after a resume"
        assert _same(rest, losses[cut:]), "other losses after a resume"
        assert _same(state, _through_a_file(first.state_dict())), "later steps changed the loaded state"

    def test_a_longer_run_continues_a_shorter_one_or_is_refused(self, method: str) -> None:
        """Bit for bit; a method that depends on the number of steps says how in `schedule`."""
        plan = resolve(method, random_dataset(), ipc=2, layers=[{"compile": "off"}])
        if plan.config.steps == 0:
            pytest.skip("the method takes no number of steps")
        plans = [replace(plan, config=plan.config.model_copy(update={"steps": steps})) for steps in (2, 5)]
        if schedule := schedule_of(get_method(method)):
            with pytest.raises(InputError, match=re.escape(schedule)):
                check_longer(*plans)
            return
        check_longer(*plans)
        runs = (_started(method, random_dataset(), steps=steps, ipc=2)[1] for steps in (2, 5, 5))
        shorter, longer, whole = runs
        losses = [whole.step()["loss"] for _ in range(5)]
        rest = [shorter.step()["loss"] for _ in range(2)]
        longer.load_state_dict(_through_a_file(shorter.state_dict()))
        rest += [longer.step()["loss"] for _ in range(3)]
        reason = "; if that is meant, say in `schedule` what depends on the number of steps"
        assert _same(rest, losses), f"other losses than those of one long run{reason}"
        assert _same(longer.snapshot().images, whole.snapshot().images), f"other images{reason}"
        assert _same(longer.state_dict(), whole.state_dict()), f"another state{reason}"

    def test_shards_of_classes_give_one_file_or_are_refused(self, method: str, tmp_path: Path) -> None:
        """1, 2 and 3 shards; the networks that they need are those of `pool_specs`."""
        dataset = random_dataset((9, 7, 8, 6, 9))
        plan, ctx, whole = plan_method(method, dataset, ipc=2, **_quick(method, dataset, 3, {}))
        if (reason := coupling_of(get_method(method), plan.config.method, plan.arch)) is not None:
            assert len(reason.splitlines()) == 1, f"the reason must be one line, got {reason!r}"
            with pytest.raises(InputError, match=re.escape(reason)):
                check_shards(plan, 2, ctx.split)
            return
        check_shards(plan, 2, ctx.split)
        run_distillation(whole, ctx).distilled.save(tmp_path / "whole.pt")
        ctx.pool.get(declared_specs(plan, ctx))
        for num_shards in (1, 2, 3):
            sets = []
            for classes in shard_classes(ctx.dataset.num_classes, num_shards):
                shard = Shard(classes, ctx.split.labels)
                part = replace(ctx, split=ctx.split.select(shard.rows), shard=shard, pool=LocalPool(_refuse))
                sets.append(run_distillation(make_distiller(plan), part).distilled)
            join_sets(sets).save(tmp_path / "joined.pt")
            equal = (tmp_path / "joined.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
            assert equal, f"{num_shards} shards give another file; see `DistillContext.shard`"

    def test_a_state_is_a_copy(self, method: str) -> None:
        """Later steps change neither a state nor a set returned earlier."""
        _, distiller = _started(method, random_dataset(), steps=3)
        if distiller.num_steps:
            distiller.step()
        state, distilled = distiller.state_dict(), distiller.snapshot()
        before, images = _through_a_file(state), distilled.images.clone()
        for _ in range(distiller.num_steps - 1):
            distiller.step()
        assert _same(state, before), "state_dict() must return copies; see ddray.methods.toolkit.cpu_copy"
        assert torch.equal(distilled.images, images), "snapshot() must return a copy"
        assert not distilled.images.requires_grad, "a set is detached"

    def test_the_state_has_no_hyperparameters(self, method: str) -> None:
        """PB2 copies one member's state to another, which keeps its own settings."""
        _, distiller = _started(method, random_dataset(), steps=2)
        if distiller.num_steps:
            distiller.step()
        settings = {*_names_in(distiller.state_dict())} & {*_config_type(method).model_fields, *_SETTINGS}
        assert not settings, f"the state must not hold settings, got {sorted(settings)}"

    def test_a_cloned_state_continues_with_the_new_objects_settings(self, method: str) -> None:
        """What PB2 does: the state of one member, the settings of another."""
        if "lr_img" not in _config_type(method).model_fields:
            pytest.skip("the method has no lr_img")
        _, donor = _started(method, random_dataset(), steps=3, lr_img=0.01)
        donor.step()
        _, heir = _started(method, random_dataset(), steps=3, lr_img=5.0)
        heir.load_state_dict(_through_a_file(donor.state_dict()))
        assert _same(heir.state_dict(), donor.state_dict()), "a loaded state is the state"
        start = heir.snapshot().images
        donor.step(), heir.step()
        small, large = ((member.snapshot().images - start).norm() for member in (donor, heir))
        assert float(large / small) == pytest.approx(500, rel=0.05), "a step of the heir uses its own lr_img"

    @pytest.mark.parametrize("preset", PRESETS)
    @pytest.mark.parametrize("target", _SHAPES)
    def test_presets_resolve_for_every_target(self, method: str, preset: str, target: str) -> None:
        """At 16, 32 and 64 px, grey and coloured."""
        dataset = random_dataset((3,) * 10, _SHAPES[target], name=target)
        plan = resolve(method, dataset, ipc=1, preset=preset)
        assert make_distiller(plan).num_steps == plan.config.steps, "num_steps is what the run sets"
        assert isinstance(plan.config.method, _config_type(method)), "config_type is the settings' class"
        if method not in self.other_networks:
            assert plan.arch.startswith("convnet"), "by default the field's ConvNet"

    def test_its_settings_are_a_config_with_documented_fields(self, method: str) -> None:
        """A field's docstring is its help."""
        assert issubclass(_config_type(method), Config), "settings are a ddray Config"
        fields = _config_type(method).model_fields
        bare = [name for name, field in fields.items() if not field.description]
        assert not bare, f"every setting needs a docstring below it, missing for {bare}"

    def test_its_search_space_names_its_settings_and_only_legal_values(self, method: str) -> None:
        """The shipped file, or the settings' `search_space`; dotted names are those of `Settings`."""
        settings = Settings.of(resolve(method, _digits(), ipc=1), method_protocol(method))
        space, source = method_space(method, _config_type(method))
        unknown = {*space} - {*settings.names()}
        assert not unknown, f"{source} names settings that there are not: {sorted(unknown)}"
        for name, values in space.items():
            for value in values.ends():
                params = {**conditions(space, name), name: value}
                assert settings.values([name], params)[name] == value, f"{name}={value} is not what is set"
        for trial_id in range(5):
            settings.configs(sample(space, 0, trial_id))
        if all(values.values() for values in space.values()):
            assert grid(space, sample(space, 0, 0))


@cache
def _digits() -> Dataset:
    return open_dataset("digits")


def _numpy_state() -> bytes:
    return pickle.dumps(np.random.get_state())  # noqa: NPY002


def _config_type(method: str) -> type[Config]:
    return get_method(method).config_type


def _started(
    method: str, dataset: Dataset, *, steps: int, seed: int = 0, ipc: int = 1, **method_settings: Any
) -> tuple[DistillContext, Distiller]:
    """Return a method that is ready to step, with its quick settings."""
    settings = _quick(method, dataset, steps, method_settings)
    _, ctx, distiller = plan_method(method, dataset, ipc=ipc, seed=seed, **settings)
    distiller.setup(ctx)
    return ctx, distiller


def _quick(method: str, dataset: Dataset, steps: int, method_settings: Mapping[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {"method": {**getattr(_config_type(method), "quick", {}), **method_settings}}
    if resolve(method, dataset, ipc=1).config.steps > 0:
        settings["steps"] = steps
    return settings


def _refuse(spec: PoolSpec) -> Any:
    raise AssertionError(f"`pool_specs` must declare what a shard needs: {spec.kind} {spec.arch} is missing")


def _through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return dict(torch.load(buffer, weights_only=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _names_in(state: Any) -> Iterator[str]:
    """Yield the keys of all mappings in a state."""
    if isinstance(state, dict):
        yield from map(str, state)
        state = list(state.values())
    if isinstance(state, list | tuple):
        for value in state:
            yield from _names_in(value)
