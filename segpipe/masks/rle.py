"""COCO run-length encoding: strings, runs, areas.

A mask of shape (height, width) is read column by column; its *counts* are the lengths of the alternating
runs of 0 and 1, beginning with 0 (the first run may be empty). COCO compresses counts to ASCII: from the
fourth run on a run is stored as its difference to the run two before, each number in groups of five bits,
lowest first, bit 5 set while more follow, plus 48 (`maskApi.c`, functions rleToString and rleFrString).

This module knows runs and strings. It does not know where masks come from.
"""

from collections.abc import Sequence

import numpy as np
from numba import njit

from segpipe.masks.compiled import MAX_BYTES_PER_COUNT, ByteArray, IntArray, write_counts


@njit(cache=True, nogil=True)
def _read_counts(text: ByteArray, out: IntArray) -> int:
    num_counts = 0
    position = 0
    while position < len(text):
        value = np.int64(0)
        shift = 0
        while True:
            if position >= len(text) or text[position] < 48 or text[position] > 111 or shift > 60:
                return -1
            group = np.int64(text[position]) - 48
            position += 1
            value |= (group & 31) << shift
            shift += 5
            if not group & 32:
                if group & 16:
                    value |= np.int64(-1) << shift
                break
        if num_counts > 2:
            value += out[num_counts - 2]
        out[num_counts] = value
        num_counts += 1
    return num_counts


def counts_from_string(text: str | bytes) -> IntArray:
    """Return the run lengths of one compressed COCO code, zeros first.

    Raises:
        ValueError: if the text is no COCO code (a character out of range, or cut short).
    """
    raw = np.frombuffer(text.encode("latin-1", "replace") if isinstance(text, str) else text, dtype=np.uint8)
    out = np.empty(len(raw), dtype=np.int64)
    num_counts = int(_read_counts(raw, out))
    if num_counts < 0:
        raise ValueError(f"not a COCO run-length code: {text[:40]!r} has a character out of range or ends early")
    return out[:num_counts]


def area_from_counts(counts: IntArray) -> int:
    """Return the number of mask pixels: the sum of every second run.

    pycocotools.mask.area fails on 256 or more masks with NumPy 2, and wraps beyond 2^32 pixels; this does neither.
    """
    return int(counts[1::2].sum())


def find_problem(text: str | None, *, height: int, width: int, area: int | None) -> str | None:
    """Say in a few words what is wrong with one stored mask, or return None.

    Args:
        text: compressed COCO counts, None for a model without masks.
        height: rows of the mask's frame, px.
        width: columns of the mask's frame, px.
        area: stored number of mask pixels.
    """
    if text is None:
        return None if area is None else f"area is {area} but there is no mask"
    try:
        counts = counts_from_string(text)
    except ValueError as error:
        return str(error)
    if (counts < 0).any() or (counts[1:] == 0).any():
        return "a run has no pixels"
    total = int(counts.sum())
    if total != height * width:
        return f"runs cover {total} px, the frame has {height} x {width} = {height * width}"
    if area_from_counts(counts) != area:
        return f"mask has {area_from_counts(counts)} px, area says {area}"
    return None


def compress(bounds: Sequence[int] | IntArray, *, num_pixels: int) -> str:
    """Return the compressed COCO counts of one mask given the positions where it changes value."""
    positions = np.asarray(bounds, dtype=np.int64)
    out = np.empty(MAX_BYTES_PER_COUNT * (len(positions) + 1), dtype=np.uint8)
    written = int(write_counts(positions, len(positions), num_pixels, out))
    return out[:written].tobytes().decode("ascii")
