"""Worker actors on a Ray cluster, one a device. Only shard numbers and events travel, never pixels.

The driver hands out the shards. One call to each actor is always on its way: it brings what the actor asked for, and
returns at once if something needs an answer, else twice a second with the progress made since. A shard whose actor or
node is lost goes back to the driver's queue; actors are started wherever the cluster has room, also on nodes that join
later. A shard that is lost twice gets an actor of its own, which builds it in a process as `local.py` does, with care:
an image that ends its decoder becomes a reject. All nodes need the same environment, and SRC and OUT under the same
paths.
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

from ..dataset.job import Job
from ..errors import BackendError, GpuNpzError, ShardError, SourceError, StorageError
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
from .worker import asked, remove_leftovers, work

log = logging.getLogger(__name__)
_FLUSH_S = 0.5
_FLUSH_EVENTS = 64
_LOOK_S = 1.0
_JOIN_S = 10.0
_CONNECT_S = 10.0
_VISIBLE_S = 5.0  # network filesystems may show a new file a little late
_PATIENCE_S = 30.0  # without an actor, before the log says what the build waits for
_MAX_LOSSES = 4  # of one shard, or of actors in a row that had no shard
_STORE_BYTES = 100 << 20  # Ray's object store, of which nothing is used here


def run(
    task: Task,
    shards: Sequence[int],
    *,
    workers: int | None = None,
    address: str | None = None,
    timeout_s: float = 300.0,
) -> Generator[Event, None, None]:
    """Builds `shards` with actors and yields what happens. Closing the generator early stops all actors.

    An actor takes one GPU, or the CPUs that a worker uses. Progress that is lost with an actor is taken back by a
    negative Progress.

    Args:
        task: what every worker needs to know; its `gpu` is set by each actor.
        shards: what to build.
        workers: how many actors at most; as many as the cluster has room for if None.
        address: the cluster's, as `ray.init` takes it; RAY_ADDRESS, one that runs here, or a new one if None.
        timeout_s: an actor without a sign of life for so long is taken to hang.

    Raises:
        BackendError: no Ray, no cluster, or none of its nodes has room for an actor.
        StorageError, SourceError: a node does not see OUT or SRC.
        GpuNpzError: what an actor failed with; ShardError if a shard is lost again and again.
    """
    with cluster(address), _probe(task) as token:
        actors = _RayActors(task, shards, token, workers, timeout_s)
        try:
            yield from actors.events()
        finally:
            actors.stop()


def inspect(address: str | None, *, dali: bool) -> Machine:
    """What the cluster's workers find, as `environment.inspect` tells it of a machine: on a node with a GPU if there is
    one. Each worker has its GPU to itself, so there is at most one; `cpus` are those of the smallest node, by worker.

    Args:
        address: as for `run`.
        dali: whether to look for DALI where there is no GPU.

    Raises:
        BackendError: no Ray, or no cluster.
    """
    with cluster(address):
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
        cpus = max(1, min((int(node.get("CPU", 1) // max(1, node.get("GPU", 0))) for node in gpus or nodes), default=1))
        if not gpus and not dali:
            return Machine(0, None, None, None, None, cpus)
        look = ray.remote(num_cpus=0 if gpus else 1, num_gpus=1 if gpus else 0)(environment.inspect).remote("auto")
        while not ray.wait([look], timeout=_PATIENCE_S)[0]:
            log.warning("waiting until the Ray cluster has a %s free (see `ray status`)", "GPU" if gpus else "CPU")
        found: Machine = ray.get(look)
        return dataclasses.replace(found, cpus=cpus)


@dataclasses.dataclass(frozen=True)
class _Here:
    """An actor's first message: where it is, and the file that it has written into OUT."""

    node: str
    probe: str | None


@dataclasses.dataclass
class _RayWorker:
    """An actor, and what is known of it.

    Attributes:
        progress: what it has done of each shard that it has begun and not committed.
        node: where it runs; None until it does.
        isolated: whether it is for one shard that was lost before.
        silent_s: how long it has said nothing.
    """

    actor: Any
    progress: dict[int, list[Progress]] = dataclasses.field(default_factory=dict)
    node: str | None = None
    isolated: bool = False
    silent_s: float = 0.0


class _RayActors:
    """The actors of one build, and the shards that are left for them."""

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
        self._idle_s: float | None = 0.0  # without an actor; None once the log has said so
        if not self._room():
            wanted = " and ".join(f"{amount} {name}" for name, amount in self._demand.items())
            raise BackendError(
                f"no node of the Ray cluster has the {wanted} that a worker needs (`ray status` shows what there is); "
                "add such a node" + ("" if "GPU" in self._demand else ", or lower --threads")
            )

    def events(self) -> Iterator[Event]:
        """What happens, until all shards are built."""
        import ray

        looked = -_LOOK_S
        while self._shards or any(worker.node for worker in self._calls.values()):
            if time.monotonic() - looked >= _LOOK_S:
                looked = time.monotonic()
                self._grow()
            begin = time.monotonic()
            # One at a time, and in the order of the calls: none is left waiting for long.
            if not self._calls:
                time.sleep(_LOOK_S)
            for call in ray.wait(list(self._calls), timeout=_LOOK_S)[0] if self._calls else ():
                yield from self._take(call)
            yield from self._watch(min(time.monotonic() - begin, 2 * _LOOK_S))  # a machine that slept is no hung actor

    def stop(self) -> None:
        """Ends all actors; they leave nothing unfinished behind if they can be reached."""
        import ray

        with contextlib.suppress(Exception):  # nothing here may hide why it stops
            if stops := [worker.actor.stop.remote() for worker in self._calls.values() if worker.node]:
                ray.wait(stops, num_returns=len(stops), timeout=_JOIN_S)
        for worker in self._calls.values():
            _kill(worker.actor)

    def _room(self) -> int:
        """How many actors the nodes that are up can hold, if nobody else uses them."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        return sum(min(int(node.get(name, 0) // amount) for name, amount in self._demand.items()) for node in nodes)

    def _grow(self) -> None:
        """Starts actors for the shards that are left. Ray places them, as soon as nobody else holds their resources."""
        count = min(self._room(), self._limit) - len(self._calls)
        idle = Counter(worker.isolated for worker in self._calls.values() if not worker.progress)
        wanted = [
            isolated for isolated in (True, False) for _ in range(self._shards.left(isolated=isolated) - idle[isolated])
        ]
        for isolated in wanted[: max(0, count)]:
            actor = self._actor.remote(self._task, "GPU" in self._demand, self._token, self._timeout_s, isolated)
            self._calls[actor.poll.remote()] = _RayWorker(actor, isolated=isolated)

    def _take(self, call: Any) -> Iterator[Event]:
        """Takes what an actor says, calls it again with the answers, and passes the events on."""
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
        """Gives up the actors that have said nothing for too long; says so if there are none at all."""
        at_work = [(call, worker) for call, worker in self._calls.items() if worker.node]
        for call, worker in at_work:
            worker.silent_s += elapsed_s
            # A isolated one watches a process for as long, and what it has to say of that comes after.
            if worker.silent_s > self._timeout_s * (2 if worker.isolated else 1):
                yield from self._lost(call, f"gave no sign of life for {worker.silent_s:.0f} s")
        if at_work:
            self._idle_s = 0.0
        elif self._idle_s is not None:
            self._idle_s += elapsed_s
            if self._idle_s > _PATIENCE_S:
                self._idle_s = None
                log.warning("no worker runs: waiting until the Ray cluster has room for one (see `ray status`)")

    def _lost(self, call: Any, cause: str) -> Iterator[Event]:
        """Puts the shards of an actor that is lost back.

        Raises:
            ShardError: there is no point in going on.
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
                "command to resume, with fewer --workers if memory is short"
            )
        log.warning(
            "%s was lost, its %d shard(s) go to others: %s (Ray's logs on that node have what it wrote last)",
            place, len(worker.progress), cause.split("\n")[0],
        )  # fmt: skip
        remove_leftovers(self._task, worker.progress)
        for shard, steps in worker.progress.items():
            if steps:
                yield taken_back(shard, steps)


class _Actor:
    """What Ray runs for each worker: `work` in a thread, and a mailbox in front of it."""

    def __init__(self, task: Task, gpu: bool, token: str | None, timeout_s: float, isolated: bool) -> None:
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._stopped = False
        if gpu:
            task = dataclasses.replace(task, gpu=0)  # Ray shows an actor no GPU but its own
        self._alone_s = timeout_s if isolated else None
        self._thread = threading.Thread(target=self._work, args=(task, token), daemon=True)
        self._thread.start()

    def poll(self, *answers: int | None) -> list[Any]:
        """Takes shard numbers, None for "no more"; returns messages.

        They are a _Here, then None for "give me a shard", events, and an error if there was one.
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
        """Ends the work and waits until no unfinished file is left."""
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
        if self._alone_s is None:
            return work(task, asked(self._ask, task.tuning.open_shards))
        alone = dataclasses.replace(task, tuning=dataclasses.replace(task.tuning, workers=1))
        gpus = () if task.gpu is None else (task.gpu,)
        return local.run(alone, [shard for shard in [self._ask()] if shard is not None], gpus, self._alone_s)

    def _ask(self) -> int | None:
        if self._stopped:
            return None
        self._messages.put(None)
        return self._answers.get()


@contextlib.contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connects to a cluster, or starts one, unless the caller has done so; takes back what it did.

    Raises:
        BackendError: no Ray, or the cluster cannot be used.
        ShardError: the cluster failed while the body ran.
    """
    # Read when Ray is imported. Ray's own 20 tries, 40 s each, are for a cluster that is just being started.
    os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
    try:
        import ray
    except ImportError as exc:
        raise BackendError(f"--engine ray needs Ray ({exc}); run: pip install 'gpu-npz[ray]'") from exc
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
            "RAY_ADDRESS, and `ray status` on its head node; without an address one is started here"
        ) from exc
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before or signal.SIG_DFL)  # Ray takes SIGTERM for itself
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
        if port.isdigit():  # where nobody listens, Ray would try for long
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
    """What one actor takes of a node. What the plan was made for counts: nothing falls back to another device."""
    record = Job.open(open_storage(task.out)).record
    if record.device == "cuda":
        return {"GPU": 1}
    return {"CPU": 1 if record.backend == "pillow" else task.tuning.threads}


@contextlib.contextmanager
def _probe(task: Task) -> Iterator[str | None]:
    """A file in OUT, under a name that only its token tells; None for an object store, which all nodes share."""
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
    return f"{PRIVATE}/.probe-{token}.0-0.tmp"  # to the next build a temporary file, should this one be killed


def _answer(out: str, token: str, node: str) -> str:
    """Looks, on a node, for the driver's probe, and writes one for the driver; returns its name."""
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
        f"node {node} does not see OUT {out!r} as it is here; use a folder that all nodes share under this path, or an "
        "object store"
    )


def _seen(source: Source, node: str) -> Source:
    """The source as this node sees it."""
    try:
        if isinstance(source, FolderSource):
            return source.anew()
        source.check()
    except SourceError as exc:
        raise SourceError(f"node {node} does not see SRC: {exc}; all nodes need it under the same path") from exc
    return source
