"""What a run needs before its first step: device, pixel space, pool, and checks against the data."""

import logging
import shutil
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Final

import torch

from ddray.data import Dataset, PixelSpace, Split
from ddray.data.pixels import pixel_space
from ddray.distillation.method import DistillContext, Distiller, schedule_of
from ddray.distillation.shards import Shard
from ddray.errors import InputError
from ddray.jobs.plan import Plan, budget_method
from ddray.jobs.trainers import PoolTrainer
from ddray.methods import get_method
from ddray.nets import build_net
from ddray.nets.names import parse_arch
from ddray.pool.local import LocalPool
from ddray.pool.spec import ModelPool, PoolSpec
from ddray.runs.recovery import recovering
from ddray.system.gpus import num_gpus
from ddray.system.worker import cuda_failure

log = logging.getLogger(__name__)
# Real 32x32x3 images after which compiling (about 20 s on 2 cores) has paid for itself fourfold.
_COMPILE_WORTH: Final = 500_000


def wants_compile(
    choice: str, *, num_steps: int, images_per_step: int, image_shape: tuple[int, int, int]
) -> bool:
    """Decide whether to compile the branch of the real images, of `image_shape` (C, H, W).

    `choice` is `on` (InputError without a C++ compiler), `off`, or `auto`: with a compiler on the PATH and a
    run long enough to repay it.
    """
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if choice == "on" and compiler is None:
        raise InputError(
            "compile=on needs a C++ compiler (g++ or clang++) on the PATH; install one or use compile=off"
        )
    if choice != "auto":
        return choice == "on"
    equivalent_images = num_steps * images_per_step * image_shape[1] * image_shape[2] / 1024
    return compiler is not None and equivalent_images >= _COMPILE_WORTH


def check_ipc(ipc: int, split: Split, dataset: Dataset) -> None:
    """Reject an ipc that no class of the split has as many images as: the InputError says which fits.

    Smaller classes are the methods' own matter: what learns images makes ipc of them all the same, a
    selection gives what there is, with a warning.
    """
    largest = int(torch.bincount(split.labels, minlength=dataset.num_classes).max())
    if not 1 <= ipc <= largest:
        raise InputError(f"ipc must be in 1..{largest} for {dataset.name} (its largest class), got {ipc}")


def check_size(plan: Plan, split: Split) -> None:
    """Reject a run whose ipc or budget does not fit the split: the InputError says which would."""
    method_class = budget_method(plan.method)
    if method_class is None or plan.budget is None:
        check_ipc(plan.ipc, split, plan.dataset)
        return

    def num_stored(budget: int) -> int:
        shape = plan.dataset.image_shape
        return method_class.num_distilled(plan.config.method, budget, shape, len(split))

    budget, name = plan.budget, plan.dataset.name
    num = num_stored(budget)
    if num < 1:
        enough = budget
        while num_stored(enough) < 1:
            enough *= 2
        least = budget + bisect_left(range(budget, enough), 1, key=num_stored)
        raise InputError(f"budget must be >= {least} images for {plan.method} on {name}, got {budget}")
    if num > len(split):
        too_many = 1  # a range can't be as long as any budget
        while num_stored(too_many) <= len(split):
            too_many *= 2
        most = bisect_right(range(1, too_many), len(split), key=num_stored)
        raise InputError(f"budget must be <= {most} for {name} ({len(split)} images), got {budget}")


@contextmanager
def on_device(name: str) -> Iterator[torch.device]:
    """Pick a device (`pick_device`); of several GPUs it is torch's current one while the block runs."""
    device = pick_device(name)
    # For what takes no device: streams, graphs, `synchronize`, tensors on plain "cuda".
    with nullcontext() if device.index is None else torch.cuda.device(device):
        yield device


def pick_device(name: str) -> torch.device:
    """Return the device called `name`, `auto` for CUDA if that works.

    InputError if there is none, DeviceMemoryError if others have all of its memory.
    """
    if name == "auto":
        if not num_gpus():
            return torch.device("cpu")
        if (reason := recovering(cuda_failure)) is None:
            return torch.device("cuda")
        log.warning("torch can't use the GPU (%s): computing on the CPU", reason)
        return torch.device("cpu")
    device = None
    with suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be auto, cpu, cuda or cuda:<n>, got {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    if (device.index or 0) >= num_gpus():
        raise InputError(f"--device {name}: torch sees {num_gpus()} CUDA devices; use --device cpu")
    if (reason := recovering(cuda_failure, name)) is not None:
        raise InputError(f"--device {name}: torch can't use it: {reason}; use --device cpu")
    return device


def make_context(
    plan: Plan,
    split: Split,
    *,
    split_name: str,
    device: torch.device,
    space: PixelSpace | None = None,
    pool: ModelPool | None = None,
    search_seed: int = 0,
    shard: Shard | None = None,
) -> DistillContext:
    """Return the context in which a method distils `split`, the part of the dataset called `split_name`.

    A search fits `space` once for many trials. The default `pool` is the files under `$DDRAY_HOME`.
    `search_seed` is the seed of the search whose final run this is, `shard` what `split` has the classes of;
    None: of all. InputError as for `check_size` and
    `check_plan`.
    """
    check_size(plan, split if shard is None else shard.whole)
    config, dataset = plan.config, plan.dataset
    return DistillContext(
        dataset=dataset,
        split=split,
        split_name=split_name,
        space=space or pixel_space(config.pixel_space, dataset, split, device),
        ipc=plan.ipc,
        arch=plan.arch,
        seed=plan.seed,
        device=device,
        pool=pool or LocalPool(PoolTrainer(dataset, split, device)),
        compile=check_plan(plan),
        method=plan.method,
        config=config.dump(),
        budget=plan.budget,
        search_seed=search_seed,
        memory_budget=config.memory_budget,
        shard=shard,
    )


def check_plan(plan: Plan) -> bool:
    """Check the settings that depend on the network; return whether its hot function will be compiled.

    InputError if it does not fit the images, lacks inner layers that the method needs or one of its `layers`,
    or compile=on finds no compiler.
    """
    config, dataset = plan.config, plan.dataset
    net = build_net(plan.arch, dataset.image_shape, dataset.num_classes, seed=0).eval()
    is_external, layers = parse_arch(plan.arch).is_external, getattr(config.method, "layers", None)
    needs_maps = is_external and getattr(config.method, "uses_maps", False)
    if layers is not None or needs_maps:
        with torch.no_grad():
            num = len(net.features(torch.zeros(1, *dataset.image_shape)).maps)
        if needs_maps and not num:
            raise InputError(
                f"{plan.method} needs the inner layers of its network, net {plan.arch} shows none: let it "
                "return ddray.nets.Features, or use another arch"
            )
        if not all(1 <= layer <= num for layer in layers or ()):
            raise InputError(
                f"method.layers must be within 1..{num} for {plan.arch}, got {list(layers or ())}"
            )
    is_wanted = wants_compile(
        config.compile,
        num_steps=config.steps,
        images_per_step=int(getattr(config.method, "batch_real", 0)) * dataset.num_classes,
        image_shape=dataset.image_shape,
    )
    return is_wanted and not is_external and getattr(config.method, "compiles", False)


def check_longer(shorter: Plan, plan: Plan) -> None:
    """Refuse to continue a run for more steps unless its first ones are those of the longer run.

    InputError if the method depends on the number of steps, or only the longer run is compiled.
    """
    if shorter.config.steps == 0:
        return
    steps = plan.config.steps
    rule = f"--steps {steps} can't continue a run of {shorter.config.steps}"
    if schedule := schedule_of(get_method(plan.method)):
        raise InputError(f"{rule}, {plan.method} depends on their number: {schedule}; use a new --run-dir")
    if check_plan(shorter) != check_plan(plan):
        reason = f"compile=auto compiles a run of {steps} from its first step, and has not compiled this one"
        raise InputError(f"{rule}: {reason}; use a new --run-dir")


def make_distiller(plan: Plan) -> Distiller:
    """Return the plan's method object; InputError if a method without steps is to run some."""
    distiller = get_method(plan.method)(plan.config.method, plan.config.steps)
    if distiller.num_steps != plan.config.steps:
        raise InputError(f"steps must be {distiller.num_steps} for {plan.method}, got {plan.config.steps}")
    return distiller


def declared_specs(plan: Plan, ctx: DistillContext) -> list[PoolSpec]:
    """Return the pool entries that the method will use: its `pool_specs(ctx)`, if it defines that.

    Declared networks are trained in parallel before a search's first trial.
    """
    declare = getattr(make_distiller(plan), "pool_specs", None)
    return [] if declare is None else list(declare(ctx))
