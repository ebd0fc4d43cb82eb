"""The Ray engine on real clusters of this machine: nodes and actors that go, come, die or hang leave no trace."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import contents, file_bytes, progressed

from gpu_npz import open_dataset
from gpu_npz.builder import build
from gpu_npz.config import BuildConfig
from gpu_npz.errors import BackendError, RejectedError, ShardError, SourceError, StorageError
from gpu_npz.machine import environment
from gpu_npz.machine.tuning import Tuning
from gpu_npz.sources.folders.folder import FolderSource
from gpu_npz.workers import ray as engine
from gpu_npz.workers.events import Committed, Progress, Task, WorkerEnded

ray = pytest.importorskip("ray")
cluster_utils = pytest.importorskip("ray.cluster_utils")

# Older releases leave files of the nodes that they start open.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <_io.FileIO name='/dev/null':pytest.PytestUnraisableExceptionWarning",
    "ignore:Exception ignored in. <function Popen.__del__:pytest.PytestUnraisableExceptionWarning",
)

Build = Callable[..., list[Any]]

SHARDS, ITEMS = 6, 24
STORE_BYTES = 80 << 20
# A module for the actors: a source some of whose images wait at a gate, kill their reader or hang, once or always, and
# a decoder that crashes on some.
TRAPS = """
import ctypes, os, signal, time
from gpu_npz.preprocess.pillow import PillowDecoder
from gpu_npz.sources.folders.folder import FolderSource
traps = ""
decode_image = PillowDecoder.decode_image
def trapped(self, data, path, frame=None):
    if os.path.exists(f"{traps}/crash-{os.path.basename(path)}"):
        ctypes.string_at(0)
    return decode_image(self, data, path, frame)
PillowDecoder.decode_image = trapped
class TrappedSource(FolderSource):
    def read(self, item):
        global traps
        name, traps = os.path.basename(item.path), os.path.dirname(self.location) + "/traps"
        while os.path.exists(f"{traps}/gate-{name}"):
            time.sleep(0.05)
        for action in ("kill", "hang"):
            always, once = f"{traps}/always-{action}-{name}", f"{traps}/once-{action}-{name}"
            found = os.path.exists(always)
            if os.path.exists(once):
                os.unlink(once)
                found = True
            if found:
                os.kill(os.getpid(), signal.SIGKILL) if action == "kill" else time.sleep(3600)
        return super().read(item)
"""


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures, the second of every four a bad one. Read only."""
    root = tmp_path_factory.mktemp("ray") / "images"
    for number in range(ITEMS):
        path = root / "ab"[number // 12] / f"{number:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(file_bytes("half" if number % 4 == 1 else "jpeg", seed=number % 5, size=(40, 50)))
    return root


@pytest.fixture(scope="module")
def whole(src: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`src`, built by the local engine."""
    out = tmp_path_factory.mktemp("whole") / "out"
    build.build(src, out, BuildConfig(**settings(workers=0)))
    return out


@pytest.fixture(scope="module")
def traps_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("module")
    (folder / "gpu_npz_traps.py").write_text(TRAPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder))  # for the nodes and their workers
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield


@pytest.fixture(scope="module")
def head(traps_module: None) -> Iterator[Any]:
    """A cluster whose head node has no CPU to work on."""
    cluster = cluster_utils.Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "object_store_memory": STORE_BYTES, "include_dashboard": False},
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="module")
def pair(head: Any) -> Any:
    """The cluster with two nodes of one CPU each."""
    while len(head.worker_nodes) < 2:
        add_node(head)
    return head


@pytest.fixture
def traps(src: Path) -> Iterator[Path]:
    """The folder whose files are the traps; see TRAPS."""
    folder = src.parent / "traps"
    folder.mkdir(exist_ok=True)
    yield folder
    for path in folder.iterdir():
        path.unlink()


@pytest.fixture
def built(traps: Path, src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Build:
    """`built(cluster, see, **settings)`: builds tmp_path/"out" by Ray, returns the events, each shown to `see`, too."""
    from gpu_npz_traps import TrappedSource

    monkeypatch.setattr(build, "open_images", lambda src, config, classes: TrappedSource(src, classes))

    def built(cluster: Any, see: Callable[[Any], None] = lambda _: None, **values: Any) -> list[Any]:
        seen: list[Any] = []

        def progress(event: Any) -> None:
            seen.append(event)
            see(event)

        values = {"engine": "ray", "ray_address": cluster and cluster.address, "worker_timeout": 60, **values}
        build.build(src, tmp_path / "out", BuildConfig(**settings(**values)), progress=progress)
        return seen

    return built


def settings(**values: Any) -> dict[str, Any]:
    common = {"device": "cpu", "size": 16, "shard_size": 4, "batch_size": 2, "open_shards": 1, "max_rejects": "100%"}
    return {**common, **values}


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES)


def others_node(cluster: Any) -> Any:
    """A node that is not the one through which the driver is connected, which may be any."""
    own = ray.get_runtime_context().get_node_id()
    return next(node for node in cluster.worker_nodes if node.node_id != own)


def close_gates(traps: Path) -> None:
    """Nobody gets beyond the first half of a shard."""
    for number in range(ITEMS):
        if number % 4 == 3:
            (traps / f"gate-{number:02}.jpg").touch()


def open_gates(traps: Path) -> None:
    for gate in traps.glob("gate-*"):
        gate.unlink()


def finished(out: Path) -> dict[str, bytes]:
    """The same without what the killed leave, which the next build removes."""
    return {name: content for name, content in contents(out).items() if not name.endswith(".tmp")}


# Clusters that stay as they are


def test_without_a_cluster_one_is_started_and_ended(
    traps_module: None, built: Build, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    built(None, workers=1)
    assert contents(tmp_path / "out") == contents(whole)
    assert not ray.is_initialized()


def test_two_nodes_make_the_bytes_that_the_local_engine_makes(
    pair: Any, built: Build, traps: Path, whole: Path, tmp_path: Path
) -> None:
    close_gates(traps)
    begun: set[int] = set()

    def see(event: Any) -> None:
        if isinstance(event, Progress):
            begun.add(event.shard)
            if len(begun) == 2:  # one open shard each: two actors are at work
                open_gates(traps)

    seen = built(pair, see)
    assert contents(tmp_path / "out") == contents(whole)
    assert progressed(seen)[:2] == (ITEMS, 6)
    assert sorted(event.record.shard for event in seen if isinstance(event, Committed)) == list(range(SHARDS))
    assert len([event for event in seen if isinstance(event, WorkerEnded)]) == 2


def test_no_more_actors_than_workers(pair: Any, built: Build) -> None:
    seen = built(pair, workers=1)
    assert len([event for event in seen if isinstance(event, WorkerEnded)]) == 1


# Losses


def test_shards_of_a_lost_node_are_built_elsewhere(
    pair: Any, built: Build, traps: Path, whole: Path, tmp_path: Path
) -> None:
    close_gates(traps)
    begun: set[int] = set()

    def see(event: Any) -> None:
        if isinstance(event, Progress) and event.items < 0:
            open_gates(traps)
        elif isinstance(event, Progress) and event.shard not in begun:
            begun.add(event.shard)
            if len(begun) == 2:  # both nodes hold a shard that is half done, with a reject in it
                pair.remove_node(others_node(pair), allow_graceful=False)

    seen = built(pair, see)
    add_node(pair)
    lost = [event for event in seen if isinstance(event, Progress) and event.items < 0]
    assert [(event.items, event.rejects) for event in lost] == [(-2, -1)]
    assert progressed(seen)[:2] == (ITEMS, 6)
    assert finished(tmp_path / "out") == contents(whole)
    built(pair)  # which finds nothing to do, and cleans up
    assert contents(tmp_path / "out") == contents(whole)


def test_a_node_that_joins_later_gets_shards(pair: Any, built: Build, traps: Path, whole: Path, tmp_path: Path) -> None:
    pair.remove_node(next(iter(pair.worker_nodes)))
    close_gates(traps)
    begun: set[int] = set()

    def see(event: Any) -> None:
        if isinstance(event, Progress) and event.shard not in begun:
            begun.add(event.shard)
            if len(begun) == 1:
                add_node(pair)
            else:  # somebody began a second shard while the first one's actor stands at the gate
                open_gates(traps)

    built(pair, see)
    assert len(begun) == SHARDS
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(("trap", "timeout_s"), [("once-kill", 60), ("once-hang", 3)])
def test_an_actor_that_is_killed_or_hangs_is_replaced(
    pair: Any, built: Build, traps: Path, whole: Path, tmp_path: Path, trap: str, timeout_s: int
) -> None:
    for number in ("02", "14"):
        (traps / f"{trap}-{number}.jpg").touch()
    seen = built(pair, worker_timeout=timeout_s)
    assert not list(traps.iterdir())
    assert progressed(seen)[:2] == (ITEMS, 6)
    assert finished(tmp_path / "out") == contents(whole)


def test_a_shard_that_is_lost_again_and_again_stops_the_build(
    pair: Any, built: Build, traps: Path, whole: Path, tmp_path: Path
) -> None:
    (traps / "always-kill-06.jpg").touch()
    with pytest.raises(ShardError, match=r"a worker process, .* was killed by SIGKILL [\s\S]*fewer --workers"):
        built(pair)
    assert not (tmp_path / "out/dataset.json").exists()
    (traps / "always-kill-06.jpg").unlink()
    built(pair)
    assert contents(tmp_path / "out") == contents(whole)


def test_an_image_that_crashes_its_decoder_becomes_a_reject(
    pair: Any, built: Build, traps: Path, whole: Path, tmp_path: Path
) -> None:
    for number in ("06", "22"):
        (traps / f"crash-{number}.jpg").touch()
    seen = built(pair)
    lines = map(json.loads, (tmp_path / "out/rejects.jsonl").read_text().splitlines())
    crashed = [(line["index"], line["detail"]) for line in lines if line["code"] == "crashed"]
    assert crashed == [(6, "was killed by SIGSEGV"), (22, "was killed by SIGSEGV")]
    assert progressed(seen)[:2] == (ITEMS, 8)
    data, others = open_dataset(tmp_path / "out"), open_dataset(whole)
    for row, index in enumerate(data.index.tolist()):
        assert np.array_equal(data[row], others[others.index.tolist().index(index)])


# Errors


def test_an_actors_error_ends_the_build_and_leaves_nothing_unfinished(pair: Any, built: Build, tmp_path: Path) -> None:
    with pytest.raises(RejectedError, match=r"\.jpg.*is rejected at "):
        built(pair, on_reject="fail")
    left = contents(tmp_path / "out")
    assert "dataset.json" not in left
    assert not [name for name in left if name.endswith(".tmp")]


def test_whoever_stops_listening_stops_the_actors(pair: Any, built: Build, tmp_path: Path, traps: Path) -> None:
    close_gates(traps)

    def see(event: Any) -> None:
        if isinstance(event, Progress):
            open_gates(traps)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        built(pair, see)
    assert not [name for name in contents(tmp_path / "out") if name.endswith((".tmp", "dataset.json"))]


@pytest.mark.parametrize("blind", ["a node", "the driver"])
def test_an_out_that_is_not_shared_is_refused(
    pair: Any, built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blind: str
) -> None:
    if blind == "a node":  # it looks for another file than the one that is written here
        monkeypatch.setattr(engine, "_probe_name", lambda token: f".gpu-npz/.elsewhere-{token}.0-0.tmp")
    else:
        monkeypatch.setattr(engine, "_appears", lambda *_: False)
    with pytest.raises(StorageError, match=r"node .* does not see the same OUT .*use a folder that all nodes share"):
        built(pair)
    assert not [name for name in contents(tmp_path / "out") if name.endswith((".tmp", "npz")) and "plan" not in name]


def test_a_dead_address_is_an_error(built: Build) -> None:
    with pytest.raises(BackendError, match=r"cluster at '127\.0\.0\.1:1' cannot be used: .*refused"):
        built(SimpleNamespace(address="127.0.0.1:1"))


def test_rays_own_words_on_other_versions_are_passed_on(built: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(*_: Any, **__: Any) -> None:
        raise RuntimeError("Version mismatch: The cluster was started with Ray 2.1")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(BackendError, match="Version mismatch: The cluster was started"):
        built(SimpleNamespace(address="auto"))


def test_without_ray_the_error_says_what_to_install(built: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(BackendError, match=r"pip install 'ray.*'"):
        built(None)


def test_a_cluster_without_a_gpu_is_refused_at_once(pair: Any, built: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "_demand", lambda _: {"GPU": 1})
    with pytest.raises(BackendError, match="no node of the Ray cluster has the 1 GPU that a worker needs"):
        built(pair)


def test_a_build_for_which_no_node_has_room_leaves_nothing(pair: Any, built: Build, tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    with pytest.raises(BackendError, match="has the 9 CPU that a worker needs"):
        built(pair, backend="dali", threads=9)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gpu", [0, 2])
def test_the_machine_of_a_build_is_that_of_the_nodes(head: Any, gpu: int) -> None:
    node = head.add_node(num_cpus=6, num_gpus=gpu, object_store_memory=STORE_BYTES)
    try:
        with engine.cluster(head.address):
            found = engine.inspect(BuildConfig(backend="dali"))
    finally:
        head.remove_node(node)
    here = environment.inspect(BuildConfig(backend="dali"))
    assert found.cpus == (3 if gpu else 1)  # a node of one CPU is among them
    assert (found.gpus, found.dali) == (here.gpus, here.dali)


# Actors, without Ray


def task(source: Any, out: Path) -> Task:
    tuning = Tuning(workers=1, batch_size=1, threads=3, pipelines=1, prefetch=1, open_shards=1, hw_decoder_load=None)
    return Task(str(out), source, None, tuning, None)


@pytest.mark.parametrize(("gpu", "number"), [(True, 0), (False, None)])
def test_an_actor_works_on_the_one_gpu_that_it_sees(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gpu: bool, number: int | None
) -> None:
    def work(task: Task, shards: Any) -> Iterator[Any]:
        assert task.gpu == number
        yield from (Progress(shard, 1, 0, 0) for shard in shards for _ in range(3))
        yield WorkerEnded({}, 0, 0)

    monkeypatch.setattr(engine, "work", work)
    actor = engine._Actor(task(FolderSource(src), tmp_path), gpu, None, 60.0, False)
    assert isinstance(actor.poll()[0], engine._Here)
    assert actor.poll() == [None]
    assert actor.poll(7) == [*[Progress(7, 1, 0, 0)] * 3, None]  # progress comes in groups
    assert actor.poll(None) == [WorkerEnded({}, 0, 0)]
    assert actor.poll() == []


@pytest.mark.parametrize("waits", [True, False])
def test_an_actor_that_is_stopped_gives_its_work_up(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    ends: list[type[BaseException] | None] = []

    def work(task: Task, shards: Any) -> Iterator[Any]:
        try:
            while next(iter(shards) if waits else itertools.repeat(0), None) is not None:
                yield Progress(0, 1, 0, 0)
        finally:
            ends.append(sys.exc_info()[0])

    monkeypatch.setattr(engine, "work", work)
    actor = engine._Actor(task(FolderSource(src), tmp_path), False, None, 60.0, False)
    assert isinstance(actor.poll()[0], engine._Here)
    actor.poll()
    actor.stop()  # waits for its thread
    assert ends == [None if waits else GeneratorExit]


@pytest.mark.parametrize(
    ("device", "backend", "demand"),
    [("cuda", "dali", {"GPU": 1}), ("cpu", "pillow", {"CPU": 1}), ("cpu", "dali", {"CPU": 3})],
)
def test_what_an_actor_takes_of_its_node(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, device: str, backend: str, demand: dict[str, int]
) -> None:
    record = SimpleNamespace(device=device, backend=backend)
    monkeypatch.setattr(engine.Job, "open", lambda _: SimpleNamespace(record=record))
    assert engine._demand(task(None, tmp_path)) == demand


def test_a_node_looks_at_src_with_its_own_eyes(src: Path, tmp_path: Path) -> None:
    source = FolderSource(src)
    source._root_identity = (0, 0)  # as on another node, where the filesystem has another number
    with pytest.raises(SourceError):
        source.check()
    engine._seen(source, "n1").check()
    source.location = str(tmp_path / "gone")
    with pytest.raises(SourceError, match=r"node n1 does not see SRC: .*gone.*under the same path"):
        engine._seen(source, "n1")
