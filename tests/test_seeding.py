from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddray.seeding import derive, derive_numpy, derive_seed, forked_global, forked_numpy

labels = st.lists(st.text(max_size=4) | st.integers(), max_size=4)


@given(st.integers(0, 2**62), labels, st.integers(0, 2**62), labels)
def test_seeds_differ_with_seed_and_labels_and_fit_63_bits(
    seed: int, first_labels: list[str | int], second_seed: int, second_labels: list[str | int]
) -> None:
    a, b = derive_seed(seed, *first_labels), derive_seed(second_seed, *second_labels)

    assert 0 <= a < 2**63
    # A separator inside a label is the one way to write two lists as one text; no label of ours has it.
    if not any("\x1f" in str(label) for label in (*first_labels, *second_labels)):
        assert (a == b) == ((seed, first_labels) == (second_seed, second_labels))


def test_a_label_is_its_type_too() -> None:
    assert derive_seed(0, 1) != derive_seed(0, "1")
    assert derive_seed(0, "a", "b") != derive_seed(0, "ab") != derive_seed(0, "b", "a")


def test_a_seed_is_the_same_in_another_process() -> None:
    code = "from ddray.seeding import derive_seed; print(derive_seed(3, 'step', 7))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )

    assert int(done.stdout) == derive_seed(3, "step", 7)


def test_generators_repeat_and_leave_the_global_ones_alone() -> None:
    before, before_numpy = torch.get_rng_state(), repr(np.random.get_state())  # noqa: NPY002

    assert torch.equal(torch.rand(4, generator=derive(1, "a")), torch.rand(4, generator=derive(1, "a")))
    assert not torch.equal(torch.rand(4, generator=derive(1, "a")), torch.rand(4, generator=derive(2, "a")))
    assert derive_numpy(1, "a").random() == derive_numpy(1, "a").random() != derive_numpy(1, "b").random()

    assert torch.equal(torch.get_rng_state(), before)
    assert repr(np.random.get_state()) == before_numpy  # noqa: NPY002


def test_forked_global_seeds_the_block_and_restores_even_after_an_error() -> None:
    before = torch.get_rng_state()
    with forked_global(5):
        first = torch.rand(3)
    with forked_global(5):
        assert torch.equal(torch.rand(3), first)
    with pytest.raises(TypeError), forked_global(5):
        torch.rand("three")

    assert torch.equal(torch.get_rng_state(), before)
    with forked_global(6):
        assert not torch.equal(torch.rand(3), first)


@pytest.mark.parametrize(("name", "index"), [("cuda", 3), ("cuda:0", 0), ("cuda:1", 1)])
def test_forked_global_restores_the_gpu_that_is_used(
    name: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored: list[list[int]] = []

    @contextmanager
    def fork_rng(devices: list[int]) -> Iterator[None]:
        restored.append(devices)
        yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    monkeypatch.setattr(torch.random, "manual_seed", lambda seed: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    with forked_global(5, name):
        assert restored == [[index]]


def test_forked_numpy_seeds_the_block_and_restores_even_after_an_error() -> None:
    before = repr(np.random.get_state())  # noqa: NPY002
    with forked_numpy(5):
        first = np.random.rand(3)  # noqa: NPY002
    with forked_numpy(5 + 2**32):
        assert (np.random.rand(3) == first).all()  # noqa: NPY002
    with pytest.raises(TypeError), forked_numpy(5):
        np.random.rand("three")  # noqa: NPY002

    assert repr(np.random.get_state()) == before  # noqa: NPY002
