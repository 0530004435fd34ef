"""Who executes the stages. An engine turns work into committed chunks; what a chunk becomes is the same in each.

inline   a plain loop in this process: quick looks, tests, debugging
ray      Ray Data: read tasks, a pool of actors that each hold a model, commit tasks; here or on a cluster
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from segpipe.config import ResourcesConfig
from segpipe.errors import ConfigError
from segpipe.layout import RunLayout
from segpipe.models import ModelRequest
from segpipe.records import Committed, Fault
from segpipe.shards.work import Work
from segpipe.stages import SegmentSettings
from segpipe.tables import RunLabel

Execute = Callable[[Sequence[Work]], Iterator[Committed | Fault]]
OnPhase = Callable[[str], None]

_AUTO_THREADS = 4


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker needs to know; small, and the same for every chunk.

    Attributes:
        request: model, weights and selection.
        max_pixels: refuse larger images.
        allow_truncated: decode what there is of a file that was cut short.
        layout: places of the run.
        label: what the files say about the run.
        resources: the `resources` section.
    """

    request: ModelRequest
    max_pixels: int
    allow_truncated: bool
    layout: RunLayout
    label: RunLabel
    resources: ResourcesConfig

    def segment_settings(self, threads: int) -> SegmentSettings:
        """Return the settings of the segment stage for a worker with this many threads."""
        return SegmentSettings(
            self.request,
            self.max_pixels,
            self.allow_truncated,
            threads,
            self.resources.max_image_seconds,
            self.resources.max_image_memory_gb,
        )


@dataclass(frozen=True, slots=True)
class Pool:
    """How the workers are cut.

    Attributes:
        num_actors: models at work at the same time.
        threads: CPU threads of each.
        gpus: GPUs of each, may be a fraction.
    """

    num_actors: int
    threads: int
    gpus: float


def open_engine(job: Job, on_phase: OnPhase) -> AbstractContextManager[Execute]:
    """Start the configured engine; the body gets a function from work to committed chunks.

    Args:
        job: what to do with each chunk.
        on_phase: told in words what is being waited for.

    Raises:
        RequestError: if the engine cannot be used as configured.
    """
    if job.resources.engine == "inline":
        from segpipe.engines.inline import open_inline

        return open_inline(job, on_phase)
    from segpipe.engines.ray import open_ray

    return open_ray(job, on_phase)


def threads_per_actor(resources: ResourcesConfig, num_cpus: float) -> int:
    """Return the threads of one worker: as configured, else 4, or all CPUs where there are fewer.

    The same under every engine on one machine, because another number changes the last bits of scores.
    """
    asked = resources.cpus_per_actor
    return max(1, min(_AUTO_THREADS, int(num_cpus))) if asked == "auto" else asked


def size_pool(resources: ResourcesConfig, *, num_cpus: float, num_gpus: float, device: str) -> Pool:
    """Cut the CPUs and GPUs of a cluster into workers.

    Args:
        resources: the `resources` section.
        num_cpus: CPUs of the cluster.
        num_gpus: GPUs of the cluster.
        device: `model.device`; GPUs are asked for unless it is `cpu` or `mps`.

    Raises:
        ConfigError: if the cluster cannot hold the workers that are asked for; they would be waited for for ever.
    """
    wants_gpu = num_gpus > 0 and device in ("auto", "cuda")
    gpus = (1.0 if wants_gpu else 0.0) if resources.gpus_per_actor == "auto" else resources.gpus_per_actor
    threads = threads_per_actor(resources, num_cpus)
    room = min(int(num_cpus // threads), int(num_gpus / gpus + 1e-9) if gpus else 1 << 30)
    num_actors = max(1, room) if resources.num_actors == "auto" else resources.num_actors
    if num_actors > room:
        raise ConfigError(
            f"resources: {num_actors} actors with {threads} CPUs and {gpus:g} GPUs each do not fit into "
            f"{num_cpus:g} CPUs and {num_gpus:g} GPUs; lower resources.num_actors or resources.cpus_per_actor"
        )
    return Pool(num_actors, threads, gpus)


def local_cpus() -> int:
    """Return the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
