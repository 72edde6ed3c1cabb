"""Every method on a fake GPU: steps, checkpoint, resume, snapshot; the numbers are those of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.distillation.loop import Distillation
from ddray.methods import method_names
from tests.gpu.fake_cuda import FakeCuda
from tests.gpu.fake_marks import place, tensors
from tests.gpu.runs import compute_as_cuda, distilled, fit_briefly, started

CUDA = torch.device("cuda")
# Methods whose images may differ from the CPU's in the last digits, and why.
CLOSE = {
    "idm": "its queue's networks are trained by the fused SGD on CUDA, one product rounded otherwise",
    "krr_st": "its teacher is trained by the fused AdamW on CUDA",
    "boost_ssdd": "its teacher is trained by the fused AdamW on CUDA",
    "kmeans_ssl": "its teacher is trained by the fused AdamW on CUDA",
    "frepo": "its networks are trained by the fused Adam on CUDA",
    "dc": "classes are differentiated in groups on CUDA, one by one on a CPU",
    "dsa": "classes are differentiated in groups on CUDA, one by one on a CPU",
    "sre2l": "several batches go through the network at once on CUDA",
    "rded": "crops are resized in batches on CUDA, by an interpolation of our own",
}
# Settings that take other paths to or on the device, besides each method's quick ones.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "datadam, ZCA": ("datadam", {"settings": {"pixel_space": "zca"}}),
    "datadam, batch norm": ("datadam", {"settings": {"arch": "convnet2_w8_bn"}}),
    "datadam, bf16": ("datadam", {"precision": "bf16"}),
    "datadam, features": ("datadam", {"maps": "features"}),
    "dm, k-center": ("dm", {"init": "kcenter"}),
    "dm, noise": ("dm", {"init": "noise"}),
    "dm, dsa_idc": ("dm", {"augment": "dsa_idc"}),
    "dc, batch norm": ("dc", {"settings": {"arch": "convnet2_w8_bn"}}),
    "dd, fixed": ("dd", {"net_init": "fixed", "augment_real": "crop_flip"}),
    "datm, random": ("datm", {"init": "random", "augment": "none"}),
    "mtt, whitened": ("mtt", {"gradient": "tesla", "batch_syn": 4, "settings": {"pixel_space": "zca"}}),
    "mtt, batch norm": ("mtt", {"settings": {"arch": "convnet2_w8_bn"}}),
    "dsdm, augmented": ("dsdm", {"augment": "dsa", "factor": 2}),
    "dsdm, unbiased": ("dsdm", {"unbiased": True, "history_mean": True, "history_first": "prototype"}),
    "esfr, IDM": (
        "esfr",
        {"base": "idm", "net_steps": 2, "batch_train": 8, "lambda_cc": 0.1, "augment": "dsa_idc"},
    ),
    "esfr, bf16": ("esfr", {"precision": "bf16"}),
    "idm, dsa_idc": ("idm", {"augment": "dsa_idc", "unit_pixels": True}),
    "krr_st, views": ("krr_st", {"augment_real": "crop_flip", "init_raw": True}),
    "krr_st, inner batch": ("krr_st", {"inner_batch": 2, "pool_reset": "krrst_code"}),
    "krr_st, batch norm": ("krr_st", {"settings": {"arch": "convnet2_w8_bn"}}),
    "boost_ssdd, images": ("boost_ssdd", {"parameterize": False, "augmentation": "none"}),
    "kip, labels": ("kip", {"learn_labels": True, "kernel": "conv3"}),
    "frepo, mirrored": ("frepo", {"mirror": True, "inner_batch": 2}),
    "g_vbsm, cropped batches": ("g_vbsm", {"crop": "resized", "batch": 2, "per_class": 1}),
    "g_vbsm, a map of 6 px": ("g_vbsm", {"patch": 6, "decay": 0.0, "skip": 0.0}),
    "d3s, noise": ("d3s", {"init": "noise", "batch": 3, "per_channel": False}),
    "sre2l, crop": ("sre2l", {"crop": "fixed", "jitter_both_ways": True}),
    "sre2l, curriculum": ("sre2l", {"crop": "cosine", "init": "random", "squeeze": "crop_flip"}),
    "dwa, crop": ("dwa", {"crop": "fixed", "r_var": 2.0, "num_moves": 2}),
    "d3hr, k-means": ("d3hr", {"sampling": "kmeans"}),
    "d3hr, code": ("d3hr", {"form": "repo", "encoding": "sample", "shared_draws": True, "mapping": "ddpm"}),
    "dit, float16": ("dit", {"precision": "float16", "guided_channels": 4}),
    "minimax, bfloat16": ("minimax", {"precision": "bfloat16", "finetune": {"epochs": 2, "memory": 1}}),
    "d3hr, bfloat16": ("d3hr", {"precision": "bfloat16", "fixed_point": 1}),
}


def same(first: Distillation, second: Distillation) -> bool:
    images = torch.equal(first.distilled.images, second.distilled.images)
    return images and torch.equal(first.losses, second.losses)


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    fit_briefly(monkeypatch)


@pytest.mark.parametrize("method", method_names())
def test_a_method_gives_the_images_of_the_cpu(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_as_cuda(monkeypatch)
    expected = distilled(method, "cpu")

    with FakeCuda(autocasts=False):
        result = distilled(method, CUDA)

    if method in CLOSE:
        assert torch.allclose(result.losses, expected.losses, rtol=1e-4)
        assert torch.allclose(result.distilled.images, expected.distilled.images, atol=1e-4)
    else:
        assert same(result, expected)


@pytest.mark.parametrize("method", method_names())
def test_a_run_that_is_cut_off_continues_as_if_it_had_not_been(method: str, tmp_path: Path) -> None:
    with FakeCuda():
        whole = distilled(method, CUDA)
        first = distilled(method, CUDA, checkpoint=tmp_path / "checkpoint.pt", until=2)
        second = distilled(method, CUDA, checkpoint=tmp_path / "checkpoint.pt")

    assert same(second, whole)
    assert second.resumed_from_step == len(first.losses) == min(2, len(whole.losses))


@pytest.mark.parametrize("method", method_names())
def test_states_and_sets_are_on_the_cpu(method: str) -> None:
    """A checkpoint and a distilled set are read on machines without a GPU."""
    with FakeCuda():
        ctx, distiller = started(method, CUDA, steps=1)
        distiller.setup(ctx)
        if distiller.num_steps:
            loss = distiller.step()["loss"]
            assert loss.device.type == "cuda" or not loss.requires_grad
        result = distiller.snapshot()
        stored = [distiller.state_dict(), result.images, result.labels, result.targets, result.compact]

        assert {place(tensor).type for tensor in tensors(stored)} == {"cpu"}


@pytest.mark.parametrize("method", method_names())
def test_a_method_stays_on_its_device(method: str) -> None:
    with FakeCuda(devices=2) as gpu:
        distilled(method, torch.device("cuda", 1), steps=2)

        assert gpu.memories[0].peak == 0


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_runs(name: str) -> None:
    method, options = VARIANTS[name]

    with FakeCuda():
        result = distilled(method, CUDA, steps=2, **options)

    assert torch.isfinite(result.distilled.images).all()
    assert torch.isfinite(result.losses).all()
