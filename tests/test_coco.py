"""COCO files in and out: nothing is guessed, nothing is passed over, a round trip changes nothing."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from segpipe.coco.annotations import read_annotations, regroup
from segpipe.coco.exporting import export_coco
from segpipe.coco.importing import import_coco
from segpipe.coco.masks import decode_segmentation, to_rle
from segpipe.coco.matching import ImageMatcher, match_categories
from segpipe.errors import ConfigError, InputError, OutputError
from segpipe.lake import read_table
from segpipe.pipeline import run
from segpipe.storage import locate
from segpipe.validation import validate
from tests.factory import config, write_photos, write_tar

SQUARE = [[2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0]]
CATEGORIES = [
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 17, "name": "cat", "supercategory": "animal"},
    {"id": 18, "name": "dog", "supercategory": "animal"},
]


def annotation(number, image_id=1, category_id=1, **changes):
    entry = {
        "id": number, "image_id": image_id, "category_id": category_id, "bbox": [2.0, 2.0, 6.0, 6.0], "area": 36.0,
        "iscrowd": 0, "segmentation": SQUARE,
    }  # fmt: skip
    return {key: value for key, value in {**entry, **changes}.items() if value is not ...}


def dataset(annotations, *, names=("a.jpg", "b.jpg"), categories=CATEGORIES):
    images = [{"id": index, "file_name": name, "height": 20, "width": 30} for index, name in enumerate(names, start=1)]
    return {"images": images, "annotations": list(annotations), "categories": list(categories)}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def result(image_id=1, category_id=1, score=0.9, **changes):
    entry = {"image_id": image_id, "category_id": category_id, "score": score, "segmentation": SQUARE}
    return {key: value for key, value in {**entry, **changes}.items() if value is not ...}


@pytest.fixture
def truth(tmp_path):
    return write(tmp_path / "truth.json", dataset([annotation(1), annotation(2, 2, 17)]))


# ---------------------------------------------------------------- annotations
BROKEN = {
    "annotations of images that are not listed skipped": annotation(9, image_id=77),
    "annotations of unknown categories skipped": annotation(9, category_id=99),
    "annotations without a mask skipped": annotation(9, segmentation=[]),
    "broken polygons skipped": annotation(9, segmentation=[[1.0, 2.0, 3.0]]),
    "broken run-length codes skipped": annotation(9, segmentation={"size": [20, 30], "counts": [5, 5]}),
    "run-length codes of another size than their image skipped": annotation(
        9, segmentation={"size": [30, 20], "counts": [600]}
    ),
    "annotations without a box skipped": annotation(9, bbox=[1, 2, 3, float("nan")]),
    "annotations without an id skipped": annotation(9, id=...),
}


@pytest.mark.parametrize("problem", BROKEN)
def test_a_broken_annotation_is_counted_listed_and_left_out(tmp_path, problem):
    read = read_annotations(locate(write(tmp_path / "a.json", dataset([annotation(1), BROKEN[problem]]))))
    assert [one["id"] for one in read.annotations] == [1]
    assert list(read.problems) == [problem]
    assert len(read.problems[problem]) == 1


def test_boxes_are_clipped_for_training_and_left_alone_for_measuring(tmp_path):
    outside, wholly = annotation(1, bbox=[-5.0, 2.0, 10.0, 40.0]), annotation(2, bbox=[40.0, 2.0, 5.0, 5.0])
    place = locate(write(tmp_path / "a.json", dataset([outside, wholly])))
    clipped = read_annotations(place, clip=True)
    assert [one["bbox"] for one in clipped.annotations] == [[0.0, 2.0, 5.0, 18.0]]
    assert clipped.problems == {
        "boxes that reach outside the image clipped": ["annotation 1"],
        "boxes without an area inside the image skipped": ["annotation 2"],
    }
    as_is = read_annotations(place)
    assert [one["bbox"] for one in as_is.annotations] == [outside["bbox"], wholly["bbox"]]
    assert not as_is.problems


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no JSON"),
        ("[]", "holds a list, as COCO results are; give the annotations"),
        ("3", "holds no COCO dataset"),
        ({"images": [], "annotations": []}, "has no list called 'categories'"),
        (dataset([annotation(1), annotation(1)]), "annotation id 1 occurs twice"),
        ({**dataset([]), "images": [{"id": 1, "file_name": "a"}]}, "has no 'height'"),
        ({**dataset([]), "images": dataset([])["images"] * 2}, "image id 1 occurs twice"),
        ({**dataset([]), "categories": [{"id": "x", "name": "y"}]}, "category id 'x' is no whole number"),
        (
            {**dataset([]), "images": [{"id": 1, "file_name": "a", "height": None, "width": 3}]},
            "image 1 has height None",
        ),
    ],
)
def test_a_file_of_another_kind_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(InputError) as raised:
        read_annotations(locate(write(tmp_path / "a.json", content)))
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="there is no annotations file at .*nothing.json"):
        read_annotations(locate(str(tmp_path / "nothing.json")))


def test_categories_become_supercategories_by_name_and_others_are_left_out(truth):
    read = read_annotations(locate(truth))
    merged = regroup(read, {"animal": 1}, by="supercategory")
    assert [(one["id"], one["category_id"]) for one in merged.annotations] == [(2, 1)]
    assert merged.categories == {1: {"id": 1, "name": "animal"}}
    with pytest.raises(InputError, match="has no category called animal.*They are names of its supercategories"):
        regroup(read, {"animal": 1})


# ---------------------------------------------------------------- masks
@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_all_three_forms_of_a_mask_are_the_same_pixels(seed):
    rng = np.random.default_rng(seed)
    height, width = (int(side) for side in rng.integers(1, 40, 2))
    pixels = (rng.random((height, width)) < rng.random()).astype(np.uint8)
    compressed = coco_mask.encode(np.asfortranarray(pixels))["counts"].decode()
    flat = pixels.flatten(order="F")
    changes = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    runs = np.diff([0, *changes, flat.size]).tolist()
    for counts in (compressed, runs):
        segmentation = {"size": [height, width], "counts": counts}
        assert to_rle(segmentation, height=height, width=width)["counts"] == compressed
        np.testing.assert_array_equal(decode_segmentation(segmentation, height=height, width=width), pixels)


def test_a_polygon_is_what_pycocotools_makes_of_it():
    expected = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(SQUARE, 20, 30)))
    np.testing.assert_array_equal(decode_segmentation(SQUARE, height=20, width=30), expected)
    assert expected.sum() == 36


# ---------------------------------------------------------------- matching
def test_images_are_matched_by_name_and_never_by_digits(tmp_path):
    names = ["val/000001.jpg", "val/000002.jpg", "left/x.jpg", "right/x.jpg"]
    read = read_annotations(locate(write(tmp_path / "a.json", dataset([], names=names))))
    matcher = ImageMatcher(read)
    assert matcher.find("photos.tar/000001.jpg", "000001.jpg") == 1
    assert matcher.find("val/000002.jpg", "val/000002.jpg") == 2
    assert matcher.find("1.jpg", "1.jpg") is None
    assert matcher.find("COCO_000001.jpg", "COCO_000001.jpg") is None
    assert matcher.find("x.jpg", "x.jpg") is None  # two images end so
    assert matcher.find("right/x.jpg", "right/x.jpg") == 4
    assert matcher.missing() == ["left/x.jpg"]
    with pytest.raises(InputError, match="is two images of the run, photos.tar/000001.jpg and other/000001.jpg"):
        matcher.find("other/000001.jpg", "other/000001.jpg")


def test_categories_are_matched_by_name_across_numberings(truth):
    read = read_annotations(locate(truth))
    assert match_categories({0: "person", 1: "cat", 2: "car"}, read) == {0: 1, 1: 17}
    with pytest.raises(InputError, match="add --by-supercategory"):
        match_categories({1: "animal"}, read)
    with pytest.raises(InputError, match="none of its categories .*person, cat, dog.* is one of the run's .*zebra"):
        match_categories({1: "zebra"}, read)


# ---------------------------------------------------------------- import
def do_import(tmp_path, truth, results, **options):
    file = write(tmp_path / "results.json", results)
    return import_coco(file, annotations=truth, output=str(tmp_path / "lake"), run_id="other", **options)


def test_results_of_any_form_become_rows_that_validate(tmp_path, truth):
    code = to_rle(SQUARE, height=20, width=30)
    results = [
        result(score=0.2),
        result(score=0.9, segmentation=code),
        result(score=0.5, category_id=18, segmentation=..., bbox=[1, 2, 3, 4]),
    ]
    summary = do_import(tmp_path, truth, results)
    assert (summary.num_images, summary.num_instances, summary.num_without) == (2, 3, 1)
    assert not summary.problems
    rows = read_table(str(tmp_path / "lake"), "instances").to_pylist()
    assert [(row["instance_id"], row["category"], row["area"]) for row in rows] == [
        (0, "person", 36), (1, "dog", None), (2, "person", 36),
    ]  # fmt: skip
    assert [rows[0][name] for name in ("bbox_x", "bbox_y", "bbox_w", "bbox_h")] == [2, 2, 6, 6]
    images = read_table(str(tmp_path / "lake"), "images").to_pylist()
    assert [(row["image_id"], row["num_instances"], row["width"]) for row in images] == [
        ("a.jpg", 2 + 1, 30), ("b.jpg", 0, 30),
    ]  # fmt: skip
    assert all(found.is_valid for found in validate(str(tmp_path / "lake")))


def test_the_same_import_again_changes_nothing_and_another_one_is_refused(tmp_path, truth):
    do_import(tmp_path, truth, [result()])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "lake").rglob("*.parquet") if "run_id" in str(path)}
    do_import(tmp_path, truth, [result()])
    after = {path: path.stat().st_mtime_ns for path in before if "categories" not in str(path)}
    assert after
    assert after.items() <= before.items()
    with pytest.raises(OutputError, match="its run 'other' holds something else .*choose another name with --run"):
        do_import(tmp_path, truth, [result(score=0.8)])


def test_an_import_that_was_cut_short_goes_on(tmp_path, truth, monkeypatch):
    import segpipe.coco.importing as module

    monkeypatch.setattr(module, "_CHUNK_IMAGES", 1)
    commit = module.commit_chunk
    committed = []

    def fail_on_second(chunk, **options):
        committed.append(chunk.id.name)
        if len(committed) == 2:
            raise KeyboardInterrupt
        return commit(chunk, **options)

    monkeypatch.setattr(module, "commit_chunk", fail_on_second)
    with pytest.raises(KeyboardInterrupt):
        do_import(tmp_path, truth, [result(), result(2)])
    assert not validate(str(tmp_path / "lake"))[0].is_valid
    do_import(tmp_path, truth, [result(), result(2)])
    assert committed == [committed[0], committed[1], committed[1]]
    assert validate(str(tmp_path / "lake"))[0].is_valid


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (result(image_id=77), "results of images that are not listed skipped"),
        (result(score=1.5), "results without a score from 0 to 1 skipped"),
        (result(score=float("nan")), "results without a score from 0 to 1 skipped"),
        (result(segmentation=...), "results without a mask or a box skipped"),
        (result(bbox=[1, 2]), "broken boxes skipped"),
        (result(segmentation={"size": [20, 30], "counts": "~~"}), "broken run-length codes skipped"),
    ],
)
def test_a_broken_result_is_counted_and_left_out(tmp_path, truth, bad, problem):
    summary = do_import(tmp_path, truth, [result(), bad])
    assert summary.num_instances == 1
    assert summary.problems == (f"1 {problem}: result 1",)


@pytest.mark.parametrize(
    ("results", "options", "message"),
    [
        ({"images": []}, {}, "it looks like annotations, which go to --annotations"),
        ("nonsense", {}, "is no JSON"),
        ([1], {}, "holds no COCO results"),
        ([result(image_id=900)], {}, "none of its 1 images is in"),
        ([result(image_id=[1])], {}, "has no whole numbers as image_id and category_id"),
        ([result(category_id=...)], {}, "has no whole numbers as image_id and category_id"),
        ([result(category_id=0)], {}, "give --contiguous if they count the categories from 0"),
        ([result(category_id=55)], {}, "has categories that .* has not \\(55; known are 1 to 18, 3 of them\\)"),
        ([result(category_id=3)], {"contiguous": True}, "has categories that"),
    ],
)
def test_results_of_another_dataset_are_refused_in_one_line(tmp_path, truth, results, options, message):
    with pytest.raises(InputError, match=message):
        do_import(tmp_path, truth, results, **options)
    assert not (tmp_path / "lake").exists()


def test_contiguous_ids_are_ranks_of_the_annotations_ids(tmp_path, truth):
    do_import(tmp_path, truth, [result(category_id=0), result(category_id=2, score=0.1)], contiguous=True)
    rows = read_table(str(tmp_path / "lake"), "instances").to_pylist()
    assert [(row["category_id"], row["category"]) for row in rows] == [(1, "person"), (18, "dog")]


def test_partial_results_leave_out_the_images_that_were_not_seen(tmp_path, truth):
    assert do_import(tmp_path, truth, [result()], partial=True).num_images == 1


def test_a_bad_name_and_a_missing_file_are_refused(tmp_path, truth):
    with pytest.raises(ConfigError, match="--run: 'A B' is not allowed"):
        import_coco("x.json", annotations=truth, output=str(tmp_path / "lake"), run_id="A B")
    with pytest.raises(InputError, match="there is no results file at"):
        import_coco(str(tmp_path / "x.json"), annotations=truth, output=str(tmp_path / "lake"), run_id="a")


# ---------------------------------------------------------------- export
@pytest.fixture
def lake(tmp_path):
    run(config(write_photos(tmp_path / "photos", range(6)), tmp_path / "lake", input__chunk_images=2))
    return tmp_path / "lake"


def names_of(lake):
    return [row["image_id"] for row in read_table(str(lake), "images").to_pylist()]


def test_results_load_with_loadres_and_hold_every_instance(tmp_path, lake):
    summary = export_coco(str(lake), tmp_path / "results.json")
    rows = read_table(str(lake), "instances").to_pylist()
    results = json.loads((tmp_path / "results.json").read_text())
    mapping = json.loads((tmp_path / "results.images.json").read_text())
    assert sorted(mapping.values()) == sorted(names_of(lake))
    assert summary.num_instances == len(rows) == len(results) > 10
    assert [mapping[str(one["image_id"])] for one in results] == [row["image_id"] for row in rows]
    for one, row in zip(results, rows, strict=True):
        assert isinstance(one["image_id"], int)
        assert one["segmentation"]["counts"] == row["rle_counts"]
        assert np.float32(one["score"]) == np.float32(row["score"])
        assert [np.float32(side) for side in one["bbox"]] == [
            np.float32(row[name]) for name in ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
        ]
    full = COCO()
    export_coco(str(lake), tmp_path / "full.json", full=True)
    full.dataset = json.loads((tmp_path / "full.json").read_text())
    full.createIndex()
    assert len(full.loadRes(results).anns) == len(results)


def test_a_whole_dataset_can_be_read_as_annotations_again(tmp_path, lake):
    summary = export_coco(str(lake), tmp_path / "full.json", full=True)
    read = read_annotations(locate(str(tmp_path / "full.json")))
    assert not read.problems
    assert (len(read.images), len(read.annotations)) == (summary.num_images, summary.num_instances)
    assert sorted(image["file_name"] for image in read.images.values()) == sorted(names_of(lake))
    rows = read_table(str(lake), "instances").to_pylist()
    assert [one["area"] for one in read.annotations] == [row["area"] for row in rows]
    assert all(one["iscrowd"] == 0 for one in read.annotations)


def test_ids_come_from_the_annotations_by_name(tmp_path, lake):
    names = [*reversed(names_of(lake)), "unseen.png"]
    categories = [{"id": 70, "name": "red"}, {"id": 80, "name": "blue"}]
    truth = write(tmp_path / "truth.json", dataset([], names=names[1:], categories=categories))
    summary = export_coco(str(lake), tmp_path / "results.json", annotations=truth)
    assert (summary.num_images, summary.num_left_out, summary.mapping) == (5, 1, None)
    ids = {name: index for index, name in enumerate(names[1:], start=1)}
    rows = [
        row
        for row in read_table(str(lake), "instances").to_pylist()
        if row["image_id"] in ids and row["category"] in ("red", "blue")
    ]
    results = json.loads((tmp_path / "results.json").read_text())
    assert [(one["image_id"], one["category_id"]) for one in results] == [
        (ids[row["image_id"]], {"red": 70, "blue": 80}[row["category"]]) for row in rows
    ]


def test_a_round_trip_changes_no_byte(tmp_path, lake):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    export_coco(str(lake), tmp_path / "full.json", full=True)
    truth = str(tmp_path / "full.json")
    export_coco(str(lake), first, annotations=truth)
    import_coco(str(first), annotations=truth, output=str(lake), run_id="again")
    export_coco(str(lake), second, annotations=truth, run_id="again")
    assert sorted(first.read_bytes().splitlines()) == sorted(second.read_bytes().splitlines())
    assert first.stat().st_size > 1000


def test_images_in_tars_are_exported_by_their_own_names(tmp_path):
    photos = write_photos(tmp_path / "photos", range(3))
    tar = write_tar(tmp_path / "in" / "a.tar", {path.name: path.read_bytes() for path in sorted(photos.iterdir())})
    run(config(tar, tmp_path / "lake"))
    truth = dataset([], names=[path.name for path in sorted(photos.iterdir())], categories=[{"id": 5, "name": "red"}])
    summary = export_coco(
        str(tmp_path / "lake"), tmp_path / "out.json", annotations=write(tmp_path / "truth.json", truth)
    )
    assert (summary.num_images, summary.num_left_out) == (3, 0)


def test_what_cannot_be_exported_is_said_and_leaves_no_file(tmp_path, lake):
    strangers = dataset([], names=["nobody.jpg"], categories=[{"id": 1, "name": "red"}])
    with pytest.raises(
        InputError, match="has none of the run's 6 images; the run's are called such as 'photo_000.png'"
    ):
        export_coco(str(lake), tmp_path / "out.json", annotations=write(tmp_path / "t.json", strangers))
    with pytest.raises(OutputError, match="holds no run of segpipe"):
        export_coco(str(tmp_path / "photos"), tmp_path / "out.json")
    with pytest.raises(OutputError, match="cannot be written"):
        export_coco(str(lake), tmp_path / ("y" * 300))
    run_id = json.loads(next((lake / "runs").glob("*/run.json")).read_text())["run_id"]
    for file in (lake / "images" / f"run_id={run_id}").iterdir():
        file.unlink()
    with pytest.raises(OutputError, match="has no image; run it first"):
        export_coco(str(lake), tmp_path / "out.json")
    assert not [path.name for path in tmp_path.iterdir() if "out" in path.name]


def test_export_keeps_one_chunk_in_memory(tmp_path, lake, monkeypatch):
    import segpipe.coco.exporting as module

    alive = []
    iterate = module.iterate_chunks

    def watched(layout):
        for images, instances in iterate(layout):
            alive.append(instances.num_rows)
            yield images, instances

    monkeypatch.setattr(module, "iterate_chunks", watched)
    written = []
    monkeypatch.setattr(
        module._Items, "extend",
        lambda self, texts, extend=module._Items.extend: (written.append(len(alive)), extend(self, texts))[1],
    )  # fmt: skip
    export_coco(str(lake), tmp_path / "out.json")
    # Each chunk was written before the next was read.
    assert written[::2] == [1, 2, 3]
