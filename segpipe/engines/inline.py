"""The stages folded over the work, in this process. Nothing more."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from segpipe.engines import Execute, Job, OnPhase, local_cpus, threads_per_actor
from segpipe.models import pin_threads
from segpipe.records import Committed, Fault
from segpipe.shards.work import Work
from segpipe.stages.commit import commit_chunk
from segpipe.stages.read import read_chunks
from segpipe.stages.segment import SegmentChunk


@contextmanager
def open_inline(job: Job, on_phase: OnPhase) -> Iterator[Execute]:
    """Load the model here and hand out the loop. The threads of the model's library are put back afterwards."""
    threads = threads_per_actor(job.resources, local_cpus())
    before = pin_threads(job.request.info.name, threads)
    try:
        on_phase(f"loading {job.request.info.name}")
        segment = SegmentChunk(job.segment_settings(threads))

        def execute(work: Sequence[Work]) -> Iterator[Committed | Fault]:
            for item in work:
                for chunk in read_chunks(item):
                    yield commit_chunk(segment(chunk), layout=job.layout, label=job.label)

        yield execute
    finally:
        pin_threads(job.request.info.name, before)
