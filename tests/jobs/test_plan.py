from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from ddray.data import fit_zca
from ddray.data.pixels import pixel_space
from ddray.errors import DeviceMemoryError, InputError
from ddray.jobs import context
from ddray.jobs import plan as module
from ddray.jobs.context import check_ipc, make_context, make_distiller, pick_device
from ddray.jobs.options import PlanOptions
from ddray.jobs.plan import PRESETS, Plan, plan_of, resolve, shipped_configs
from ddray.methods import get_method, method_names
from ddray.nets import multiply_adds
from ddray.nets.names import resolve_arch

CPU = torch.device("cpu")


AUGMENTED = [name for name in method_names() if "augment" in get_method(name).config_type.model_fields]


def test_the_work_of_a_run_counts_what_its_steps_compute(digits: Any) -> None:
    def work(method: str, ipc: int = 1, **settings: Any) -> float:
        layer = {"arch": "convnet2_w8", "steps": 9, "method": {"batch_real": 30, **settings}}
        return resolve(method, digits, ipc=ipc, layers=[layer]).work

    each = multiply_adds("convnet2_w8", digits.image_shape)
    assert work("dm") == 10 * (10 + 10 * 30) * each
    assert work("dd", distill_epochs=1) == 10 * (10 + 30) * each  # a batch of all classes together
    assert work("dd", distill_epochs=4, num_nets=2) == 10 * 2 * (40 + 30) * each
    assert work("dd", distill_epochs=4, num_nets=2, net_init="fixed") == 10 * (40 + 30) * each
    assert work("kip", 3) / work("kip") == (30 * (30 + 30)) / (10 * (10 + 30))  # pairs
    assert work("kip", kernel="conv3") > 20 * work("kip")

    def student(method: str, ipc: int, batch: int | None) -> float:
        settings = {"inner_steps": 7, "batch_syn": batch}
        layer = {"arch": "convnet2_w8", "steps": 9, "method": settings}
        return resolve(method, digits, ipc=ipc, layers=[layer]).work

    assert student("mtt", 3, 20) == 10 * 7 * 20 * each  # N batches of the student
    assert student("datm", 3, None) == student("mtt", 3, 50) == 10 * 7 * 30 * each


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("method", AUGMENTED)
def test_spectrograms_are_not_augmented_while_matching(
    method: str, preset: str, sounds: Any, toy: Any
) -> None:
    """No preset augments them; images of the same shape are augmented, and settings can turn it on."""
    assert {"dm", "dsa", "idm", "m3d", "dsdm", "dc", "cafe", "datadam"} <= set(AUGMENTED)
    config = resolve(method, sounds, ipc=1, preset=preset).config
    assert config.method.augment == "none"
    grey = toy(shape=(1, 64, 64), name="grey")
    pictures, small = (
        resolve(method, data, ipc=1, preset=preset).config for data in (grey, toy(shape=(1, 32, 32)))
    )
    assert pictures.method.augment == small.method.augment
    assert pictures.evaluate.augment == small.evaluate.augment
    overridden = resolve(method, sounds, ipc=1, preset=preset, layers=[{"method": {"augment": "dsa"}}]).config
    assert overridden.method.augment == "dsa"


def test_a_set_that_cannot_be_of_sounds_is_not_read_for_it(toy: Any) -> None:
    def broken() -> Any:
        raise InputError("train is read")

    dataset = dataclasses.replace(toy(), load_train=broken)
    assert resolve("dm", dataset, ipc=1).config.method.augment == "dsa"


@pytest.mark.parametrize(
    ("method", "settings", "cutmix"),
    [
        ("dsdm", {}, 0.0),
        ("dsdm", {"factor": 2}, 0.0),
        ("dsdm", {"factor": 1}, 0.5),
        ("m3d", {"factor": 3}, 0.5),
    ],
)
@pytest.mark.parametrize("layer", [{}, {"recipe": "idc"}])
def test_mnist_is_mixed_unless_it_is_cut_in_two(
    method: str, settings: dict[str, Any], cutmix: float, layer: dict[str, Any], toy: Any
) -> None:
    mnist = toy(shape=(1, 28, 28), name="mnist", can_flip=False)
    layers = [{"method": settings}, {"evaluate": layer}]
    assert resolve(method, mnist, ipc=1, layers=layers).config.evaluate.cutmix == cutmix
    layers = [*layers, {"evaluate": {"cutmix": 0.25}}]
    assert resolve(method, mnist, ipc=1, layers=layers).config.evaluate.cutmix == 0.25


def test_the_idc_recipe_mixes_mnist_where_nothing_is_cut(toy: Any) -> None:
    mnist = toy(shape=(1, 28, 28), name="mnist", can_flip=False)
    layers = [{"evaluate": {"recipe": "idc"}}]
    assert resolve("dm", mnist, ipc=1, layers=layers).config.evaluate.cutmix == 0.5
    assert resolve("dsdm", toy(), ipc=1, layers=layers).config.evaluate.cutmix == 0.5


def test_layers_win_in_order(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Preset, then <dataset>.yaml, then <dataset>_ipc<k>.yaml, then --config, then --set, then --steps."""
    folder = tmp_path / "configs" / "dm"
    folder.mkdir(parents=True)
    monkeypatch.setattr(module, "shipped", lambda *parts: tmp_path.joinpath(*parts))
    dataset = toy()

    def settings(**changes: Any) -> tuple[float, float, float, float, int]:
        config = plan_of(PlanOptions.parse({"method": "dm", "ipc": 2, **changes}), dataset).config
        method = config.method
        return method.lr_img, method.momentum, method.batch_real, config.evaluate.epochs, config.steps

    assert settings() == (1.0, 0.5, 256, 1000, 20_000)
    (folder / "toy.yaml").write_text("steps: 7\nmethod: {lr_img: 2, momentum: .1, batch_real: 3}\n")
    assert settings() == (2.0, 0.1, 3, 1000, 7)
    (folder / "toy_ipc2.yaml").write_text("evaluate: {epochs: 9}\nmethod: {lr_img: 3, momentum: .2}\n")
    (folder / "toy_ipc3.yaml").write_text("method: {lr_img: 99}\n")
    assert settings() == (3.0, 0.2, 3, 9, 7)
    (tmp_path / "own.yaml").write_text("method: {momentum: .3}\nsteps: 1e1\n")
    assert settings(config=tmp_path / "own.yaml") == (3.0, 0.3, 3, 9, 10)
    later = {"sets": ["method.momentum=.4", "steps=11", "method.momentum=.5"], "steps": 12}
    assert settings(config=tmp_path / "own.yaml", **later) == (3.0, 0.5, 3, 9, 12)


def test_precision_and_determinism_change_no_key_at_their_defaults(digits: Any) -> None:
    def plan(**options: Any) -> Plan:
        return plan_of(PlanOptions(method="dm", ipc=1, **options), digits)

    default = plan().describe()
    assert "precision" not in default
    assert "deterministic" not in default
    assert plan(precision="tf32", deterministic=False).describe() == default
    changed = plan(sets=("precision=fp32",), precision="bf16", deterministic=True).describe()
    assert changed == {**default, "precision": "bf16", "deterministic": True}
    assert plan(sets=("precision=auto",)).config.precision == "auto"
    with pytest.raises(InputError, match="precision"):
        plan(sets=("precision=half",))


def test_steps_win_over_sets_and_settings_over_both(digits: Any) -> None:
    def steps(steps: int | None = None, settings: Any = None) -> int:
        options = {"method": "dm", "ipc": 1, "sets": ["steps=3"], "steps": steps}
        return plan_of(PlanOptions.parse(options), digits, settings or {}).config.steps

    assert (steps(), steps(0), steps(0, {"steps": 5})) == (3, 0, 5)
    options = PlanOptions.parse({"method": "dm", "ipc": 1, "steps": 4})
    assert plan_of(options, digits, {"method.lr_img": 0.5}).config.method.lr_img == 0.5


@pytest.mark.parametrize("is_open", [False, True])
@pytest.mark.parametrize(
    ("options", "settings"),
    [({"sets": ["can_flip=true"]}, {}), ({"can_flip": True}, {}), ({"can_flip": False}, {"can_flip": True})],
)
def test_options_of_content_may_be_among_the_settings(
    digits: Any, options: dict[str, Any], settings: dict[str, Any], is_open: bool
) -> None:
    parsed = PlanOptions.parse({"method": "dm", "ipc": 1, **options})
    plan = plan_of(parsed, digits if is_open else None, settings)
    assert plan.dataset.can_flip
    assert plan.describe()["dataset"] == "digits?can_flip=true"
    assert plan.describe()["fingerprint"] == digits.fingerprint
    plain = plan_of(PlanOptions.parse({"method": "dm", "ipc": 1}), digits)
    assert plan.config == plain.config  # shipped files and recipes go by the name without options


def test_a_config_file_may_name_options_of_content_which_the_command_overrides(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("steps: 3\ncan_flip: true\nimage_size: 12\n")

    def plan(**options: Any) -> Plan:
        return plan_of(
            PlanOptions.parse({"method": "dm", "ipc": 1, "config": tmp_path / "own.yaml", **options})
        )

    assert (plan().config.steps, plan().dataset.can_flip, plan().dataset.image_shape) == (
        3,
        True,
        (1, 12, 12),
    )
    assert plan(image_size=8).dataset.name == "digits?can_flip=true&image_size=8"
    assert plan(can_flip=True, sets=["can_flip=false"]).dataset.name == "digits?can_flip=false&image_size=12"


def test_a_methods_settings_go_by_short_and_full_names_whose_last_one_wins(tmp_path: Path) -> None:
    (tmp_path / "best.yaml").write_text("lr_img: 0.25\npool: {num_models: 3}\nmethod: {pool: {epochs: 2}}\n")

    def plan(method: str = "dsdm", **options: Any) -> Plan:
        values = {"method": method, "ipc": 1, "config": tmp_path / "best.yaml", **options}
        return plan_of(PlanOptions.parse(values), settings=None)

    in_file = plan().config.method
    assert (in_file.lr_img, in_file.pool.num_models, in_file.pool.epochs) == (0.25, 3, 2)
    assert plan(sets=["method.lr_img=0.5"]).config == plan(sets=["lr_img=0.5"]).config
    assert plan(sets=["lr_img=0.1", "lr_img=0.5"]).config.method.lr_img == 0.5
    both = plan("dm", config=None, sets=["precision=bf16", "method.precision=fp32"]).config
    assert (both.precision, both.method.precision) == ("bf16", "fp32"), "the run's own name comes first"


@pytest.mark.parametrize("name", ["../dm", "/etc/passwd", "a b", "", "Digits", "a.b"])
def test_a_dataset_given_by_path_has_no_shipped_files(name: str) -> None:
    assert shipped_configs("dm", name, 1) == []
    assert [path.name for path in shipped_configs("dm", "digits", 1)] == ["digits.yaml"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "datadm"}, "did you mean 'datadam'"),
        ({"preset": "papers"}, "preset must be one of paper, repo, got 'papers'; did you mean 'paper'"),
        ({"ipc": 0}, "ipc must be >= 1, got 0"),
        ({"layers": [{"stepz": 1}]}, "unknown option 'stepz'; did you mean 'steps'"),
        ({"layers": [{"method": {"lr_imgs": 1}}]}, "unknown option 'method.lr_imgs'; did you mean 'lr_img'"),
        ({"layers": [{"evaluate": {"epoch": 1}}]}, "unknown option 'evaluate.epoch'; did you mean 'epochs'"),
        ({"layers": [{"lr_imgs": 1}]}, "unknown option 'lr_imgs'; did you mean 'lr_img'"),
        (
            {"layers": [{"evalute": {"epochs": 1}}]},
            "unknown option 'evalute.epochs'; did you mean 'evaluate.ep",
        ),
        ({"layers": [{"epochs": 1}]}, r"unknown option 'epochs'; did you mean 'evaluate.epochs'\?"),
        (
            {"method": "dsdm", "layers": [{"epochs": 1}]},
            "unknown option 'epochs'; did you mean 'pool.epochs' or 'evaluate.epochs'",
        ),
        ({"layers": [{"qqq": 1}]}, "unknown option 'qqq'; known: .*lr_img"),
        (
            {"layers": [{"lr_img": 1, "method": {"lr_img": 2}}]},
            "lr_img must be set once, got method.lr_img too: keep one",
        ),
        ({"layers": [{"lr_img": "x"}]}, "method.lr_img: .*got 'x'"),
        ({"layers": [{"steps": -1}]}, "steps: .*got -1"),
        ({"layers": [{"compile": "maybe"}]}, "compile: .*got 'maybe'"),
        ({"layers": [{"arch": "convnet9"}]}, "convnet9"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], message: str, toy: Any) -> None:
    values = {"method": "dm", "ipc": 1, **changes}
    with pytest.raises(InputError, match=message):
        resolve(values.pop("method"), toy(), **values)


@pytest.mark.parametrize(
    ("arch", "shape", "expected"),
    [
        ("auto", (3, 32, 32), "convnet3"),
        ("auto", (3, 64, 64), "convnet4"),
        ("auto", (3, 128, 128), "convnet5"),
        ("auto_bn", (3, 32, 32), "convnet3_bn"),
        ("auto_w64", (3, 64, 64), "convnet4_w64"),
        ("resnet18", (3, 32, 32), "resnet18"),
    ],
)
def test_auto_is_the_fields_convnet(arch: str, shape: tuple[int, int, int], expected: str) -> None:
    assert resolve_arch(arch, shape) == expected


def test_ipc_must_fit_the_largest_class(toy: Any) -> None:
    dataset = toy(counts=(9, 4, 8))
    for ipc in (4, 5, 9):
        check_ipc(ipc, dataset.train(), dataset)
    for ipc in (0, 10):
        with pytest.raises(
            InputError, match=rf"ipc must be in 1\.\.9 for toy \(its largest class\), got {ipc}"
        ):
            check_ipc(ipc, dataset.train(), dataset)


def test_a_context_is_refused_for_an_ipc_that_does_not_fit(toy: Any) -> None:
    dataset = toy()
    plan = resolve("random", dataset, ipc=10)
    with pytest.raises(InputError, match=r"ipc must be in 1\.\.9"):
        make_context(plan, dataset.train(), split_name="train", device=CPU)


def test_steps_of_a_method_without_steps_are_refused(toy: Any) -> None:
    plan = resolve("herding", toy(), ipc=1, layers=[{"steps": 3}])
    with pytest.raises(InputError, match="steps must be 0 for herding, got 3"):
        make_distiller(plan)


def test_pixel_spaces(toy: Any) -> None:
    dataset = toy()
    split = dataset.train()

    normalized = pixel_space("normalized", dataset, split)
    assert (normalized.kind, normalized.mean, normalized.std) == ("normalized", dataset.mean, dataset.std)
    raw = pixel_space("raw", dataset, split)
    torch.testing.assert_close(raw.encode(split.images), split.images / 255)
    zca = pixel_space("zca", dataset, split).zca_matrix
    expected = fit_zca(split).zca_matrix
    assert zca is not None
    assert expected is not None
    assert torch.equal(zca, expected)


def test_a_context_holds_what_the_plan_says(toy: Any) -> None:
    dataset = toy()
    plan = resolve("dm", dataset, ipc=2, seed=5, layers=[{"arch": "convnet2_w8_bn", "compile": "off"}])
    space = fit_zca(dataset.train())

    ctx = make_context(plan, dataset.train(), split_name="train-val0", device=CPU, space=space)

    assert (ctx.ipc, ctx.seed, ctx.arch, ctx.split_name) == (2, 5, "convnet2_w8_bn", "train-val0")
    assert ctx.space is space
    assert not ctx.compile
    assert ctx.config == plan.config.dump()


@pytest.mark.parametrize(
    ("layer", "bytes_of_it"),
    [
        ({}, None),
        ({"memory_budget": "auto"}, None),
        ({"memory_budget": "64MiB"}, 2**26),
        ({"memory_budget": 5}, 5),
    ],
)
def test_a_memory_budget_reaches_the_method(layer: dict[str, Any], bytes_of_it: Any, toy: Any) -> None:
    dataset = toy()
    plan = resolve("dm", dataset, ipc=1, layers=[{"compile": "off"}, layer])

    ctx = make_context(plan, dataset.train(), split_name="train", device=CPU)

    assert ctx.memory_budget == bytes_of_it
    assert ("memory_budget" in plan.describe()) == (bytes_of_it is not None), (
        "units from before keep their keys"
    )


@pytest.mark.parametrize("text", ["much", "64MB", "0"])
def test_a_memory_budget_that_is_no_size_is_refused_in_one_line(text: str, toy: Any) -> None:
    with pytest.raises(
        InputError, match=rf"memory_budget: must be a number of bytes.*such as 64MiB, got '{text}'"
    ):
        resolve("dm", toy(), ipc=1, layers=[{"memory_budget": text}])


def test_what_a_plan_says_of_itself_differs_with_everything_that_decides(toy: Any) -> None:
    dataset = toy()
    plan = resolve("dm", dataset, ipc=1)
    others = [
        dataclasses.replace(plan, seed=1),
        dataclasses.replace(plan, ipc=2),
        dataclasses.replace(plan, method="mmd_pixel"),
        dataclasses.replace(plan, dataset=toy(seed=1)),
        resolve("dm", dataset, ipc=1, layers=[{"method": {"lr_img": 2}}]),
    ]

    descriptions = [repr(sorted(variant.describe().items())) for variant in (plan, *others)]

    assert len(set(descriptions)) == len(descriptions)
    assert plan.describe()["method_name"] == "dm"
    assert plan.describe()["method"]["lr_img"] == 1.0


def test_devices(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert pick_device("auto") == pick_device("cpu") == pick_device("cpu:0") == CPU
    with pytest.raises(InputError, match="--device cuda: torch sees 0 CUDA devices; use --device cpu"):
        pick_device("cuda")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(context, "cuda_failure", lambda device="cuda": None)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    for name in ("gpu", "mps", "meta", "cuda:x", ""):
        with pytest.raises(InputError, match="--device must be auto, cpu, cuda"):
            pick_device(name)
    with pytest.raises(InputError, match="--device cuda:2: torch sees 2 CUDA devices"):
        pick_device("cuda:2")

    monkeypatch.setattr(context, "cuda_failure", lambda device="cuda": f"old driver of {device}")
    assert pick_device("auto") == CPU
    assert caplog.messages == ["torch can't use the GPU (old driver of cuda): computing on the CPU"]
    with pytest.raises(InputError, match="--device cuda:1: torch can't use it: old driver of cuda:1"):
        pick_device("cuda:1")

    def is_full(device: str = "cuda") -> str:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(context, "cuda_failure", is_full)
    for name in ("auto", "cuda:1"):  # others have the memory: one line, and no run on the CPU
        with pytest.raises(DeviceMemoryError, match="out of memory"):
            pick_device(name)


@pytest.mark.parametrize(("name", "entered"), [("cuda:1", ["cuda:1"]), ("cuda", []), ("cpu", [])])
def test_a_numbered_gpu_is_the_current_one_while_it_is_used(
    monkeypatch: pytest.MonkeyPatch, name: str, entered: list[str]
) -> None:
    current: list[str] = []

    @contextmanager
    def enter(device: torch.device) -> Iterator[None]:
        current.append(str(device))
        yield
        current.clear()

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(context, "cuda_failure", lambda device="cuda": None)
    with context.on_device(name) as device:
        assert (str(device), current) == (name, entered)
    assert not current
