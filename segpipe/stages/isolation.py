"""One image in a process of its own, with limits of time and memory: the last word on whether it kills its worker.

The child is told what to do as a pickle on stdin. To stdout it writes a letter before each step, then the pickled
result; how far the letters go says at which step it died. The kernel's own timer and limits end it, not its Python.
"""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import psutil

from segpipe.records import EncodedChunk, Fault, ImageFailure, SegmentedChunk
from segpipe.stages import SegmentSettings
from segpipe.stages.segment import Rows, SegmentChunk

_STAGES: Mapping[bytes, Literal["decode", "segment"]] = {b"d": "decode", b"s": "segment"}
# A model of 200 MB on a slow disk, torch and numba from nothing.
_LOAD_S = 600.0
_POLL_S = 0.2


def segment_alone(chunk: EncodedChunk, settings: SegmentSettings) -> Rows | ImageFailure | Fault:
    """Segment a chunk of one image in a process of its own.

    Returns:
        The image's rows; or what its process died of; or a fault if the process died before it had begun the image.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "segpipe.stages.isolation"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    output, is_too_large = _wait(process, pickle.dumps((settings, chunk)), settings)
    letters, _, content = output.partition(b"\n")
    if process.returncode == 0 and content:
        found: SegmentedChunk | Fault = pickle.loads(content)  # noqa: S301  # written by this module's child
        if isinstance(found, Fault):  # a fault of memory, for one image alone, with all that it may have
            return ImageFailure("segment", "OutOfMemory", f"{found.message}; tried alone with {_memory(settings)}")
        return Rows(found.images.to_pylist()[0], found.instances)
    if not letters:
        reason = _reason(process.returncode)
        return Fault(chunk.id.name, "segment", f"a process for one image alone could not load the model: {reason}")
    stage = _STAGES[letters[-1:]]
    if process.returncode == -signal.SIGALRM:
        return ImageFailure(stage, "TimedOut", f"took over {settings.max_seconds:g} s when tried alone")
    if is_too_large or process.returncode == -signal.SIGKILL:
        return ImageFailure(stage, "OutOfMemory", f"took over {_memory(settings)} when tried alone")
    return ImageFailure(stage, "Crashed", f"ended its process when tried alone: {_reason(process.returncode)}")


def _wait(process: subprocess.Popen[bytes], content: bytes, settings: SegmentSettings) -> tuple[bytes, bool]:
    """Return what the child wrote, and whether it was killed because it took too much memory."""
    deadline = time.monotonic() + _LOAD_S + 2 * settings.max_seconds
    is_too_large = False
    feed: bytes | None = content
    while True:
        try:
            output, _ = process.communicate(feed, timeout=_POLL_S)
        except subprocess.TimeoutExpired:
            feed = None
            if time.monotonic() > deadline:
                process.kill()
            elif not is_too_large and _resident_bytes(process.pid) > _most_bytes(settings):
                # Address space cannot be limited where CUDA reserves it: what is resident is watched as well.
                is_too_large = True
                process.kill()
        else:
            return output, is_too_large


def _resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _most_bytes(settings: SegmentSettings) -> int:
    return int(settings.max_memory_gb * 1e9)


def _memory(settings: SegmentSettings) -> str:
    return f"{settings.max_memory_gb:g} GB"


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def main() -> None:
    """Do what stdin says."""
    result = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # libraries that print must not write into the result
    settings, chunk = pickle.loads(sys.stdin.buffer.read())  # noqa: S301  # written by segment_alone
    from segpipe.models import pin_threads

    pin_threads(settings.request.info.name, settings.threads)
    segment = SegmentChunk(settings)
    _limit_memory(settings)

    def watch(stage: str, image_ids: Sequence[str]) -> None:  # noqa: ARG001  # the shape of a watcher
        result.write(stage[:1].encode())
        signal.setitimer(signal.ITIMER_REAL, settings.max_seconds)  # its default action ends the process

    found = segment(chunk, watch=watch)
    result.write(b"\n" + pickle.dumps(found))


def _limit_memory(settings: SegmentSettings) -> None:
    """Cap the address space, where that means memory: not with CUDA, which reserves it."""
    import resource

    torch = sys.modules.get("torch")
    if sys.platform == "linux" and not (torch is not None and torch.cuda.is_initialized()):
        taken = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (taken + _most_bytes(settings),) * 2)


if __name__ == "__main__":
    main()
