"""Precision and determinism: what is set, given back, and chosen by a probe."""

from __future__ import annotations

import os
import time

import pytest
import torch

from ddray.system import numerics
from ddray.system.numerics import Numerics, applied, current

DEFAULT = Numerics()


def flags() -> tuple[object, ...]:
    return (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


@pytest.mark.parametrize(
    ("precision", "tf32"), [("tf32", True), ("bf16", True), ("auto", True), ("fp32", False)]
)
def test_a_gpus_convolutions_take_tf32_unless_fp32_is_set(precision: numerics.Precision, tf32: bool) -> None:
    before = flags()
    with applied(precision, device="cuda"):
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert current().precision == precision
        with applied("tf32", device="cuda"):
            assert torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.allow_tf32 is tf32
    assert (flags(), current()) == (before, DEFAULT)


def test_determinism_is_set_and_given_back_even_after_an_error() -> None:
    before = flags()

    def fail() -> None:
        with applied(deterministic=True):
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.backends.cudnn.benchmark
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert flags() == before


@pytest.mark.parametrize(
    ("precision", "device", "used"),
    [
        ("tf32", "cpu", "fp32"),
        ("fp32", "cuda", "fp32"),
        ("tf32", "cuda", "tf32"),
        ("bf16", "cpu", "bf16"),
        ("auto", "cuda", "tf32"),
    ],
)
def test_what_was_used(precision: numerics.Precision, device: str, used: str) -> None:
    settings = Numerics(precision, device)
    settings.bf16("work")

    assert settings.used() == used


def test_what_had_no_choice_was_computed_in_float32() -> None:
    assert Numerics("bf16").used() == "fp32"
    assert Numerics("bf16", "cuda").used() == "tf32"


@pytest.mark.parametrize("faster", [True, False])
def test_auto_probes_each_work_once_and_says_what_it_chose(faster: bool) -> None:
    calls: list[bool] = []

    def run(bf16: bool) -> None:
        calls.append(bf16)
        time.sleep(0.001 if bf16 is faster else 0.01)

    with applied("auto") as settings:
        assert settings.bf16("net", run) is faster
        assert calls == [True, False] * 4
        assert current().bf16("net", run) is faster
        assert len(calls) == 8
        assert settings.used() == ("bf16" if faster else "fp32")
        settings.probed["other"] = not faster
        assert settings.bf16("other") is not faster
        assert settings.used() == "bf16+fp32"
