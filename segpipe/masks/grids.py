"""Low-resolution mask grids to COCO RLE without a full-size mask.

RoI masks of Mask R-CNN, prototypes of YOLO, logits of DETR or SAM are all the same thing: a small float32
grid, where it lies in the image, a threshold, and a rectangle that clips it. Enlarged bilinearly, such a
mask can cross its threshold at most once between two neighbouring grid nodes of an image column. So only
grid cells whose four corners disagree can hold an outline, and only those are visited: the cost is the
outline's, not the image's.

The arithmetic follows `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)` on a CPU to
the last bit (float32 source index, true division for the scale, one fused multiply-add), so the result
equals pasting, thresholding and pycocotools. Where a processor rounds differently, `encode_grids` notices
by itself and takes the slower torch path (`portable.py`).
"""

import logging
import sys
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
from numba import njit

from segpipe.detections import Grids
from segpipe.masks.rle import MAX_BYTES_PER_COUNT, IntArray, write_counts

FloatArray = npt.NDArray[np.float32]

logger = logging.getLogger(__name__)


@njit(cache=True, inline="always")
def _blend(a: np.float32, weight_a: np.float32, b: np.float32, weight_b: np.float32) -> np.float32:
    # torch contracts a * wa + (b * wb) to one fused multiply-add: exact in float64, rounded once.
    return np.float32(np.float64(a) * np.float64(weight_a) + np.float64(np.float32(b * weight_b)))


@njit(cache=True, inline="always")
def _locate(pixel: int, scale: np.float32, offset: np.float32, num_nodes: int) -> tuple[int, np.float32, np.float32]:
    """Return the grid node at or before a pixel's centre and the weights of that node and the next."""
    source = np.float32(np.float32(np.float32(np.float32(pixel) + np.float32(0.5)) * scale) + offset) - np.float32(0.5)
    if source < 0:
        source = np.float32(0)
    node = int(source)
    node = min(node, num_nodes - 1)
    weight = np.float32(source - np.float32(node))
    if weight > 1:
        weight = np.float32(1)
    return node, np.float32(np.float32(1) - weight), weight


@njit(cache=True, inline="always")
def _toggle(bounds: IntArray, num_bounds: int, pending: int, position: int) -> tuple[int, int]:
    """Note that the mask changes value at `position`; two changes at one place cancel out.

    That happens where a run leaves the bottom of a column and enters the next at its top.
    """
    if pending == position:
        return num_bounds, -1
    if pending >= 0:
        if num_bounds < len(bounds):
            bounds[num_bounds] = pending
        num_bounds += 1
    return num_bounds, position


@njit(cache=True, nogil=True)
def _mixed_cells(
    grid: FloatArray, threshold: np.float32, column: int, rows: tuple[int, int], cells: IntArray
) -> tuple[int, bool]:
    """Find the cells between grid columns `column` and the next whose corners disagree.

    Returns how many there are (their rows are in `cells`), and whether a corner of the first row is inside.
    """
    neighbour = min(column + 1, grid.shape[1] - 1)
    left = grid[rows[0], column] > threshold
    right = grid[rows[0], neighbour] > threshold
    any_at_top = left or right
    num_cells = 0
    for row in range(rows[0], rows[1]):
        left_below = grid[row + 1, column] > threshold
        right_below = grid[row + 1, neighbour] > threshold
        if not (left == right and left == left_below and left == right_below):
            cells[num_cells] = row
            num_cells += 1
        left, right = left_below, right_below
    return num_cells, any_at_top


@njit(cache=True, nogil=True)
def _find_crossing(
    ends: tuple[np.float32, np.float32],
    threshold: np.float32,
    span: tuple[int, int],
    weights: FloatArray,
    guess: float,
) -> int:
    """Return the first image row in [span) that is on the lower node's side; span[1] if none is.

    Interpolation between two nodes is monotonic, so a guess from the straight line is walked to the exact row.
    """
    above, below = ends
    state_below = below > threshold
    first, last = span
    row = min(max(int(np.ceil(guess)), first), last)
    while row > first and (_blend(above, weights[row - 1, 0], below, weights[row - 1, 1]) > threshold) == state_below:
        row -= 1
    while row < last and (_blend(above, weights[row, 0], below, weights[row, 1]) > threshold) != state_below:
        row += 1
    return row


@njit(cache=True, nogil=True)
def _place_rows(affine: FloatArray, y0: int, y1: int, num_nodes: int) -> tuple[FloatArray, IntArray, tuple[int, int]]:
    """Locate image rows y0 to y1 among the grid's rows.

    Returns the weights (y1 - y0, 2) of the two nodes around each row, the first row (from y0) whose node is j
    or later for each j, and the first and last grid row that matter.
    """
    num_rows = y1 - y0
    weights = np.empty((num_rows, 2), np.float32)
    first_row = np.full(num_nodes + 1, num_rows, np.int64)
    top = bottom = -1
    for row in range(num_rows):
        node, weights[row, 0], weights[row, 1] = _locate(row + y0 - int(affine[5]), affine[1], affine[3], num_nodes)
        if node > bottom:
            first_row[bottom + 1 : node + 1] = row
            bottom = node
        if row == 0:
            top = node
    return weights, first_row, (top, min(bottom + 1, num_nodes - 1))


@njit(cache=True, nogil=True)
def _trace(
    grid: FloatArray, threshold: np.float32, affine: FloatArray, clip: IntArray, height: int, bounds: IntArray
) -> int:
    """Write where one enlarged mask changes value, column-major; return how many changes (may exceed the room).

    Args:
        affine: (6,) scale x, y (grid cells per px), offset x, y (cells), origin x, y (px).
        clip: (4,) x0, y0, x1, y1 in px, inside the image, ends exclusive.
    """
    x0, y0, x1, y1 = clip[0], clip[1], clip[2], clip[3]
    if x1 <= x0 or y1 <= y0:
        return 0
    weights, first_row, rows = _place_rows(affine, y0, y1, grid.shape[0])
    cells = np.empty(grid.shape[0], np.int64)
    num_cells, any_at_top, last_node = 0, False, -1
    num_bounds, pending = 0, -1
    for x in range(x0, x1):
        node, weight_left, weight_right = _locate(x - int(affine[4]), affine[0], affine[2], grid.shape[1])
        neighbour = min(node + 1, grid.shape[1] - 1)
        if node != last_node:
            num_cells, any_at_top = _mixed_cells(grid, threshold, node, rows, cells)
            last_node = node
        if num_cells == 0 and not any_at_top:
            continue
        base = x * height + y0
        inside = _blend(grid[rows[0], node], weight_left, grid[rows[0], neighbour], weight_right) > threshold
        if inside:
            num_bounds, pending = _toggle(bounds, num_bounds, pending, base)
        for cell in cells[:num_cells]:
            above = _blend(grid[cell, node], weight_left, grid[cell, neighbour], weight_right)
            below = _blend(grid[cell + 1, node], weight_left, grid[cell + 1, neighbour], weight_right)
            if (below > threshold) == inside:
                continue
            inside = below > threshold
            span = (first_row[cell], first_row[cell + 1])
            guess = (cell + (threshold - above) / (below - above) + 0.5 - affine[3]) / affine[1] - 0.5 + affine[5] - y0
            row = _find_crossing((above, below), threshold, span, weights, guess)
            num_bounds, pending = _toggle(bounds, num_bounds, pending, base + row)
        if inside:
            num_bounds, pending = _toggle(bounds, num_bounds, pending, base + y1 - y0)
    if pending >= 0:
        num_bounds, _ = _toggle(bounds, num_bounds, pending, -2)
    return num_bounds


@njit(cache=True, nogil=True)
def _encode_all(
    values: FloatArray, threshold: np.float32, affine: FloatArray, clips: IntArray, frame: tuple[int, int]
) -> tuple[npt.NDArray[np.uint8], IntArray, IntArray]:
    """Encode N grids; return all strings as one byte array, where each ends, and the areas."""
    height, width = frame
    num_masks = values.shape[0]
    ends = np.empty(num_masks, np.int64)
    areas = np.zeros(num_masks, np.int64)
    bounds = np.empty(4096, np.int64)
    text = np.empty(4096, np.uint8)
    written = 0
    for mask in range(num_masks):
        num_bounds = _trace(values[mask], threshold, affine[mask], clips[mask], height, bounds)
        if num_bounds > len(bounds):
            bounds = np.empty(2 * num_bounds, np.int64)
            num_bounds = _trace(values[mask], threshold, affine[mask], clips[mask], height, bounds)
        needed = written + MAX_BYTES_PER_COUNT * (num_bounds + 1)
        if needed > len(text):
            larger = np.empty(2 * needed, np.uint8)
            larger[:written] = text[:written]
            text = larger
        written += write_counts(bounds, num_bounds, height * width, text[written:])
        ends[mask] = written
        for index in range(0, num_bounds, 2):
            end = bounds[index + 1] if index + 1 < num_bounds else height * width
            areas[mask] += end - bounds[index]
    return text[:written], ends, areas


def encode_grids_compiled(grids: Grids, *, height: int, width: int) -> tuple[list[str], IntArray]:
    """Encode grids with the compiled outline tracer. Same contract as `encode_grids`."""
    num_masks = len(grids.values)
    affine = np.empty((num_masks, 6), np.float32)
    affine[:, 0:2] = grids.scale_xy
    affine[:, 2:4] = grids.offset_xy
    affine[:, 4:6] = grids.origin_xy
    clips = np.clip(grids.clip_xyxy, 0, [width, height, width, height]).astype(np.int64)
    values = np.ascontiguousarray(grids.values, dtype=np.float32)
    text, ends, areas = _encode_all(values, np.float32(grids.threshold), affine, clips, (height, width))
    raw = text.tobytes().decode("ascii")
    starts = [0, *ends[:-1].tolist()]
    return [raw[start:end] for start, end in zip(starts, ends.tolist(), strict=True)], areas


def encode_grids(grids: Grids, *, height: int, width: int) -> tuple[list[str], IntArray]:
    """Encode N mask grids as COCO RLE without building a full-size mask.

    Args:
        grids: N float32 grids, where each lies in the image, threshold and clip rectangles.
        height: rows of the image, px.
        width: columns of the image, px.

    Returns:
        N compressed counts in input order, and their areas (N,) int64 px; equal to enlarging bilinearly,
        keeping what is over the threshold, and pycocotools encoding.
    """
    if len(grids.values) == 0:
        return [], np.zeros(0, np.int64)
    if choose_encoder() == "compiled":
        return encode_grids_compiled(grids, height=height, width=width)
    from segpipe.masks.portable import encode_grids_portable  # torch loads slowly: only where it is needed

    return encode_grids_portable(grids, height=height, width=width)


def choose_encoder() -> Literal["compiled", "portable"]:
    """Return `portable` where this processor's torch rounds differently from the compiled code, else `compiled`.

    In a process that has not loaded torch there is nothing to differ from.
    """
    return "compiled" if "torch" not in sys.modules or _compiled_equals_torch() else "portable"


@cache
def _compiled_equals_torch() -> bool:
    """Encode some noise masks both ways, once in each process (some 20 ms)."""
    from segpipe.masks.portable import encode_grids_portable
    from segpipe.masks.roi import noise_roi_grids

    for seed, (height, width) in enumerate([(480, 640), (61, 47), (1080, 1920)]):
        grids = noise_roi_grids(seed, height=height, width=width)
        compiled, _ = encode_grids_compiled(grids, height=height, width=width)
        portable, _ = encode_grids_portable(grids, height=height, width=width)
        if compiled != portable:
            logger.warning("mask_encoder=portable reason='this processor rounds differently from the compiled code'")
            return False
    return True
