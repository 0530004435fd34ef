"""Masks: every encoding equals torchvision's paste, a threshold and pycocotools, to the last character."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import expand_boxes, paste_masks_in_image

from segpipe.detections import Grids
from segpipe.masks import grids as grids_module
from segpipe.masks.grids import choose_encoder, encode_grids, encode_grids_compiled
from segpipe.masks.portable import encode_grids_portable
from segpipe.masks.rle import area_from_counts, compress, counts_from_string, find_problem
from segpipe.masks.roi import noise_roi_grids, roi_grids


def reference(probs, boxes, height, width, threshold=0.5):
    """Paste, threshold, pycocotools: the full-size path, one mask at a time."""
    codes = []
    for prob, box in zip(probs, boxes, strict=True):
        x0, y0, x1, y1 = expand_boxes(torch.from_numpy(box[None]), 30 / 28).to(torch.int64)[0].tolist()
        if x1 < 0 or y1 < 0 or x0 >= width or y0 >= height:
            mask = np.zeros((height, width), np.uint8)  # torchvision's paste crashes on a box off the image
        else:
            pasted = paste_masks_in_image(
                torch.from_numpy(prob[None, None]), torch.from_numpy(box[None]), (height, width)
            )
            mask = (pasted[0, 0] > threshold).numpy().astype(np.uint8)
        codes.append(coco_mask.encode(np.asfortranarray(mask))["counts"].decode())
    return codes


def assert_equal_to_reference(probs, boxes, height, width, threshold=0.5):
    grids = roi_grids(probs, boxes, threshold=threshold)
    expected = reference(probs, boxes, height, width, threshold)
    compiled, areas = encode_grids_compiled(grids, height=height, width=width)
    portable, portable_areas = encode_grids_portable(grids, height=height, width=width)
    assert compiled == expected
    assert portable == expected
    decoded = [int(coco_mask.decode({"size": [height, width], "counts": code}).sum()) for code in expected]
    assert areas.tolist() == portable_areas.tolist() == decoded


def smooth_masks(rng, count):
    """Return masks as a mask head gives them: blobs with soft borders."""
    axis = np.linspace(-1, 1, 28, dtype=np.float32)
    parts = []
    for _ in range(count):
        waves = sum(
            rng.normal() * np.outer(np.cos(rng.normal() * 3 * axis + rng.normal()), np.cos(rng.normal() * 3 * axis))
            for _ in range(4)
        )
        radius = np.hypot(axis[:, None] * rng.uniform(0.7, 1.5), axis[None, :] * rng.uniform(0.7, 1.5))
        parts.append(1 / (1 + np.exp(-6 * (0.9 - radius + 0.3 * waves))))
    return np.stack(parts).astype(np.float32)


def random_boxes(rng, count, height, width, reach=0.2):
    corners = rng.uniform(-reach, 1 + reach, (count, 2, 2)) * [width, height]
    return np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1).astype(np.float32)


@pytest.mark.parametrize("seed", range(24))
def test_smooth_masks_equal_paste_threshold_and_pycocotools(seed):
    rng = np.random.default_rng(seed)
    height, width = [(480, 640), (640, 427), (333, 500), (97, 31), (64, 64), (720, 1280)][seed % 6]
    assert_equal_to_reference(smooth_masks(rng, 24), random_boxes(rng, 24, height, width), height, width)


@pytest.mark.parametrize("seed", range(60))
def test_noise_masks_equal_paste_threshold_and_pycocotools(seed):
    """White noise has thousands of runs a mask and boxes of every size: 60 times 24 of the hardest masks."""
    rng = np.random.default_rng(1000 + seed)
    height, width = (int(size) for size in rng.integers(1, 300, 2))
    probs = rng.random((24, 28, 28), dtype=np.float32)
    assert_equal_to_reference(probs, random_boxes(rng, 24, height, width), height, width)


@pytest.mark.parametrize("size", [(480, 640), (50, 70), (1, 1), (1, 9), (9, 1), (200, 300), (511, 513), (33, 33)])
def test_edge_masks_equal_paste_threshold_and_pycocotools(size):
    """Full frame, one pixel, empty, first pixel set, off the image, larger than the image, exactly 0.5."""
    height, width = size
    rng = np.random.default_rng(height * width)
    full = [0, 0, width, height]
    boxes = [full, full, full, full, [0, 0, width / 2, height], [0, 0, width, height / 2], [0, 0, 1, 1]]
    boxes += [
        [width - 1, height - 1, width, height],
        [0, 0, 0.5, 0.5],
        [width * 0.3, height * 0.3, width * 0.31, height * 0.31],
    ]
    boxes += [
        [-5, -7, width + 9, height + 4],
        [-width, 0, width / 2, height],
        [width * 0.2, -height, width * 0.4, 2 * height],
    ]
    boxes += [[width + 40, 0, width + 60, 9], [0, -60, 9, -40]]
    probs = [np.ones((28, 28)), np.zeros((28, 28)), np.full((28, 28), 0.5), rng.random((28, 28))]
    probs += [np.ones((28, 28)) if index % 2 else rng.random((28, 28)).round() for index in range(len(boxes) - 4)]
    assert_equal_to_reference(np.stack(probs).astype(np.float32), np.array(boxes, np.float32), height, width)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 0.999])
def test_the_mask_threshold_is_the_one_that_is_asked_for(threshold):
    rng = np.random.default_rng(7)
    assert_equal_to_reference(smooth_masks(rng, 12), random_boxes(rng, 12, 120, 160), 120, 160, threshold)


@pytest.mark.parametrize("seed", range(40))
def test_masks_that_meet_the_threshold_exactly_equal_paste_threshold_and_pycocotools(seed):
    """Saturated masks of 0 and 1 pass through exactly 0.5, where the last bit of torch's arithmetic decides.

    torch rounds differently for masks of up to 128 px of height plus width: sizes on both sides of it.
    """
    rng = np.random.default_rng(2000 + seed)
    probs = rng.random((30, 28, 28), dtype=np.float32).round()
    probs[10:20] = (smooth_masks(rng, 10) > 0.5).astype(np.float32)
    probs[20:] = np.where(
        probs[20:] > 0, np.float32(0.5), np.nextafter(np.float32(0.5), np.float32(rng.integers(0, 2)))
    )
    corners = rng.uniform(0, 150, (30, 2))
    sizes = rng.uniform(0.2, 120 if seed % 2 else 40, (30, 2))
    boxes = np.concatenate([corners, corners + sizes], axis=1).astype(np.float32)
    assert_equal_to_reference(probs, boxes, 220, 250)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 2**32 - 1), st.sampled_from(["noise", "binary", "half"]))
def test_any_box_and_any_mask_equal_paste_threshold_and_pycocotools(height, width, seed, kind):
    rng = np.random.default_rng(seed)
    probs = rng.random((6, 28, 28), dtype=np.float32)
    probs = {"noise": probs, "binary": probs.round(), "half": np.where(probs > 0.5, np.float32(0.5), probs)}[kind]
    assert_equal_to_reference(probs, random_boxes(rng, 6, height, width, reach=1.5), height, width)


def grid_reference(values, threshold, height, width):
    """Enlarge a whole-image grid to full size with torch."""
    soft = torch.nn.functional.interpolate(
        torch.from_numpy(values[None, None]), size=(height, width), mode="bilinear", align_corners=False
    )
    return coco_mask.encode(np.asfortranarray((soft[0, 0] > threshold).numpy().astype(np.uint8)))["counts"].decode()


@pytest.mark.parametrize("seed", range(40))
def test_whole_image_grids_of_any_size_equal_torch_and_pycocotools(seed):
    """The same encoder serves logits of any resolution: grids of 1 to 19 cells, images of 1 to 89 px."""
    rng = np.random.default_rng(seed)
    rows, columns = (int(size) for size in rng.integers(1, 20, 2))
    height, width = (int(size) for size in rng.integers(1, 90, 2))
    values = rng.normal(size=(8, rows, columns)).astype(np.float32)
    scale = np.array([np.float32(columns) / np.float32(width), np.float32(rows) / np.float32(height)], np.float32)
    grids = Grids(
        values=values,
        threshold=0.0,
        scale_xy=np.tile(scale, (8, 1)),
        offset_xy=np.zeros((8, 2), np.float32),
        origin_xy=np.zeros((8, 2), np.int64),
        clip_xyxy=np.tile(np.array([0, 0, width, height]), (8, 1)),
    )
    expected = [grid_reference(value, 0.0, height, width) for value in values]
    assert encode_grids_compiled(grids, height=height, width=width)[0] == expected


def test_no_masks_are_no_codes():
    grids = roi_grids(np.zeros((0, 28, 28), np.float32), np.zeros((0, 4), np.float32))
    codes, areas = encode_grids(grids, height=10, width=10)
    assert codes == []
    assert areas.shape == (0,)


def test_more_than_255_masks_have_their_areas():
    """pycocotools.mask.area fails on 256 and more with NumPy 2."""
    grids = noise_roi_grids(3, height=120, width=90, num_masks=300)
    codes, areas = encode_grids(grids, height=120, width=90)
    decoded = [int(coco_mask.decode({"size": [120, 90], "counts": code}).sum()) for code in codes]
    assert areas.tolist() == decoded


def test_a_mask_costs_no_memory_of_the_images_size():
    """A 12 MP image with 100 masks would be 4.8 GB of pasted floats."""
    import tracemalloc

    grids = noise_roi_grids(1, height=300, width=400, num_masks=100)
    encode_grids_compiled(grids, height=300, width=400)
    tracemalloc.start()
    encode_grids_compiled(grids, height=3000, width=4000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20


def test_masks_and_boxes_must_agree_in_number():
    with pytest.raises(ValueError, match="2 masks but 1 boxes"):
        roi_grids(np.zeros((2, 28, 28), np.float32), np.zeros((1, 4), np.float32))


def test_the_portable_encoder_refuses_grids_that_torch_cannot_place():
    grids = roi_grids(np.ones((1, 28, 28), np.float32), np.array([[1, 1, 9, 9]], np.float32))
    shifted = Grids(
        grids.values, grids.threshold, grids.scale_xy, np.ones((1, 2), np.float32), grids.origin_xy, grids.clip_xyxy
    )
    with pytest.raises(ValueError, match=r"grid 0 covers .* at offset"):
        encode_grids_portable(shifted, height=20, width=20)


def test_a_processor_that_rounds_differently_gets_the_portable_encoder(monkeypatch, caplog):
    """Where the compiled code would differ from torch by one character, it is not used."""
    honest = encode_grids_compiled

    def slightly_off(grids, *, height, width):
        codes, areas = honest(grids, height=height, width=width)
        return [*codes[:-1], compress([0], num_pixels=height * width)], areas

    grids_module._compiled_equals_torch.cache_clear()
    monkeypatch.setattr(grids_module, "encode_grids_compiled", slightly_off)
    try:
        assert choose_encoder() == "portable"
        assert "rounds differently" in caplog.text
        grids = noise_roi_grids(5, height=50, width=60)
        assert encode_grids(grids, height=50, width=60)[0] == honest(grids, height=50, width=60)[0]
    finally:
        grids_module._compiled_equals_torch.cache_clear()
    monkeypatch.undo()
    assert choose_encoder() == "compiled"


@given(st.lists(st.integers(0, 70_000), min_size=1, max_size=60))
def test_counts_survive_the_way_to_text_and_back(counts):
    """Also counts that pycocotools would write differently: the text is what COCO's reader takes."""
    counts = [counts[0], *[count + 1 for count in counts[1:]]]
    bounds = np.cumsum(counts)
    text = compress(bounds[:-1], num_pixels=int(bounds[-1]))
    assert counts_from_string(text).tolist() == counts
    mask = coco_mask.decode({"size": [int(bounds[-1]), 1], "counts": text}) if bounds[-1] else None
    if mask is not None:
        assert int(mask.sum()) == area_from_counts(np.array(counts)) == sum(counts[1::2])


@pytest.mark.parametrize("text", ["\x10", "P", "0p", "é", "PPPPPPPPPPPPPPPPPPPP0"])
def test_text_that_is_no_code_is_refused(text):
    with pytest.raises(ValueError, match="not a COCO run-length code"):
        counts_from_string(text)


def test_a_stored_mask_that_does_not_fit_is_found():
    whole = compress([3, 7], num_pixels=12)
    assert find_problem(whole, height=3, width=4, area=4) is None
    assert find_problem(None, height=3, width=4, area=None) is None
    assert find_problem(whole, height=3, width=5, area=4) == "runs cover 12 px, the frame has 3 x 5 = 15"
    assert find_problem(whole, height=3, width=4, area=5) == "mask has 4 px, area says 5"
    assert find_problem(None, height=3, width=4, area=5) == "area is 5 but there is no mask"
    assert "a run has no pixels" in str(find_problem(compress([3, 3], num_pixels=12), height=3, width=4, area=0))
    assert "not a COCO" in str(find_problem("\x01", height=3, width=4, area=0))


def test_compiled_code_calls_nothing_outside_its_own_file():
    """numba keeps compiled code by the file of the entry point: a change elsewhere would go unnoticed."""
    import importlib
    import pkgutil

    from numba.core.registry import CPUDispatcher

    import segpipe.masks

    found = 0
    for module in pkgutil.iter_modules(segpipe.masks.__path__, "segpipe.masks."):
        for function in vars(importlib.import_module(module.name)).values():
            if isinstance(function, CPUDispatcher) and function.py_func.__module__ == module.name:
                found += 1
                names = function.py_func.__code__.co_names
                called = [function.py_func.__globals__.get(name) for name in names]
                homes = {one.py_func.__module__ for one in called if isinstance(one, CPUDispatcher)}
                assert homes <= {module.name}, function
    assert found > 8
