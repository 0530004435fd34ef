"""Where an enlarged grid crosses its threshold: the compiled outline tracer, in torch's own arithmetic.

torch has two kernels for bilinear enlargement on a CPU and picks by the size of the result (UpSampleKernel.cpp,
_use_vectorized_kernel_cond_2d). Above 128 px of height plus width it blends columns, then rows, one fused
multiply-add each, with a source index that is not fused. Up to 128 px the index is fused and four weighted corners
are summed; there every pixel is computed, of which there are 4,096 at most. Both are followed to the last bit.

Everything that compiled code calls stands in this one file: numba keeps compiled code on disk and looks only at the
file of the function that is called from Python, so a change elsewhere would go unnoticed.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
ByteArray = npt.NDArray[np.uint8]

# Height plus width of the enlarged mask up to which torch takes its other kernel.
_SMALL_EXTENT_PX = 128

# A difference of runs below 2^34 pixels needs at most seven groups of five bits, sign included.
MAX_BYTES_PER_COUNT = 7


@njit(cache=True, inline="always")
def _blend(a: np.float32, weight_a: np.float32, b: np.float32, weight_b: np.float32) -> np.float32:
    # torch contracts a * wa + (b * wb) to one fused multiply-add: exact in float64, rounded once.
    return np.float32(np.float64(a) * np.float64(weight_a) + np.float64(np.float32(b * weight_b)))


@njit(cache=True, inline="always")
def _add_product(a: np.float32, b: np.float32, total: np.float32) -> np.float32:
    return np.float32(np.float64(a) * np.float64(b) + np.float64(total))


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
def _locate_fused(
    pixel: int, scale: np.float32, offset: np.float32, num_nodes: int
) -> tuple[int, np.float32, np.float32]:
    """Return the same as `_locate`, rounded as torch's kernel for small masks rounds."""
    source = np.float32(np.float64(np.float32(np.float32(pixel) + np.float32(0.5))) * np.float64(scale) - 0.5)
    source = max(np.float32(source + offset), np.float32(0))
    node = min(int(source), num_nodes - 1)
    weight = min(np.float32(source - np.float32(node)), np.float32(1))
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
def _trace_small(
    grid: FloatArray, threshold: np.float32, affine: FloatArray, clip: IntArray, height: int, bounds: IntArray
) -> int:
    """Write where one small enlarged mask changes value, pixel by pixel. Same contract as `_trace`."""
    num_bounds, pending = 0, -1
    for x in range(clip[0], clip[2]):
        column, left, right = _locate_fused(x - int(affine[4]), affine[0], affine[2], grid.shape[1])
        next_column = min(column + 1, grid.shape[1] - 1)
        inside = False
        for y in range(clip[1], clip[3]):
            row, upper, lower = _locate_fused(y - int(affine[5]), affine[1], affine[3], grid.shape[0])
            next_row = min(row + 1, grid.shape[0] - 1)
            value = _blend(
                grid[row, column], np.float32(upper * left), grid[row, next_column], np.float32(upper * right)
            )
            value = _add_product(grid[next_row, column], np.float32(lower * left), value)
            value = _add_product(grid[next_row, next_column], np.float32(lower * right), value)
            if (value > threshold) != inside:
                inside = not inside
                num_bounds, pending = _toggle(bounds, num_bounds, pending, x * height + y)
        if inside:
            num_bounds, pending = _toggle(bounds, num_bounds, pending, x * height + clip[3])
    if pending >= 0:
        num_bounds, _ = _toggle(bounds, num_bounds, pending, -2)
    return num_bounds


@njit(cache=True, nogil=True)
def trace(
    grid: FloatArray, threshold: np.float32, affine: FloatArray, clip: IntArray, height: int, bounds: IntArray
) -> int:
    """Trace with the arithmetic that torch would choose for an enlarged mask of this size."""
    extent = np.rint(grid.shape[1] / affine[0]) + np.rint(grid.shape[0] / affine[1])
    if clip[2] <= clip[0] or clip[3] <= clip[1]:
        return 0
    if extent <= _SMALL_EXTENT_PX:
        return int(_trace_small(grid, threshold, affine, clip, height, bounds))
    return int(_trace(grid, threshold, affine, clip, height, bounds))


@njit(cache=True, nogil=True)
def write_counts(bounds: IntArray, num_bounds: int, num_pixels: int, out: ByteArray) -> int:
    """Write one mask's compressed counts into `out` and return how many bytes they took.

    Args:
        bounds: (num_bounds,) strictly rising positions in column-major order where the mask changes value;
            before the first it is 0.
        num_bounds: how many entries of `bounds` count.
        num_pixels: height * width.
        out: room for MAX_BYTES_PER_COUNT * (num_bounds + 1) bytes.
    """
    written = 0
    previous = np.int64(0)
    one_back = np.int64(0)
    two_back = np.int64(0)
    for index in range(num_bounds + 1):
        if index < num_bounds:
            end = bounds[index]
        else:
            end = np.int64(num_pixels)
            if end == previous and index > 0:
                break
        count = end - previous
        value = count - (two_back if index > 2 else 0)
        previous, two_back, one_back = end, one_back, count
        while True:
            group = value & 31
            value >>= 5
            more = (value != -1) if (group & 16) else (value != 0)
            out[written] = (group | 32 if more else group) + 48
            written += 1
            if not more:
                break
    return written


@njit(cache=True, nogil=True)
def encode_all(
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
        num_bounds = trace(values[mask], threshold, affine[mask], clips[mask], height, bounds)
        if num_bounds > len(bounds):
            bounds = np.empty(2 * num_bounds, np.int64)
            num_bounds = trace(values[mask], threshold, affine[mask], clips[mask], height, bounds)
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
