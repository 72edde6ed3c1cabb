"""A search's pool: one actor says who trains what, so that a network is trained once for a whole cluster.

The actor grants a lease on a missing entry to one client, which trains it and keeps the lease alive. A lease
that is not kept alive goes to the next client under a higher token (a fence): what the first one finishes
late is refused. The actor alone moves entries into their place, and holds their file locks meanwhile, so
that other clusters and processes that share the folder wait too. Weights reach each node once, through the
object store (RAY.md 11). Nothing here needs torch until an entry is opened: the actor stays small.
"""

from __future__ import annotations

import logging
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ddray.pool import LocalPool, PoolEntry, PoolSpec, Trainer, draft_entry
from ddray.pool_files import EntryLock, PoolFiles

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

log = logging.getLogger(__name__)

LEASE_S: Final = 30.0
_BEATS: Final = 4  # per lease
_POLL_S: Final = 0.2
_PATIENCE_S: Final = 120.0
_NAMESPACE: Final = "ddray"
_MAX_SHARED: Final = 64 * 2**20
"""Bytes of a tensor beyond which it stays in its file, memory-mapped (features of a whole set)."""
_BYTES: Final = {"F64": 8, "F32": 4, "F16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


@dataclass(frozen=True)
class PoolAddress:
    """Where a search's pool is served.

    Attributes:
        name: the actor's name.
        folder: the pool's folder, which all nodes share.
        lease_s: seconds that a lease lives without a heartbeat.
    """

    name: str
    folder: str
    lease_s: float = LEASE_S


@dataclass(frozen=True)
class Lease:
    """The right to train an entry, as long as its token is the newest one.

    Attributes:
        token: rises with every lease of the key.
        times_trained: the making of the entry that this would be.
    """

    token: int
    times_trained: int


@dataclass(frozen=True)
class Served:
    """A sound entry.

    Attributes:
        meta: what its `entry.json` says.
        arrays: reference to its small tensors as NumPy arrays.
        is_whole: whether those are all.
    """

    meta: dict[str, Any]
    arrays: Any
    is_whole: bool


@dataclass
class _Granted:
    lock: EntryLock
    lease: Lease
    deadline: float


class PoolService:
    """What the actor does; calls come one after another.

    Args:
        folder: the pool's folder.
        lease_s: seconds that a lease lives without a heartbeat.
        put: puts arrays into the object store.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        folder: str,
        lease_s: float = LEASE_S,
        put: Callable[[Any], Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._files = PoolFiles(Path(folder))
        self._lease_s = lease_s
        self._put = put or _put
        self._clock = clock
        self._served: dict[str, Served] = {}
        self._granted: dict[str, _Granted] = {}
        self._tokens: dict[str, int] = {}

    def ask(self, key: str) -> Served | Lease | None:
        """Return the entry; or a lease to train it; or None: somebody else is at it, ask again.

        Raises:
            InputError: the entry can't be read.
            StorageError: the folder can't be written.
        """
        return self._look(key) or self._grant(key)

    def beat(self, key: str, token: int) -> bool:
        """Keep a lease alive; return whether it still counts."""
        granted = self._current(key, token)
        if granted is None:
            return False
        granted.deadline = self._clock() + self._lease_s
        return True

    def publish(self, key: str, token: int, draft: str) -> bool:
        """Move a draft into the entry's place; return False, moving nothing, if the token is stale.

        Raises:
            StorageError: the folder can't be written.
        """
        granted = self._current(key, token)
        if granted is None:
            return False
        self._files.publish(key, Path(draft), granted.lock)
        self._end(key)
        return True

    def give_up(self, key: str, token: int) -> None:
        """End a lease without an entry: the next client may try."""
        if self._current(key, token) is not None:
            self._end(key)

    def forget(self, key: str) -> None:
        """Look at an entry's files again when it is asked for next."""
        self._served.pop(key, None)

    def _look(self, key: str) -> Served | None:
        if key not in self._served and key not in self._granted:
            meta = self._files.find(key)
            if meta is not None:
                arrays, is_whole = small_arrays(self._files.tensors_path(key))
                self._served[key] = Served(meta, self._put(arrays), is_whole)
        return self._served.get(key)

    def _grant(self, key: str) -> Served | Lease | None:
        granted = self._granted.get(key)
        if granted is None:
            lock = self._files.try_lock(key)
            if lock is None:  # a process outside of this cluster is at it
                return None
            if self._files.mend(key, lock) is not None:  # it has just finished
                lock.release()
                return self._look(key)
        elif self._clock() < granted.deadline:
            return None
        else:
            lock = granted.lock
            log.warning("pool entry %s: its trainer is silent, another one takes over", key[:12])
        self._tokens[key] = self._tokens.get(key, 0) + 1
        lease = Lease(self._tokens[key], lock.times_trained + 1)
        self._granted[key] = _Granted(lock, lease, self._clock() + self._lease_s)
        return lease

    def _current(self, key: str, token: int) -> _Granted | None:
        granted = self._granted.get(key)
        return granted if granted is not None and granted.lease.token == token else None

    def _end(self, key: str) -> None:
        self._granted.pop(key).lock.release()


def _put(value: Any) -> Any:
    import ray

    return ray.put(value)


def small_arrays(path: Path) -> tuple[dict[str, np.ndarray[Any, Any]], bool]:
    """Return an entry's tensors up to 64 MiB as arrays, and whether those are all."""
    from safetensors import safe_open

    found = {}
    with safe_open(path, framework="numpy") as file:
        names = list(file.keys())
        for name in names:
            held = file.get_slice(name)
            size = _BYTES.get(held.get_dtype())  # NumPy has no bfloat16
            if size is not None and size * math.prod(held.get_shape()) <= _MAX_SHARED:
                found[name] = file.get_tensor(name)
    return found, len(found) == len(names)


@contextmanager
def pool_service(address: PoolAddress) -> Iterator[None]:
    """Serve a pool under `address` while the block runs; on this node if it has room."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    options = {
        "name": address.name,
        "namespace": _NAMESPACE,
        "num_cpus": 0,
        "max_restarts": 0,
        "scheduling_strategy": here,
    }
    actor: Any = ray.remote(PoolService).options(**options).remote(address.folder, address.lease_s)
    try:
        yield
    finally:
        ray.kill(actor)


class _ServiceGoneError(Exception):
    """The actor is dead, or does not answer."""


class ClusterPool:
    """A pool that the workers of a cluster share.

    Args:
        trainer: trains, in this process, a spec that is not there yet.
        address: where the pool is served.
    """

    def __init__(self, trainer: Trainer, address: PoolAddress) -> None:
        self._trainer = trainer
        self._address = address
        self._files = PoolFiles(Path(address.folder))
        self._service: Any = None
        self._unpublished: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]] = {}

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        """Return the entries of `specs`, in order; what is missing is trained here, or by whoever is at it.

        Clients that ask for the same entries share the work. Without its service the pool goes on with the
        files alone.

        Raises:
            InputError: an entry can't be read.
            StorageError: an entry can't be written.
        """
        entries: dict[str, PoolEntry] = {}
        missing = {spec.key: spec for spec in specs}
        try:
            while missing:
                if not self._round(missing, entries):
                    time.sleep(_POLL_S)
        except _ServiceGoneError as error:
            log.warning(
                "the pool's service is gone (%s): going on with the files in %s", error, self._files.folder
            )
            rest = LocalPool(self._remembered, self._files.folder).get(list(missing.values()))
            entries.update(zip(missing, rest, strict=True))
        return [entries[spec.key] for spec in specs]

    def _round(self, missing: dict[str, PoolSpec], entries: dict[str, PoolEntry]) -> bool:
        """Ask once for every missing entry, train those that are leased; return whether anything was done."""
        before = len(missing)
        trained = False
        for key, spec in list(missing.items()):
            answer = self._call("ask", key)
            if isinstance(answer, Lease):
                self._train(spec, answer)
                trained = True
            elif answer is not None and (entry := self._open(key, answer)) is not None:
                entries[key] = entry
                del missing[key]
        return trained or len(missing) < before

    def _train(self, spec: PoolSpec, lease: Lease) -> None:
        """Train an entry and hand it in."""
        key = spec.key
        with self._beating(key, lease.token):
            try:
                draft = draft_entry(self._files, spec, self._trained, times_trained=lease.times_trained)
            except BaseException:
                with suppress(_ServiceGoneError):
                    self._call("give_up", key, lease.token)
                raise
            taken = self._call("publish", key, lease.token, str(draft))
        del self._unpublished[key]
        if not taken:
            shutil.rmtree(draft, ignore_errors=True)
            log.warning("pool entry %s: finished too late, another process has taken over", key[:12])

    def _trained(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Train, and keep the result until it is published: the service may die before."""
        self._unpublished[spec.key] = self._trainer(spec)
        return self._unpublished[spec.key]

    def _remembered(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        return self._unpublished.pop(spec.key, None) or self._trainer(spec)

    def _open(self, key: str, served: Served) -> PoolEntry | None:
        """Return this process's own copy of an entry; None if its file was damaged meanwhile."""
        import torch
        from safetensors import SafetensorError, safe_open

        # Copied: an alias of shared memory could be written to, for everybody on the node (RAY.md 11).
        tensors = {name: torch.tensor(array) for name, array in self._fetch(served.arrays).items()}
        if not served.is_whole:
            try:
                with safe_open(self._files.tensors_path(key), framework="pt") as file:
                    rest = set(file.keys()) - set(tensors)
                    tensors |= {name: file.get_tensor(name) for name in rest}
            except (OSError, SafetensorError):
                self._call("forget", key)
                return None
        return PoolEntry(served.meta, tensors)

    @contextmanager
    def _beating(self, key: str, token: int) -> Iterator[None]:
        """Keep a lease alive while the block runs."""
        ended = threading.Event()

        def beat() -> None:
            while not ended.wait(self._address.lease_s / _BEATS):
                self._service.beat.remote(key, token)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _call(self, method: str, *arguments: Any) -> Any:
        """Return what the service answers.

        Raises:
            _ServiceGoneError: it does not.
        """
        import ray

        if self._service is None:
            try:
                self._service = ray.get_actor(self._address.name, namespace=_NAMESPACE)
            except ValueError as error:
                raise _ServiceGoneError(f"no actor {self._address.name}") from error
        return self._fetch(getattr(self._service, method).remote(*arguments))

    def _fetch(self, reference: Any) -> Any:
        import ray

        lost = (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError)
        try:
            return ray.get(reference, timeout=_PATIENCE_S)
        except lost as error:
            raise _ServiceGoneError(" ".join(str(error).split())[:120]) from error
