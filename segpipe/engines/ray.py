"""The stages on Ray Data. The only module that imports ray.

One row is one chunk, pickled, in one block of its own: a row cannot be split or merged, so retry, commit and file
name have the same unit. Ray schedules, streams, holds back, retries lost tasks and restarts actors; nothing of a run
is kept in it. Settings that differ from Ray's defaults say why.

An actor commits what it has segmented itself. As tasks of their own, commits took a worker process each, 5 s of CPU to
start: on two cores six photographs took 53 s that way and 37 s this way.
"""

import logging
import os
import pickle
import signal
import socket
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from segpipe.engines import Execute, Job, OnPhase, Pool, local_cpus, size_pool
from segpipe.errors import ConfigError
from segpipe.records import Committed, EncodedChunk, Fault
from segpipe.shards.work import Work

_QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else a FutureWarning about GPUs on every start
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # else C++ lines about actor arguments in the object store
    "RAY_DEDUP_LOGS": "1",
}
if TYPE_CHECKING:
    from segpipe.stages.guard import ChunkProcessor

# Chunks are at most some 64 MB and only a few are in flight: Ray's own 30 % of a laptop's memory is not needed.
_OBJECT_STORE_BYTES = 1 << 30
# An actor leaves half a CPU of its share to the read tasks that feed it.
_CPUS_LEFT_TO_READING = 0.5
_READ_CPUS = 0.25
_REACH_S = 10.0
_NO_PROGRESS_S = 6 * 3600
_COLUMN = "item"


@contextmanager
def open_ray(job: Job, on_phase: OnPhase) -> Iterator[Execute]:
    """Join or start Ray, and hand out the pipeline. A Ray that was started here is stopped afterwards.

    Raises:
        ConfigError: if the cluster cannot be reached, or cannot hold the workers asked for.
    """
    on_phase("loading Ray")
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    import ray
    import ray.data

    # After the import, which sets it to INFO. What fails is raised here; Ray would print it twice more.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    if job.layout.output.scheme == "memory":
        raise ConfigError("output.uri: memory:// is seen by one process only; use --engine inline with it")
    with _own_signals():
        started_here = _connect(job.resources.ray_address, on_phase)
    try:
        capacity: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # ray's
        pool = size_pool(
            job.resources,
            num_cpus=capacity.get("CPU", 0),
            num_gpus=capacity.get("GPU", 0),
            device=job.request.device,
        )
        on_phase(f"loading {job.request.info.name} in {pool.num_actors} actors of {pool.threads} threads")
        yield partial(_execute, job=job, pool=pool)
    finally:
        if started_here:
            ray.shutdown()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this process's way to be stopped: ray.init puts its own handler for SIGTERM in place."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def describe_cluster(address: str) -> str:
    """Join a cluster, say what it has, and leave it.

    Raises:
        ConnectionError: if it cannot be joined.
    """
    import ray

    if ray.is_initialized():
        raise ConnectionError("this process is in a Ray cluster already")
    try:
        _reach(address)
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        capacity: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # ray's
    except (OSError, RuntimeError, ValueError) as error:
        raise ConnectionError(" ".join(str(error).split())[:200]) from None
    finally:
        ray.shutdown()
    return f"{capacity.get('CPU', 0):g} CPUs, {capacity.get('GPU', 0):g} GPUs, Ray {ray.__version__}"


def _reach(address: str) -> None:
    """Open and close a connection: Ray itself asks an address where nobody answers for minutes.

    Raises:
        OSError: if nobody answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()


def _connect(address: str, on_phase: OnPhase) -> bool:
    """Use the Ray that this process already has, join one, or start one here; tell whether to stop it."""
    import ray

    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    wanted = os.environ.get("RAY_ADDRESS", "local") if address == "auto" else address
    if wanted != "local":
        on_phase(f"joining Ray at {wanted}")
        try:
            _reach(wanted)
            ray.init(address=wanted, **options)
        except (OSError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(f"resources.ray_address: no Ray cluster at {wanted} ({reason})") from None
        return True
    on_phase("starting Ray on this machine (10 to 30 s; --engine inline needs none)")
    ray.init(
        address="local",
        num_cpus=local_cpus(),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE_BYTES,
        **options,
    )
    return True


def _execute(work: Sequence[Work], *, job: Job, pool: Pool) -> Iterator[Committed | Fault]:
    """Run one wave of work through a Ray Data pipeline and yield what was committed, as it is."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    # Ray packs rows into blocks of 128 MB and hands whole blocks on: with 6 MB chunks 16 would be segmented before
    # the first is written. Below the size of any chunk, each chunk is its own block.
    context.target_max_block_size = 1
    # A chunk on a slow CPU may take more than Ray's half hour.
    context.execution_no_progress_timeout_s = _NO_PROGRESS_S

    chunks = ray.data.read_datasource(_work_source(work), num_cpus=_READ_CPUS, override_num_blocks=len(work))
    committed = chunks.map_batches(
        _ChunkActor,
        fn_constructor_kwargs={"job": job, "threads": pool.threads},
        compute=ActorPoolStrategy(size=pool.num_actors),
        num_cpus=pool.threads - _CPUS_LEFT_TO_READING,
        num_gpus=pool.gpus or None,
        batch_size=None,
        batch_format="pyarrow",
    )
    with warnings.catch_warnings():
        # Ray warns of actors without work; how many chunks a shard has is known when it was read.
        warnings.filterwarnings("ignore", message="The minimum number of concurrent actors", category=UserWarning)
        for block in committed.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for outcome in _unpack(block):
                if isinstance(outcome, _Raised):
                    raise outcome.error
                yield outcome


@dataclass(frozen=True, slots=True)
class _Raised:
    """What a stage raised, on its way to the driver, which raises it again: Ray would hand on its text alone."""

    error: Exception


def _raised(error: Exception) -> _Raised:
    error.add_note("".join(traceback.format_exception(error)).rstrip())
    return _Raised(error)


class _ChunkActor:
    """Holds a model; segments chunks and commits them. The model is loaded with the first chunk."""

    def __init__(self, job: Job, threads: int) -> None:
        self._job = job
        self._threads = threads
        self._processor: ChunkProcessor | None = None

    def __call__(self, block: pa.Table) -> pa.Table:
        try:
            return _pack([self._process(item) for item in _unpack(block)])
        except Exception as error:  # noqa: BLE001  # raised again by the driver
            return _pack([_raised(error)])

    def _process(self, item: EncodedChunk | Fault | _Raised) -> Committed | Fault | _Raised:
        from segpipe.models import pin_threads
        from segpipe.stages.guard import ChunkProcessor

        if isinstance(item, _Raised):
            return item
        if self._processor is None:
            job = self._job
            pin_threads(job.request.info.name, self._threads)
            self._processor = ChunkProcessor(job.segment_settings(self._threads), layout=job.layout, label=job.label)
        return self._processor(item)


def _work_source(work: Sequence[Work]) -> Any:  # noqa: ANN401  # a ray class, and ray is imported late
    """Return a Ray datasource with one read task for each piece of work."""
    from ray.data import Datasource, ReadTask
    from ray.data.block import BlockMetadata

    def read(item: Work) -> Iterator[pa.Table]:
        from segpipe.stages.read import read_chunks

        try:
            for chunk in read_chunks(item):
                yield _pack([chunk])
        except Exception as error:  # noqa: BLE001  # raised again by the driver
            yield _pack([_raised(error)])

    class WorkSource(Datasource):
        def get_name(self) -> str:
            return "segpipe"

        def estimate_inmemory_data_size(self) -> int | None:
            return None

        def get_read_tasks(self, parallelism: int, *args: object, **kwargs: object) -> list[ReadTask]:  # noqa: ARG002
            unknown = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
            return [ReadTask(partial(read, item), unknown) for item in work]

    return WorkSource()  # type: ignore[no-untyped-call]  # ray's base class has an untyped constructor


def _pack(items: Sequence[object]) -> pa.Table:
    rows = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
    return pa.table({_COLUMN: pa.array(rows, pa.large_binary())})


def _unpack(block: pa.Table) -> list[Any]:
    return [pickle.loads(row.as_buffer()) for row in block[_COLUMN]]  # noqa: S301  # written by _pack in the same job
