"""The three stages: read a chunk, segment it, commit it. Plain functions of their input; engines only call them.

What is wrong with an image's bytes becomes a failed row. What is wrong with the world (store, device, memory)
becomes a `Fault`, which passes through the later stages and leaves the chunk pending. Anything else is a bug and
escapes with its traceback.
"""

from dataclasses import dataclass

from segpipe.models import ModelRequest


@dataclass(frozen=True, slots=True)
class SegmentSettings:
    """What the segment stage needs to know; travels to the workers.

    Attributes:
        request: model, weights and selection.
        max_pixels: refuse larger images.
        allow_truncated: decode what there is of a file that was cut short.
        threads: CPU threads of one worker.
        max_seconds: that one step with an image may take.
        max_memory_gb: that an image may take when it is tried alone.
    """

    request: ModelRequest
    max_pixels: int
    allow_truncated: bool
    threads: int
    max_seconds: float = 600.0
    max_memory_gb: float = 8.0
