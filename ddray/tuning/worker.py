"""A worker of a search: its copy of the data, its device, and what trials do with both."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import merge
from ddray.distillation.loop import rate_name
from ddray.distillation.method import DistillContext
from ddray.errors import DivergedError
from ddray.evaluation.hard import Hard
from ddray.evaluation.linear import Linear
from ddray.evaluation.protocol import EvalContext, Evaluator, evaluate_archs
from ddray.jobs.context import make_context
from ddray.jobs.plan import Plan, RunConfig
from ddray.jobs.trainers import PoolTrainer
from ddray.methods import get_method
from ddray.pool.local import LocalPool
from ddray.pool.spec import ModelPool, PoolSource, PoolSpec
from ddray.ranking.objective import SpearmanObjective
from ddray.system.worker import set_threads, worker_device
from ddray.tuning.payload import Payload, unpack


@dataclass(frozen=True)
class SearchJob:
    """What every trial of a search shares.

    Attributes:
        run_dir: absolute path of the run.
        epoch: run epoch to publish under.
        method: the method's name.
        ipc: images per class.
        seed: the search's seed, the same for every trial (common random numbers).
        config: the resolved configuration as plain values; a trial changes `method.*`.
        budgets: rungs as parts of the last one, such as (1, 3, 9); (1,) is scored at the end only.
        cpus: cores of a worker.
        gpus: GPUs of a worker.
        nas: scores sets by how well they rank architectures; None scores them by accuracy.
        pool: where shared networks are served; None: the files under `$DDRAY_HOME`.
        budget: images of storage, for methods whose size is not counted per class.
    """

    run_dir: str
    epoch: int
    method: str
    ipc: int
    seed: int
    config: Mapping[str, Any]
    budgets: tuple[int, ...]
    cpus: float
    gpus: float
    nas: SpearmanObjective | None = None
    pool: PoolSource | None = None
    budget: int | None = None

    @property
    def objective(self) -> str:
        """What the search maximises, by its name in the rows."""
        return "val_accuracy" if self.nas is None else "val_spearman"

    def checkpoint(self, key: str) -> Path:
        """Return the path of a unit's checkpoint."""
        return Path(self.run_dir) / "checkpoints" / f"{key}.pt"

    @property
    def size(self) -> dict[str, int]:
        """The part of a unit's spec that says how much is stored: ipc, and the budget where there is one."""
        return {"ipc": self.ipc} if self.budget is None else {"ipc": self.ipc, "budget": self.budget}


def trial_config(job: SearchJob, params: Mapping[str, Any]) -> RunConfig[Any]:
    """Return the configuration of a trial.

    Raises:
        InputError: a setting breaks the method's rules.
    """
    config_type = get_method(job.method).config_type
    values = merge(job.config, {"method": dict(params)})
    return RunConfig[config_type].parse(values)  # type: ignore[valid-type]


class SearchWorker:
    """One process's part in a search.

    Args:
        job: what all trials share.
        payload: the real images.
    """

    def __init__(self, job: SearchJob, payload: Payload) -> None:
        set_threads(job.cpus)
        self.job = job
        self.data = unpack(payload)
        self.device = torch.device(worker_device(job.gpus))
        self._split_name = payload.split_name

    def plan(self, params: Mapping[str, Any], seed: int | None = None) -> Plan:
        """Return the plan of a trial; `seed` is the search's unless another is named."""
        job = self.job
        seed = job.seed if seed is None else seed
        return Plan(job.method, self.data.dataset, job.ipc, seed, trial_config(job, params), job.budget)

    def pool(self) -> ModelPool:
        """Return the pool; missing networks are trained on the payload's images."""
        trainer = PoolTrainer(self.data.dataset, self.data.split, self.device)
        return LocalPool(trainer) if self.job.pool is None else self.job.pool.connect(trainer)

    def context(self, plan: Plan) -> DistillContext:
        """Return what a plan distils from."""
        return make_context(
            plan,
            self.data.split,
            split_name=self._split_name,
            device=self.device,
            space=self.data.space,
            pool=self.pool(),
            search_seed=self.job.seed,
        )

    def score(self, plan: Plan, distilled: DistilledSet, *, num_seeds: int) -> dict[str, Any]:
        """Return the accuracy of a set on the payload's held-out part, over `num_seeds` networks."""
        config, data = plan.config.evaluate, self.data
        protocol: Evaluator = Hard(config.as_recipe())
        if distilled.targets is not None:
            flip = data.dataset.can_flip
            protocol = Linear(config.as_recipe(), config.probe, real=data.split, can_flip=flip)
        ctx = EvalContext(data.dataset, data.held_out, data.space, self.device)
        return evaluate_archs(
            protocol, distilled.decode(), ctx, archs=(plan.arch,), num_seeds=num_seeds, seed=plan.seed
        )[0]

    def val_score(self, plan: Plan, distilled: DistilledSet) -> float:
        """Return what the search maximises: mean accuracy on val, or rank correlation of architectures.

        Raises:
            DivergedError: an image is NaN or infinite.
        """
        if not distilled.is_finite():
            rate = rate_name(plan.config.method.dump())
            raise DivergedError(f"{plan.method} diverged: an image is NaN or infinite; lower {rate}")
        if self.job.nas is not None:
            return self.job.nas.score(distilled, self.data.dataset, self.data.held_out, self.device)
        config = plan.config.evaluate
        scores = self.score(plan, distilled, num_seeds=min(config.seeds, config.val_seeds))
        return float(scores["accuracy_mean"])


def train_member(job: SearchJob, payload: Payload, spec: PoolSpec) -> None:
    """Train one network of the pool on the worker's device."""
    worker = SearchWorker(job, payload)
    worker.pool().get([spec.model_copy(update={"device": worker.device.type})])
