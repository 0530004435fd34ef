"""The stages folded over the work, in this process. Nothing more."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from segpipe.engines import Execute, Job, OnPhase, local_cpus, threads_per_actor
from segpipe.models import pin_threads
from segpipe.records import Committed, Fault
from segpipe.shards.work import Work
from segpipe.stages.guard import ChunkProcessor
from segpipe.stages.read import read_chunks


@contextmanager
def open_inline(job: Job, on_phase: OnPhase) -> Iterator[Execute]:
    """Load the model here and hand out the loop. The threads of the model's library are put back afterwards."""
    threads = threads_per_actor(job.resources, local_cpus())
    before = pin_threads(job.request.info.name, threads)
    try:
        on_phase(f"loading {job.request.info.name}")
        process = ChunkProcessor(job.segment_settings(threads), layout=job.layout, label=job.label)

        def execute(work: Sequence[Work]) -> Iterator[Committed | Fault]:
            for item in work:
                for chunk in read_chunks(item):
                    yield process(chunk)

        yield execute
    finally:
        pin_threads(job.request.info.name, before)
