"""The quick look: overlays drawn from the rows, rows those of the tables."""

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from segpipe.config import ModelConfig
from segpipe.errors import InputError, OutputError
from segpipe.lake import read_table
from segpipe.overlay import draw_overlay
from segpipe.pipeline import run
from segpipe.quicklook import DEMO_PHOTOS, copy_demo_photos, demo, predict
from tests.conftest import assert_same_rows
from tests.factory import COLORS, cells, config, encode, write_photos


def test_predict_gives_the_rows_that_a_run_would(tmp_path):
    photos = sorted(write_photos(tmp_path / "in", range(3)).iterdir())
    found = predict([str(photo) for photo in photos], model=ModelConfig(name="blank"), output=tmp_path / "out")
    run(config(tmp_path / "in", tmp_path / "lake"))
    rows = read_table(str(tmp_path / "lake"), "instances").to_pylist()
    assert [row for one in found for row in one.instances] == [row for row in rows if row["score"] >= 0.5]
    assert [one.overlay.name for one in found] == [f"photo_{n:03d}.overlay.png" for n in range(3)]


def test_a_missing_image_is_refused_before_the_model_is_loaded(tmp_path):
    with pytest.raises(InputError, match=r"there is no image file at .*nope.png; for a folder use `segpipe run`"):
        predict([str(tmp_path / "nope.png")], model=ModelConfig(name="blank"))
    with pytest.raises(InputError, match="for a folder use"):
        predict([str(tmp_path)], model=ModelConfig(name="blank"))


def test_an_image_that_fails_has_no_overlay(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    (one,) = predict([str(tmp_path / "bad.png")], model=ModelConfig(name="blank"), output=tmp_path / "out")
    assert (one.row["status"], one.overlay, one.instances) == ("failed", None, ())


def test_an_overlay_tints_exactly_the_pixels_of_the_masks(tmp_path):
    image = np.full((64, 96, 3), 128, np.uint8)
    image[32:48, 32:48] = COLORS["red"]
    (tmp_path / "a.png").write_bytes(encode(image))
    (one,) = predict([str(tmp_path / "a.png")], model=ModelConfig(name="blank"), output=tmp_path)
    drawn = np.asarray(Image.open(one.overlay))
    assert drawn.shape == image.shape
    (row,) = one.instances
    mask = coco_mask.decode({"size": [row["height"], row["width"]], "counts": row["rle_counts"]}).astype(bool)
    assert (drawn[mask] != image[mask]).any(axis=1).all()
    below_the_label = np.zeros_like(mask)
    below_the_label[33:] = True
    box = np.zeros_like(mask)
    box[31:50, 31:50] = True
    assert (drawn[below_the_label & ~box] == image[below_the_label & ~box]).all()


def test_an_overlay_without_instances_is_the_image(tmp_path):
    image = cells([None] * 4)
    assert (np.asarray(draw_overlay(image, [])) == image).all()
    empty = {"rle_counts": coco_mask.encode(np.zeros((16, 64), np.uint8, order="F"))["counts"].decode()}
    row = {**empty, "height": 16, "width": 64, "category": "x", "score": 0.9}
    row |= {"bbox_x": 0.0, "bbox_y": 0.0, "bbox_w": 0.0, "bbox_h": 0.0}
    draw_overlay(image, [row, {**row, "rle_counts": None}])


def test_the_demo_resumes_and_draws_one_overlay_a_photograph(tmp_path):
    first = demo(tmp_path, model="blank", engine="inline")
    assert len(first.overlays) == len(DEMO_PHOTOS) == first.summary.totals.images
    assert first.instances
    again = demo(tmp_path, model="blank", engine="inline")
    assert (again.summary.skipped, again.summary.committed.images) == (6, 0)
    copy_demo_photos(tmp_path / "photos")
    other = demo(tmp_path / "b", model="blank", engine="inline")
    assert_same_rows(first.lake, other.lake)


def test_images_of_the_same_name_have_pictures_of_their_own(package_photos, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").write_bytes((package_photos / "rocket.jpg").read_bytes())
    found = predict([str(tmp_path / "a" / "x.png"), str(tmp_path / "b" / "x.png")], output=tmp_path / "out")
    assert [one.overlay.name for one in found] == ["x.overlay.png", "x-2.overlay.png"]
    assert all(one.overlay.is_file() for one in found)


def test_a_place_that_cannot_be_written_is_one_line(package_photos, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="file: cannot be written"):
        predict([str(package_photos / "rocket.jpg")], output=tmp_path / "file")
    with pytest.raises(OutputError, match="photos: cannot be written"):
        demo(tmp_path / "file", engine="inline")


def test_the_demo_leaves_other_photographs_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_bytes(b"x")
    with pytest.raises(OutputError, match="holds other files, such as mine.jpg; choose a new folder with --output"):
        demo(tmp_path, engine="inline")
