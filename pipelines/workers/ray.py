"""The Ray engine: worker actors on a Ray cluster, one per device, which exchange only shard numbers and events.

The driver hands out the shards. There is always one pending call to each actor: it delivers the shards that the actor
requested, and returns at once if the actor needs an answer, else twice a second with the progress made since. If an
actor or its node is lost, its shards return to the driver's queue. Actors are started wherever the cluster has room,
also on nodes that join later. A shard that is lost twice gets its own actor, which builds it as `local.py` does, in a
worker process in isolation mode: an image that crashes or hangs its decoder is rejected. All nodes need the same Python
environment, and SRC and OUT under the same paths.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from typing import Any

from ..config import BuildConfig
from ..dataset.job import Job
from ..errors import BackendError, GpuNpzError, ShardError, SourceError, StorageError, install_command
from ..machine import environment
from ..machine.environment import Machine
from ..sources.base import Source
from ..sources.folders.folder import FolderSource
from ..storage import open_storage
from ..storage.base import is_remote
from ..storage.holders import PRIVATE
from ..storage.local import LocalStorage
from . import local
from .events import Committed, Event, Progress, Task, WorkerEnded, taken_back
from .shard_queue import ShardQueue
from .worker import remove_leftovers, requested_shards, work

log = logging.getLogger(__name__)
_FLUSH_S = 0.5
_FLUSH_EVENTS = 64
_LOOK_S = 1.0
_JOIN_S = 10.0
_CONNECT_S = 10.0
_VISIBLE_S = 5.0  # network filesystems may show a new file with a delay
_PATIENCE_S = 30.0  # without an actor, until the log says what the build is waiting for
_MAX_LOSSES = 4  # of one shard, or of actors in a row that had no shard
_STORE_BYTES = 100 << 20  # for Ray's object store, which is not used


def run(
    task: Task,
    shards: Sequence[int],
    *,
    workers: int | None = None,
    address: str | None = None,
    timeout_s: float = 300.0,
) -> Generator[Event, None, None]:
    """Builds `shards` with actors and yields events. Closing the generator early stops all actors.

    An actor takes one GPU, or as many CPUs as a worker uses. If an actor is lost, a negative Progress cancels the
    progress of its unfinished shards.

    Args:
        task: the task of all workers; each actor sets its `gpu`.
        shards: the numbers of the shards to build.
        workers: the most actors; None for as many as the cluster has room for.
        address: the address of the cluster, as for `ray.init`; None for RAY_ADDRESS, a cluster that runs on this
            machine, or a new one.
        timeout_s: an actor that has been silent for longer is considered hung.

    Raises:
        BackendError: Ray is missing, there is no cluster, or no node has room for an actor.
        StorageError, SourceError: a node does not see OUT or SRC.
        GpuNpzError: the error of an actor; ShardError if a shard is lost repeatedly.
    """
    with cluster(address), _probe(task) as token:
        actors = _RayActors(task, shards, token, workers, timeout_s)
        try:
            yield from actors.events()
        finally:
            actors.stop()


def inspect(config: BuildConfig) -> Machine:
    """What `environment.inspect` finds on the cluster, on a node with a GPU if there is one.

    Each worker has its own GPU, so at most one GPU is reported. `cpus` is the number of CPUs per worker on the smallest
    node.

    Args:
        config: `ray_address` names the cluster; with `backend` dali, DALI is tested on a node without a GPU, too.

    Raises:
        BackendError: Ray is missing, or there is no cluster.
    """
    with cluster(config.ray_address):
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
        cpus = max(1, min((int(node.get("CPU", 1) // max(1, node.get("GPU", 0))) for node in gpus or nodes), default=1))
        if not gpus and config.backend != "dali":
            return Machine(0, None, None, None, None, cpus)
        look = ray.remote(num_cpus=0 if gpus else 1, num_gpus=1 if gpus else 0)(environment.inspect).remote(
            BuildConfig(backend=config.backend)
        )
        while not ray.wait([look], timeout=_PATIENCE_S)[0]:
            log.warning("waiting until the Ray cluster has a %s free (see `ray status`)", "GPU" if gpus else "CPU")
        found: Machine = ray.get(look)
        return dataclasses.replace(found, cpus=cpus)


@dataclasses.dataclass(frozen=True)
class _Here:
    """An actor's first message: its node, and the name of the probe file that it has written into OUT."""

    node: str
    probe: str | None


@dataclasses.dataclass
class _RayWorker:
    """An actor and its state, as the driver knows it.

    Attributes:
        actor: Ray's handle of the actor.
        progress: the events of each of its unfinished shards.
        node: the host name of its node; None until it has started.
        isolated: whether it builds a single shard in isolation mode.
        silent_s: how long it has been silent, in seconds.
    """

    actor: Any
    progress: dict[int, list[Progress]] = dataclasses.field(default_factory=dict)
    node: str | None = None
    isolated: bool = False
    silent_s: float = 0.0


class _RayActors:
    """The actors of one build."""

    def __init__(
        self, task: Task, shards: Sequence[int], token: str | None, limit: int | None, timeout_s: float
    ) -> None:
        import ray

        self._task = task
        self._shards = ShardQueue(shards, max_losses=_MAX_LOSSES)
        self._token = token
        self._limit = sys.maxsize if limit is None else max(1, limit)
        self._timeout_s = timeout_s
        self._demand = _demand(task)
        self._actor = ray.remote(num_cpus=self._demand.get("CPU", 0), num_gpus=self._demand.get("GPU", 0))(_Actor)
        self._calls: dict[Any, _RayWorker] = {}
        self._losses_without_shard = 0  # in a row
        self._idle_s: float | None = 0.0  # time without an actor; None once it was logged
        if not self._room():
            wanted = " and ".join(f"{amount} {name}" for name, amount in self._demand.items())
            raise BackendError(
                f"no node of the Ray cluster has the {wanted} that a worker needs (`ray status` shows what there is); "
                "add such a node" + ("" if "GPU" in self._demand else ", or lower --threads")
            )

    def events(self) -> Iterator[Event]:
        """The events of all actors, until all shards are built."""
        import ray

        looked = -_LOOK_S
        while self._shards or any(worker.node for worker in self._calls.values()):
            if time.monotonic() - looked >= _LOOK_S:
                looked = time.monotonic()
                self._grow()
            begin = time.monotonic()
            # One at a time and in the order of the calls, so that no actor waits for long.
            if not self._calls:
                time.sleep(_LOOK_S)
            for call in ray.wait(list(self._calls), timeout=_LOOK_S)[0] if self._calls else ():
                yield from self._take(call)
            yield from self._watch(min(time.monotonic() - begin, 2 * _LOOK_S))  # if the machine slept, no actor hung

    def stop(self) -> None:
        """Stops all actors. Those that can be reached remove their unfinished files."""
        import ray

        with contextlib.suppress(Exception):  # an error here must not hide why the build stops
            if stops := [worker.actor.stop.remote() for worker in self._calls.values() if worker.node]:
                ray.wait(stops, num_returns=len(stops), timeout=_JOIN_S)
        for worker in self._calls.values():
            _kill(worker.actor)

    def _room(self) -> int:
        """How many actors the live nodes have room for, if nothing else uses them."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(min(int(node.get(name, 0) // amount) for name, amount in self._demand.items()) for node in nodes)

    def _grow(self) -> None:
        """Starts actors for the shards that are left. Ray places them as soon as their resources are free."""
        count = min(self._room(), self._limit) - len(self._calls)
        idle = Counter(worker.isolated for worker in self._calls.values() if not worker.progress)
        wanted = [
            isolated for isolated in (True, False) for _ in range(self._shards.left(isolated=isolated) - idle[isolated])
        ]
        for isolated in wanted[: max(0, count)]:
            actor = self._actor.remote(self._task, "GPU" in self._demand, self._token, self._timeout_s, isolated)
            self._calls[actor.poll.remote()] = _RayWorker(actor, isolated=isolated)

    def _take(self, call: Any) -> Iterator[Event]:
        """Receives the messages of an actor, calls it again with the answers, and yields its events."""
        import ray

        worker = self._calls[call]
        try:
            messages = ray.get(call)
        except ray.exceptions.RayError as exc:
            yield from self._lost(call, str(exc))
            return
        events, answers = [], []
        for message in messages:
            worker.silent_s = 0.0
            if isinstance(message, GpuNpzError):
                raise message
            if isinstance(message, _Here):
                worker.node = message.node
                if self._token and not _appears(self._task.out, str(message.probe), self._token):
                    raise _unshared(message.node, self._task.out)
            elif message is None:
                answers.append(shard := self._shards.take(isolated=worker.isolated))
                if shard is not None:
                    worker.progress[shard] = []
            else:
                events.append(message)
                if isinstance(message, Committed):
                    del worker.progress[message.record.shard]
                    self._losses_without_shard = 0
                elif isinstance(message, Progress):
                    worker.progress[message.shard].append(message)
        del self._calls[call]
        if any(isinstance(event, WorkerEnded) for event in events):
            _kill(worker.actor)
        else:
            self._calls[worker.actor.poll.remote(*answers)] = worker
        yield from events

    def _watch(self, elapsed_s: float) -> Iterator[Event]:
        """Gives up the actors that have been silent for too long; logs a warning if there are no actors at all."""
        at_work = [(call, worker) for call, worker in self._calls.items() if worker.node]
        for call, worker in at_work:
            worker.silent_s += elapsed_s
            # An actor in isolation mode itself watches a process for `timeout_s`, and reports afterwards.
            if worker.silent_s > self._timeout_s * (2 if worker.isolated else 1):
                yield from self._lost(call, f"did not respond for {worker.silent_s:.0f} s")
        if at_work:
            self._idle_s = 0.0
        elif self._idle_s is not None:
            self._idle_s += elapsed_s
            if self._idle_s > _PATIENCE_S:
                self._idle_s = None
                log.warning("no worker is running: waiting until the Ray cluster has room for one (see `ray status`)")

    def _lost(self, call: Any, cause: str) -> Iterator[Event]:
        """Puts the shards of a lost actor back.

        Raises:
            ShardError: continuing is pointless.
        """
        worker = self._calls.pop(call)
        _kill(worker.actor)
        for shard in worker.progress:
            self._shards.put_back(shard)
        if not worker.progress:
            self._losses_without_shard += 1
        place = f"a worker on node {worker.node}" if worker.node else "a worker that was starting"
        hopeless = any(self._shards.is_hopeless(shard) for shard in worker.progress)
        if hopeless or self._losses_without_shard >= _MAX_LOSSES:
            raise ShardError(
                f"{place} was lost, the last of {_MAX_LOSSES}: {cause}\nRay's logs on that node say more; run the same "
                "command to resume, with fewer --workers if there is not enough memory"
            )
        log.warning(
            "%s was lost, and other workers take over its %d unfinished shards: %s (Ray's logs on that node show its "
            "last output)",
            place, len(worker.progress), cause.split("\n")[0],
        )  # fmt: skip
        remove_leftovers(self._task, worker.progress)
        for shard, steps in worker.progress.items():
            if steps:
                yield taken_back(shard, steps)


class _Actor:
    """What Ray runs for each worker: `work` in a thread, with queues for its messages and answers.

    Args:
        task: the task of the worker.
        gpu: whether the actor has a GPU.
        token: the token of the driver's probe file in OUT; None for an object store.
        timeout_s: how long a process may be silent in isolation mode.
        isolated: whether to build a single shard in isolation mode.
    """

    def __init__(self, task: Task, gpu: bool, token: str | None, timeout_s: float, isolated: bool) -> None:
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stopped = False
        if gpu:
            task = dataclasses.replace(task, gpu=0)  # an actor sees only its own GPU
        self._isolated, self._timeout_s = isolated, timeout_s
        self._thread = threading.Thread(target=self._work, args=(task, token), daemon=True)
        self._thread.start()

    def poll(self, *answers: int | None) -> list[Any]:
        """Delivers answers to the worker and returns its new messages.

        Args:
            answers: one for each shard that the worker requested: a shard number, or None if none is left.

        Returns:
            A _Here at first, then events, None to request a shard, and an error if the worker failed.
        """
        for answer in answers:
            self._answers.put(answer)
        messages: list[Any] = []
        end = time.monotonic() + _FLUSH_S
        with contextlib.suppress(queue.Empty):
            while len(messages) < _FLUSH_EVENTS and (not messages or isinstance(messages[-1], Progress)):
                messages.append(self._messages.get(timeout=max(0.0, end - time.monotonic())))
        return messages

    def stop(self) -> None:
        """Stops the worker and waits until it has removed its unfinished files."""
        self._stopped = True
        self._answers.put(None)
        self._thread.join()

    def _work(self, task: Task, token: str | None) -> None:
        node = socket.gethostname()
        try:
            task = dataclasses.replace(task, source=_seen(task.source, node))
            self._messages.put(_Here(node, None if token is None else _answer(task.out, token, node)))
            with contextlib.closing(self._events(task)) as events:
                for event in events:
                    if self._stopped:
                        return
                    self._messages.put(event)
        except GpuNpzError as exc:
            self._messages.put(exc)
        except Exception:
            self._messages.put(ShardError(f"a worker on node {node} failed:\n{traceback.format_exc()}"))

    def _events(self, task: Task) -> Generator[Event, None, None]:
        if not self._isolated:
            return work(task, requested_shards(self._ask, task.tuning.open_shards))
        single = dataclasses.replace(task, tuning=dataclasses.replace(task.tuning, workers=1))
        gpus = () if task.gpu is None else (task.gpu,)
        return local.run(single, [shard for shard in [self._ask()] if shard is not None], gpus, self._timeout_s)

    def _ask(self) -> int | None:
        if self._stopped:
            return None
        self._messages.put(None)
        return self._answers.get()


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connects to a cluster or starts one while the body runs; does nothing if Ray is already initialized.

    Args:
        address: as for `run`.

    Raises:
        BackendError: Ray is missing, or the cluster cannot be used.
        ShardError: the cluster failed while the body ran.
    """
    # Ray reads this when it is imported. Its default of 20 tries of 40 s each is for clusters that are starting.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        import ray
    except ImportError as exc:
        raise BackendError(f"--engine ray needs Ray ({exc}); run: {install_command('ray')}") from exc
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS")
    before = signal.getsignal(signal.SIGTERM)
    try:
        _connect(address)
    except Exception as exc:  # ConnectionError, RuntimeError for other versions, ValueError, RpcError ...
        ray.shutdown()
        raise BackendError(
            f"the Ray cluster {f'at {address!r} ' if address else ''}cannot be used: {exc}\ncheck --ray-address and "
            "RAY_ADDRESS, and `ray status` on its head node; without an address, Ray is started here"
        ) from exc
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # Ray replaces the SIGTERM handler
    try:
        yield
    except (ray.exceptions.RayError, ConnectionError) as exc:
        raise ShardError(f"the Ray cluster failed: {exc}\nrun the same command to resume") from exc
    finally:
        ray.shutdown()


def _connect(address: str | None) -> None:
    import ray

    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.WARNING}
    if address is not None:
        host, _, port = address.rpartition("://")[2].rpartition(":")
        if port.isdigit():  # if nothing listens there, Ray would retry for a long time
            socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
        ray.init(address, **common)
        return
    try:
        ray.init("auto", **common)
    except ConnectionError:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.init("local", include_dashboard=False, object_store_memory=_STORE_BYTES, **common)


def _kill(actor: Any) -> None:
    import ray

    with contextlib.suppress(ray.exceptions.RayError):
        ray.kill(actor)


def _demand(task: Task) -> dict[str, int]:
    """The resources of one actor, for the device and backend of the job: no actor falls back to another device."""
    record = Job.open(open_storage(task.out)).record
    if record.device == "cuda":
        return {"GPU": 1}
    return {"CPU": 1 if record.backend == "pillow" else task.tuning.threads}


@contextlib.contextmanager
def _probe(task: Task) -> Iterator[str | None]:
    """Writes a probe file into OUT and gives its token; gives None for an object store, which all nodes share."""
    if is_remote(task.out):
        yield None
        return
    storage, token = LocalStorage(task.out), secrets.token_hex(8)
    storage.write(_probe_name(token), token.encode())
    try:
        yield token
    finally:
        for name in storage.names(PRIVATE):
            if token in name:
                storage.remove(f"{PRIVATE}/{name}")


def _probe_name(token: str) -> str:
    return f"{PRIVATE}/.probe-{token}.0-0.tmp"  # if this build is killed, the next one removes the file


def _answer(out: str, token: str, node: str) -> str:
    """Checks, on a node, that the driver's probe file is visible; writes one for the driver and returns its name."""
    if not _appears(out, _probe_name(token), token):
        raise _unshared(node, out)
    name = _probe_name(f"{token}-{secrets.token_hex(8)}")
    LocalStorage(out).write(name, token.encode())
    return name


def _appears(out: str, name: str, token: str) -> bool:
    end = time.monotonic() + _VISIBLE_S
    while not (found := LocalStorage(out).read(name) == token.encode()) and time.monotonic() < end:
        time.sleep(0.2)
    return found


def _unshared(node: str, out: str) -> StorageError:
    return StorageError(
        f"node {node} does not see the same OUT {out!r} as this machine; use a folder that all nodes share under this "
        "path, or an object store"
    )


def _seen(source: Source, node: str) -> Source:
    """The source as this node sees it. Raises SourceError if it does not."""
    try:
        if isinstance(source, FolderSource):
            return source.anew()
        source.check()
    except SourceError as exc:
        raise SourceError(f"node {node} does not see SRC: {exc}; all nodes need it under the same path") from exc
    return source
