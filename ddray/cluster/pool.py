"""A search's pool: one actor decides who trains what, so that a network is trained once per cluster.

The actor grants a lease on a missing entry to one client, which trains it and keeps the lease alive. A lease
that is not kept alive lapses and goes to the next client under a higher token (a fence): a late result of the
first client is then refused. Only the actor moves entries into place. It holds their file locks while a lease
stands, so that other clusters and processes that share the folder wait too. A client goes on without the
actor only when the actor is dead: a slow one may still grant the lease. Weights reach each node once, through
the object store (docs/ray.md, 11); trajectories are read from their files. torch is imported only to open an
entry: the actor stays small.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ddray.pool.files import EntryLock, PoolFiles, small_arrays
from ddray.pool.local import LocalPool, draft_entry
from ddray.pool.spec import PoolEntry, PoolSpec, Trainer

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

LEASE_S: Final = 30.0
_BEATS: Final = 4  # per lease
_POLL_S: Final = 0.2
_PATIENCE_S: Final = 120.0
_NAMESPACE: Final = "ddray"


@dataclass(frozen=True)
class PoolAddress:
    """Where a search's pool is served."""

    name: str  # the actor's
    folder: str  # the pool's, which all nodes share
    lease_s: float = LEASE_S  # that a lease lives without a heartbeat

    def connect(self, trainer: Trainer) -> ClusterPool:
        """Return a client that trains with `trainer` what it gets the lease of."""
        return ClusterPool(trainer, self)


@dataclass(frozen=True)
class Lease:
    """The right to train an entry, as long as its token is the newest one."""

    token: int  # rises with every lease of the key
    times_trained: int  # how often the entry will have been trained, this time included


@dataclass(frozen=True)
class Served:
    """An intact entry."""

    meta: dict[str, Any]  # contents of its `entry.json`
    arrays: Any  # reference to its small tensors as NumPy arrays
    is_whole: bool  # whether it has no other tensors


@dataclass
class _Granted:
    lock: EntryLock
    lease: Lease
    deadline: float


class PoolService:
    """The actor's class; calls run one at a time, beside the thread that lets leases lapse.

    `put` puts arrays into the object store, `clock` returns monotonic seconds.
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
        self._lapsed: dict[str, Lease] = {}
        self._turn = threading.RLock()

    def watch(self) -> None:
        """Let leases lapse in a thread too: processes that wait for their locks may never call `ask`."""

        def lapse_periodically() -> None:
            while True:
                time.sleep(self._lease_s / _BEATS)
                self.lapse()

        threading.Thread(target=lapse_periodically, daemon=True).start()

    def lapse(self) -> None:
        """End the leases that were not kept alive, and release their locks."""
        with self._turn:
            for key, granted in list(self._granted.items()):
                if self._clock() >= granted.deadline:
                    log.warning("pool entry %s: its trainer is silent, another one may take over", key[:12])
                    self._end(key)
                    self._lapsed[key] = granted.lease

    def ask(self, key: str) -> Served | Lease | None:
        """Return the entry, or a lease to train it, or None while another client trains it: ask again.

        InputError if the entry can't be read, StorageError if the folder can't be written.
        """
        with self._turn:
            self.lapse()
            return self._look(key) or self._grant(key)

    def beat(self, key: str, token: int) -> bool:
        """Keep a lease alive; return whether it is still valid."""
        with self._turn:
            granted = self._current(key, token)
            if granted is not None:
                granted.deadline = self._clock() + self._lease_s
            return granted is not None

    def publish(self, key: str, token: int, draft: str) -> bool:
        """Move a draft into the entry's place; return False, moving nothing, if the token is stale.

        StorageError if the folder can't be written.
        """
        with self._turn:
            granted = self._current(key, token)
            if granted is None:
                return False
            self._files.publish(key, Path(draft), granted.lock)
            self._end(key)
            return True

    def give_up(self, key: str, token: int) -> None:
        """End a lease without an entry: the next client may try."""
        with self._turn:
            if self._current(key, token) is not None:
                self._end(key)

    def forget(self, key: str) -> None:
        """Read an entry's files again at the next `ask`."""
        with self._turn:
            self._served.pop(key, None)

    def _look(self, key: str) -> Served | None:
        if key not in self._served and key not in self._granted:
            begin = self._clock()
            meta = self._files.find(key)
            if meta is not None:
                arrays, is_whole = small_arrays(self._files.tensors_path(key), meta["spec"].get("kind", ""))
                self._served[key] = Served(meta, self._put(arrays), is_whole)
            for granted in self._granted.values():  # heartbeats had to wait while a large file was hashed
                granted.deadline += self._clock() - begin
        return self._served.get(key)

    def _grant(self, key: str) -> Served | Lease | None:
        if key in self._granted:
            return None
        # None: a process outside this cluster is training it, or has just finished.
        if (lock := self._free_lock(key)) is None:
            return self._look(key)
        self._lapsed.pop(key, None)
        self._tokens[key] = self._tokens.get(key, 0) + 1
        return self._hold(key, lock, Lease(self._tokens[key], lock.times_trained + 1)).lease

    def _hold(self, key: str, lock: EntryLock, lease: Lease) -> _Granted:
        granted = self._granted[key] = _Granted(lock, lease, self._clock() + self._lease_s)
        return granted

    def _free_lock(self, key: str) -> EntryLock | None:
        """Return the lock of a missing entry; None if it exists, or another process is training it."""
        lock = self._files.try_lock(key)
        if lock is not None and self._files.mend(key, lock) is not None:
            lock.release()
            return None
        return lock

    def _current(self, key: str, token: int) -> _Granted | None:
        """Return a token's grant; a lapsed lease that nobody has taken over is valid again."""
        granted = self._granted.get(key)
        if granted is not None:
            return granted if granted.lease.token == token else None
        lapsed = self._lapsed.get(key)
        if lapsed is None or lapsed.token != token or (lock := self._free_lock(key)) is None:
            return None
        del self._lapsed[key]
        return self._hold(key, lock, lapsed)

    def _end(self, key: str) -> None:
        self._granted.pop(key).lock.release()


def _put(value: Any) -> Any:
    import ray

    return ray.put(value)


@contextmanager
def pool_service(address: PoolAddress) -> Iterator[None]:
    """Serve a pool under `address` while the block runs; on this node if it has room."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    service: Any = ray.remote(num_cpus=0, max_restarts=0, scheduling_strategy=here)(PoolService)
    actor = service.options(name=address.name, namespace=_NAMESPACE).remote(address.folder, address.lease_s)
    actor.watch.remote()
    try:
        yield
    finally:
        ray.kill(actor)


class _ServiceGoneError(Exception):
    """The actor is dead."""


class ClusterPool:
    """A pool that the workers of a cluster share; `trainer` trains a missing spec in this process."""

    def __init__(self, trainer: Trainer, address: PoolAddress) -> None:
        self._trainer, self._address = trainer, address
        self._files = PoolFiles(Path(address.folder))
        self._service: Any = None
        self._unpublished: dict[str, tuple[Mapping[str, Tensor], Mapping[str, Any]]] = {}

    def get(self, specs: Sequence[PoolSpec]) -> list[PoolEntry]:
        """Return the entries of `specs`, in order; missing ones are trained here or by another client.

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
            text = "the pool's service is gone (%s): going on with the files in %s"
            log.warning(text, error, self._files.folder)
            rest = LocalPool(self._train_unless_done, self._files.folder).get(list(missing.values()))
            entries.update(zip(missing, rest, strict=True))
        return [entries[spec.key] for spec in specs]

    def _round(self, missing: dict[str, PoolSpec], entries: dict[str, PoolEntry]) -> bool:
        """Ask once for every missing entry, train those that are leased; return whether anything was done."""
        progressed = False
        for key, spec in list(missing.items()):
            answer = self._call("ask", key)
            if isinstance(answer, Lease):
                self._train(spec, answer)
                progressed = True
            elif answer is not None and (entry := self._open(key, answer)) is not None:
                entries[key] = entry
                del missing[key]
                progressed = True
        return progressed

    def _train(self, spec: PoolSpec, lease: Lease) -> None:
        """Train an entry and have it published."""
        key = spec.key
        with self._beating(key, lease.token):
            try:
                draft = draft_entry(self._files, spec, self._trained, times_trained=lease.times_trained)
            except BaseException:
                with suppress(_ServiceGoneError):
                    self._call("give_up", key, lease.token)
                raise
            accepted = self._call("publish", key, lease.token, str(draft))
        del self._unpublished[key]
        if not accepted:
            shutil.rmtree(draft, ignore_errors=True)
            log.warning("pool entry %s: finished too late, another process has taken over", key[:12])

    def _trained(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        """Train, and keep the result until it is published: the service may die first."""
        self._unpublished[spec.key] = self._trainer(spec)
        return self._unpublished[spec.key]

    def _train_unless_done(self, spec: PoolSpec) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        return self._unpublished.pop(spec.key, None) or self._trainer(spec)

    def _open(self, key: str, served: Served) -> PoolEntry | None:
        """Return this process's own copy of an entry; None if its file was damaged meanwhile."""
        import torch
        from safetensors import SafetensorError, safe_open

        # Copied: a write to an alias of shared memory would reach everybody on the node (docs/ray.md, 11).
        tensors = {name: torch.tensor(array) for name, array in self._fetch(served.arrays).items()}
        if not served.is_whole:
            try:
                with safe_open(self._files.tensors_path(key), framework="pt") as file:
                    tensors |= {name: file.get_tensor(name) for name in set(file.keys()) - set(tensors)}
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
        """Return what the service answers, however long it takes; _ServiceGoneError if it is dead."""
        import ray

        if self._service is None:
            try:
                self._service = ray.get_actor(self._address.name, namespace=_NAMESPACE)
            except ValueError as error:
                raise _ServiceGoneError(f"no actor {self._address.name}") from error
        return self._fetch(getattr(self._service, method).remote(*arguments))

    def _fetch(self, reference: Any) -> Any:
        import ray

        while True:
            try:
                return ray.get(reference, timeout=_PATIENCE_S)
            except ray.exceptions.GetTimeoutError:
                # Slow, not dead: it still holds the locks, and the lease of an abandoned call would be lost.
                log.warning("the pool's service has not answered for %d s: waiting on", _PATIENCE_S)
            except (ray.exceptions.RayActorError, ray.exceptions.ObjectLostError) as error:
                raise _ServiceGoneError(" ".join(str(error).split())[:120]) from error
