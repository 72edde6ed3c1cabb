"""A worker of a search: its copy of the data, its device, and what trials do with both."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ddray.artifact.distilled_set import DistilledSet
from ddray.config import flatten
from ddray.data.pixels import pixel_space
from ddray.distillation.loop import rate_name
from ddray.distillation.method import DistillContext
from ddray.errors import DivergedError
from ddray.evaluation import get_protocol
from ddray.evaluation.options import EvaluateOptions
from ddray.evaluation.protocol import EvalContext, RealImages, evaluate_archs
from ddray.jobs.context import make_context
from ddray.jobs.plan import Plan
from ddray.jobs.trainers import PoolTrainer
from ddray.pool.local import LocalPool
from ddray.pool.spec import ModelPool, PoolSource, PoolSpec
from ddray.ranking.objective import SpearmanObjective
from ddray.system.worker import device_kind, set_threads, worker_device
from ddray.tuning.payload import Payload, unpack
from ddray.tuning.settings import Settings, protocol_for_sets


@dataclass(frozen=True)
class SearchJob:
    """What every trial of a search shares; cpus and gpus are those of one worker."""

    run_dir: str  # absolute
    epoch: int  # run epoch to publish under
    method: str
    ipc: int  # images per class
    seed: int  # the same for every trial (common random numbers)
    config: Mapping[str, Any]  # the resolved configuration as plain values, which a trial changes
    budgets: tuple[int, ...]  # rungs as parts of the last one, such as (1, 3, 9); (1,): the end only
    cpus: float
    gpus: float
    nas: SpearmanObjective | None = None  # scores sets by how well they rank architectures; None: by accuracy
    pool: PoolSource | None = None  # where shared networks are served; None: the files under `$DDRAY_HOME`
    budget: int | None = None  # images of storage, for methods whose size is not counted per class
    protocol: str = ""  # what scores the sets; empty: `linear` for sets with targets, else `hard`
    scoring: Mapping[str, Any] | None = None  # what is set of the protocol's own settings, if it has some
    teachers: tuple[str, ...] = ()  # of the protocol
    shards: tuple[range, ...] = ()  # classes that are distilled apart; empty: all together

    @property
    def device(self) -> str:
        """The kind of device that trials compute on."""
        return device_kind(self.gpus)

    @property
    def settings(self) -> Settings:
        """The settings that trials start from."""
        protocol = self.protocol or protocol_for_sets(self.method)
        return Settings(self.method, self.config, protocol, self.scoring)

    @property
    def objective(self) -> str:
        """What the search maximises, by its name in the rows."""
        return "val_accuracy" if self.nas is None else "val_spearman"

    def checkpoint(self, key: str) -> Path:
        """Return the path of a unit's checkpoint."""
        return Path(self.run_dir) / "checkpoints" / f"{key}.pt"

    def forget_checkpoint(self, key: str) -> None:
        """Remove a unit's checkpoint and rungs once its row is published."""
        path = self.checkpoint(key)
        shards = (shard_checkpoint(path, classes) for classes in self.shards)
        for one in (path, path.with_suffix(".rungs.json"), *shards):
            one.unlink(missing_ok=True)

    def describe(self, seed: int, fingerprint: str) -> dict[str, Any]:
        """Return what the specs of all units name: method, size (a budget where there is one), seed, data.

        A protocol is named unless it is the one that the kind of the sets calls for.
        """
        size = {"ipc": self.ipc} if self.budget is None else {"ipc": self.ipc, "budget": self.budget}
        spec = {"method": self.method, **size, "seed": seed, "fingerprint": fingerprint}
        if self.protocol:
            teachers = {"teachers": list(self.teachers)} if self.teachers else {}
            spec["options"] = {"protocol": self.protocol, **teachers}
        return spec


def shard_checkpoint(checkpoint: Path, classes: range) -> Path:
    """Return the checkpoint of a shard of the unit whose checkpoint is `checkpoint`."""
    return checkpoint.with_suffix(f".classes{classes.start}-{classes.stop}.pt")


class SearchWorker:
    """One process's part in a search, with its own copy of the real images."""

    def __init__(self, job: SearchJob, payload: Payload) -> None:
        set_threads(job.cpus)
        self.job = job
        self.data = unpack(payload)
        self.device = worker_device(job.device)
        self._split_name = payload.split_name

    def plan(self, params: Mapping[str, Any], seed: int | None = None) -> Plan:
        """Return the plan of a trial; `seed` is the search's unless another is named."""
        job, seed = self.job, self.job.seed if seed is None else seed
        config, scoring = job.settings.configs(params)
        return Plan(job.method, self.data.dataset, job.ipc, seed, config, job.budget, scoring)

    def pool(self) -> ModelPool:
        """Return the pool; missing networks are trained on the payload's images."""
        data, device = self.data, self.device

        def train(spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            return PoolTrainer(data.dataset, data.split, device)(spec)  # a shard reads all images for this

        return LocalPool(train) if self.job.pool is None else self.job.pool.connect(train)

    def context(self, plan: Plan, classes: range | None = None) -> DistillContext:
        """Return what a plan distils from, all of it or a shard of classes.

        A pixel space that is not the payload's is fitted here.
        """
        data, kind = self.data, plan.config.pixel_space
        fits = data.space.kind == kind
        shard, split = (None, data.split) if classes is None else data.shard(classes)
        return make_context(
            plan,
            split,
            split_name=self._split_name,
            device=self.device,
            space=data.space if fits else pixel_space(kind, data.dataset, data.split, self.device),
            pool=self.pool(),
            search_seed=self.job.seed,
            shard=shard,
        )

    def score(self, plan: Plan, distilled: DistilledSet, *, max_seeds: int | None = None) -> dict[str, Any]:
        """Return the accuracy of a set on the payload's held-out part.

        It is over the protocol's number of networks, or `max_seeds` if that is less.
        """
        job, data = self.job, self.data
        sets = [f"{name}={json.dumps(value)}" for name, value in flatten(dict(plan.scoring or {})).items()]
        protocol = job.settings.protocol
        options = EvaluateOptions.parse({"protocol": protocol, "teachers": job.teachers, "sets": sets})
        ctx = EvalContext(
            data.dataset,
            data.held_out,
            distilled.space(),
            self.device,
            plan.config.precision,
            plan.config.deterministic,
        )
        real = RealImages(data.split, self._split_name, self.pool())
        scoring = get_protocol(protocol).make(options, distilled, ctx, real)
        return evaluate_archs(
            scoring.evaluator,
            distilled.decode(),
            ctx,
            archs=(plan.arch,),
            num_seeds=min(scoring.num_seeds, max_seeds or scoring.num_seeds),
            seed=plan.seed,
        )[0]

    def val_score(self, plan: Plan, distilled: DistilledSet) -> float:
        """Return what the search maximises: mean accuracy on val, or rank correlation of architectures.

        DivergedError if an image is NaN or infinite.
        """
        if not distilled.is_finite():
            rate = rate_name(plan.config.method.dump())
            raise DivergedError(f"{plan.method} diverged: an image is NaN or infinite; lower {rate}")
        if self.job.nas is not None:
            return self.job.nas.score(distilled, self.data.dataset, self.data.held_out, self.device)
        scores = self.score(plan, distilled, max_seeds=plan.config.evaluate.val_seeds)
        return float(scores["accuracy_mean"])


def train_member(job: SearchJob, payload: Payload, spec: PoolSpec) -> None:
    """Train one network of the pool on the worker's device."""
    SearchWorker(job, payload).pool().get([spec])
