"""Figures of a run: pycocotools' own, to the last digit, and a warning for whatever makes them not comparable."""

import contextlib
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from segpipe.coco.annotations import read_annotations
from segpipe.coco.confusion import count_confusions
from segpipe.coco.exporting import export_coco
from segpipe.coco.figures import FIGURE_NAMES, compute_figures
from segpipe.coco.importing import import_coco
from segpipe.coco.masks import to_rle
from segpipe.errors import InputError
from segpipe.evaluation import EvaluationOptions, evaluate
from segpipe.pipeline import run
from segpipe.storage import locate
from tests.factory import config, write_photos
from tests.test_coco import annotation, dataset, result, write

SMALL = [[0.0, 0.0, 10.0, 0.0, 10.0, 10.0, 0.0, 10.0]]


def stock_figures(truth_file, results, kind, image_ids=None):
    """Return the twelve figures as pycocotools prints them, without a line of segpipe."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(truth_file))
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        if image_ids is not None:
            evaluation.params.imgIds = image_ids
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return dict(zip(FIGURE_NAMES, evaluation.stats.tolist(), strict=True))


@pytest.fixture(scope="module")
def blank_lake(tmp_path_factory):
    """A lake of the blank model, and annotations made of what it found, so that its AP is 1."""
    folder = tmp_path_factory.mktemp("evaluation")
    lake = folder / "lake"
    run(config(write_photos(folder / "photos", range(8)), lake, model__max_instances=100))
    export_coco(str(lake), folder / "full.json", full=True)
    return folder


def changed_truth(blank_lake, change):
    tree = json.loads((blank_lake / "full.json").read_text())
    change(tree)
    return write(blank_lake / "changed.json", tree)


def test_a_run_measured_by_what_it_found_is_perfect(blank_lake):
    found = evaluate(str(blank_lake / "lake"), annotations=str(blank_lake / "full.json"))
    assert found.figures["segm"]["AP"] == pytest.approx(1)
    assert found.figures["bbox"]["AP"] == pytest.approx(1)
    assert (found.num_images, found.num_found, found.warnings, found.files) == (8, 8, (), ())
    assert {one.category for one in found.categories} == {"red", "green", "blue"}


def test_the_figures_are_those_of_pycocotools(blank_lake):
    def spoil(tree):
        rng = np.random.default_rng(0)
        for one in tree["annotations"]:
            if rng.random() < 0.5:
                one["category_id"] = int(rng.integers(1, 4))
            one["bbox"] = [side + float(rng.random() * 4) for side in one["bbox"]]
        for number, one in enumerate(tree["annotations"][::9]):
            one["iscrowd"] = int(number % 2 == 0)

    truth = changed_truth(blank_lake, spoil)
    export_coco(str(blank_lake / "lake"), blank_lake / "results.json", annotations=truth)
    results = json.loads((blank_lake / "results.json").read_text())
    found = evaluate(str(blank_lake / "lake"), annotations=truth)
    without_box = [{key: value for key, value in one.items() if key != "bbox"} for one in results]
    without_mask = [{key: value for key, value in one.items() if key != "segmentation"} for one in results]
    assert found.figures["segm"] == pytest.approx(stock_figures(truth, without_box, "segm"), abs=1e-12)
    assert found.figures["bbox"] == pytest.approx(stock_figures(truth, without_mask, "bbox"), abs=1e-12)
    assert 0.1 < found.figures["segm"]["AP"] < 0.9


def test_the_known_figures_of_the_fixture(rle_eval, tmp_path):
    truth = str(rle_eval / "instances_val2014_100.json")
    for kind in ("segm", "bbox"):
        file = str(rle_eval / f"instances_val2014_fake{kind}100_results.json")
        import_coco(file, annotations=truth, output=str(tmp_path / "lake"), run_id=f"fake-{kind}", partial=True)
    options = EvaluationOptions(matched_only=True)
    masks = evaluate(str(tmp_path / "lake"), annotations=truth, run_id="fake-segm", options=options).figures["segm"]
    assert [round(masks[name], 4) for name in ("AP", "AP50", "AP75")] == [0.3217, 0.5647, 0.3013]
    boxes = evaluate(str(tmp_path / "lake"), annotations=truth, run_id="fake-bbox", options=options).figures
    assert list(boxes) == ["bbox"]
    assert [round(boxes["bbox"][name], 4) for name in ("AP", "AP50")] == [0.5070, 0.6994]
    # One image has no results: it counts, unless only matched images are asked for.
    everything = evaluate(str(tmp_path / "lake"), annotations=truth, run_id="fake-segm")
    assert round(everything.figures["segm"]["AP"], 4) == 0.3195
    assert "1 of the 100 annotated images are not in the run and count as empty" in everything.warnings[0]


def test_max_dets_counts_only_the_best(blank_lake):
    few = evaluate(
        str(blank_lake / "lake"), annotations=str(blank_lake / "full.json"), options=EvaluationOptions(max_dets=1)
    )
    assert few.figures["segm"]["AR100"] < 0.9
    assert few.figures["segm"]["AR100"] == few.figures["segm"]["AR1"]


def test_images_that_the_run_has_not_count_as_empty_or_are_left_out(blank_lake):
    def add(tree):
        size = {"width": tree["images"][0]["width"], "height": tree["images"][0]["height"]}
        tree["images"].append({"id": 99, "file_name": "unseen.png", **size})
        tree["annotations"].append({**tree["annotations"][0], "id": 999, "image_id": 99})

    truth = changed_truth(blank_lake, add)
    counted = evaluate(str(blank_lake / "lake"), annotations=truth)
    assert counted.figures["segm"]["AP"] < 1
    assert counted.warnings == (
        "1 of the 9 annotated images are not in the run and count as empty; run them too, or give --matched-only",
    )
    left_out = evaluate(str(blank_lake / "lake"), annotations=truth, options=EvaluationOptions(matched_only=True))
    assert left_out.figures["segm"]["AP"] == pytest.approx(1)
    assert left_out.num_images == 8


@pytest.mark.parametrize(
    ("settings", "warning"),
    [
        ({"model__score_threshold": 0.06}, "the run kept only scores above 0.06, which lowers AP"),
        (
            {"model__max_instances": 2},
            r"kept 2 instances an image and cut \d of these images, AP looks at 100;.*--max-dets 2",
        ),
        ({"model__categories": ["red"]}, "the run was made with model.categories"),
        ({"model__category_thresholds": {"red": 0.9}}, "the run was made with model.category_thresholds"),
    ],
)
def test_settings_that_lower_the_figures_are_named_with_the_fix(blank_lake, tmp_path, settings, warning):
    run(config(blank_lake / "photos", tmp_path / "lake", **settings))
    found = evaluate(str(tmp_path / "lake"), annotations=str(blank_lake / "full.json"))
    assert len(found.warnings) == 1
    assert re.search(warning, found.warnings[0])


def test_failed_foreign_and_unfinished_images_are_warned_of(blank_lake, tmp_path):
    photos = write_photos(tmp_path / "photos", range(8))
    (photos / "photo_003.png").write_bytes(b"no image")
    write_photos(photos, [50])
    run(config(photos, tmp_path / "lake", output__max_failed_share=1))
    found = evaluate(str(tmp_path / "lake"), annotations=str(blank_lake / "full.json"))
    assert found.warnings == (
        "1 images of the run are not annotated and are left out",
        "1 annotated images failed in the run and count as empty; see error_type",
    )
    run(config(photos, tmp_path / "part"), limit=4)
    unfinished = evaluate(str(tmp_path / "part"), annotations=str(blank_lake / "full.json"))
    assert "the run is unfinished: its missing images count as empty; finish it first" in unfinished.warnings


def test_other_numberings_and_unknown_categories_are_warned_of(blank_lake):
    def renumber(tree):
        for one in [*tree["annotations"], *tree["categories"]]:
            key = "id" if "name" in one else "category_id"
            one[key] += 10
        tree["categories"].append({"id": 50, "name": "zebra"})

    found = evaluate(str(blank_lake / "lake"), annotations=changed_truth(blank_lake, renumber))
    assert found.figures["segm"]["AP"] == pytest.approx(1)
    assert any("category ids differ (red is 1 in the run, 11 in the annotations)" in text for text in found.warnings)
    assert any("1 annotated categories are unknown to the run (zebra)" in text for text in found.warnings)


def test_supercategories_are_measured_in_the_runs_own_ids(blank_lake):
    def group(tree):
        for one in tree["categories"]:
            one["supercategory"], one["name"] = one["name"], f"kind of {one['name']}"

    truth = changed_truth(blank_lake, group)
    found = evaluate(str(blank_lake / "lake"), annotations=truth, options=EvaluationOptions(by="supercategory"))
    assert found.figures["segm"]["AP"] == pytest.approx(1)
    assert not found.warnings


def test_figures_and_pictures_are_written(blank_lake, tmp_path):
    found = evaluate(str(blank_lake / "lake"), annotations=str(blank_lake / "full.json"), folder=tmp_path / "out")
    written = json.loads((tmp_path / "out" / "figures.json").read_text())
    assert written["figures"] == {kind: dict(values) for kind, values in found.figures.items()}
    assert len(written["categories"]) == 3
    for name in ("precision_recall.png", "confusion.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            assert picture.width > 500
            assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    assert found.files == tuple(
        str(tmp_path / "out" / name) for name in ("figures.json", "precision_recall.png", "confusion.png")
    )


def test_a_run_without_instances_has_figures_of_zero(blank_lake, tmp_path):
    run(config(blank_lake / "photos", tmp_path / "lake", model__score_threshold=1.0))
    found = evaluate(str(tmp_path / "lake"), annotations=str(blank_lake / "full.json"))
    assert found.figures["segm"]["AP"] == 0
    assert all(one.values["segm AP"] == 0 for one in found.categories)


def test_confusions_count_each_annotated_instance_once(tmp_path):
    far = [[20.0, 10.0, 28.0, 10.0, 28.0, 18.0, 20.0, 18.0]]
    truth = read_annotations(
        locate(
            write(
                tmp_path / "truth.json",
                dataset([
                    annotation(1, category_id=17),
                    annotation(2, category_id=1, segmentation=far, bbox=[20.0, 10.0, 8.0, 8.0]),
                    annotation(3, image_id=2, category_id=18),
                    annotation(4, image_id=2, iscrowd=1),
                ]),
            )
        )
    )  # fmt: skip
    results = [
        result(category_id=18, score=0.9),  # a cat taken for a dog
        result(category_id=17, score=0.8),  # the same cat again: it is taken already, so nothing is there
        result(image_id=2, category_id=18, score=0.7),
        result(category_id=1, score=0.2, segmentation=far),  # too low: the person is missed
    ]
    counts = count_confusions(truth, results, score_threshold=0.5)
    person, cat, dog, nothing = range(4)
    expected = np.zeros((4, 4), int)
    expected[cat, dog] = expected[nothing, cat] = expected[dog, dog] = expected[person, nothing] = 1
    np.testing.assert_array_equal(counts, expected)


def test_areas_of_masks_decide_about_sizes_and_not_boxes(tmp_path):
    # A thin diagonal: its box is large, its mask small. Without a match it must count among small ones alone.
    size = 200
    thin = [[0.0, 0.0, 3.0, 0.0, 200.0, 197.0, 200.0, 200.0]]
    tree = dataset([annotation(1, segmentation=SMALL, bbox=[0.0, 0.0, 10.0, 10.0], area=100.0)])
    for image in tree["images"]:
        image.update(height=size, width=size)
    found = [
        {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [0, 0, 200, 200], "segmentation": thin},
        {"image_id": 1, "category_id": 1, "score": 0.8, "bbox": [0, 0, 10, 10], "segmentation": SMALL},
    ]
    for one in found:
        one["segmentation"] = to_rle(one["segmentation"], height=size, width=size)
    figures = compute_figures(tree, found, iou_type="segm").values
    assert figures["APs"] == pytest.approx(stock_figures(
        write(tmp_path / "t.json", tree), [{key: one[key] for key in one if key != "bbox"} for one in found], "segm"
    )["APs"])  # fmt: skip
    assert figures["APs"] < 1  # the thin one is small too, and wrong


def test_ids_from_zero_change_no_figure(blank_lake):
    def renumber(tree):
        for number, one in enumerate(tree["annotations"]):
            one["id"] = number

    found = evaluate(str(blank_lake / "lake"), annotations=changed_truth(blank_lake, renumber))
    assert found.figures["segm"]["AP"] == pytest.approx(1)


def test_two_categories_of_one_name_are_refused(blank_lake):
    def rename(tree):
        tree["categories"].append({"id": 77, "name": "red"})

    with pytest.raises(InputError, match="has more than one category called red; give each its own name"):
        evaluate(str(blank_lake / "lake"), annotations=changed_truth(blank_lake, rename))


def test_crowds_are_no_instances_of_their_category(blank_lake):
    def crowd(tree):
        tree["annotations"][0]["iscrowd"] = 1

    before = evaluate(str(blank_lake / "lake"), annotations=str(blank_lake / "full.json"))
    after = evaluate(str(blank_lake / "lake"), annotations=changed_truth(blank_lake, crowd))
    assert sum(one.num_instances for one in before.categories) - 1 == sum(one.num_instances for one in after.categories)


def test_one_result_without_a_mask_leaves_the_mask_figures(tmp_path):
    truth = write(tmp_path / "truth.json", dataset([annotation(1), annotation(2, 2, 17)]))
    results = [result(), result(2, 17), result(2, 18, score=0.1, segmentation=..., bbox=[1, 2, 3, 4])]
    file = write(tmp_path / "results.json", results)
    import_coco(file, annotations=truth, output=str(tmp_path / "lake"), run_id="mixed")
    found = evaluate(str(tmp_path / "lake"), annotations=truth, folder=tmp_path / "out")
    assert found.figures["segm"]["AP"] == pytest.approx(1)
    assert "1 instances of the run have no mask and count for boxes alone" in found.warnings
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["options"]["max_dets"] == 100
