"""The pipeline says what stock torchvision says: same boxes, scores, labels and RLE strings, to the last bit.

Stock: `model([image])`, a score filter, pasted masks thresholded at 0.5, pycocotools. Pipeline: the command's own path
into Parquet and back, batch size 1, same threads, float32, CPU.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pycocotools import mask as coco_mask
from torchvision.models import detection
from torchvision.transforms.functional import to_tensor

from segpipe.config import ModelConfig
from segpipe.evaluation import EvaluationOptions, evaluate
from segpipe.lake import read_table
from segpipe.models.networks import BUILDERS
from segpipe.models.weights import read_state, resolve_model
from segpipe.pipeline import run
from tests.conftest import DATA
from tests.factory import config
from tests.test_evaluation import stock_figures

THREADS = 2

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def photographs(package_photos) -> list[Path]:
    """Return the 125 photographs of COCO under free licences, or those that packages ship where they are absent."""
    folder = DATA / "coco_free"
    found = sorted(folder.rglob("*.jpg")) if folder.is_dir() else []
    return found or sorted(package_photos.iterdir())


def stock_rows(model: torch.nn.Module, photo: Path) -> list[tuple[object, ...]]:
    """Return (category_id, score, bbox, counts) of each instance, the tutorial's way."""
    image = ImageOps.exif_transpose(Image.open(photo)).convert("RGB")
    with torch.inference_mode():
        found = model([to_tensor(image)])[0]
    rows = []
    for box, label, score, mask in zip(found["boxes"], found["labels"], found["scores"], found["masks"], strict=True):
        if score <= 0.05:
            continue
        binary = (mask[0] > 0.5).numpy().astype(np.uint8)
        counts = coco_mask.encode(np.asfortranarray(binary))["counts"].decode()
        left, top, right, bottom = box.numpy()
        bbox = (left, top, np.float32(right - left), np.float32(bottom - top))
        rows.append((int(label), float(score), *(float(side) for side in bbox), int(binary.sum()), counts))
    return rows


def pipeline_rows(lake: Path) -> dict[str, list[tuple[object, ...]]]:
    columns = ["category_id", "score", "bbox_x", "bbox_y", "bbox_w", "bbox_h", "area", "rle_counts"]
    rows: dict[str, list[tuple[object, ...]]] = {}
    for image in read_table(str(lake), "images").to_pylist():
        assert image["status"] == "ok", image
        rows[image["key"]] = []
    for row in read_table(str(lake), "instances").to_pylist():
        rows[row["image_id"].split("/", 1)[1]].append(tuple(row[name] for name in columns))
    return rows


def assert_same(model: torch.nn.Module, photos: list[Path], tmp_path: Path, **settings: object) -> int:
    """Compare stock and pipeline on photographs; return how many instances there are."""
    listing = tmp_path / "list.txt"
    listing.write_text("".join(f"{photo}\n" for photo in photos))
    run(config(listing, tmp_path / "lake", resources__cpus_per_actor=THREADS, input__chunk_images=16, **settings))
    found = pipeline_rows(tmp_path / "lake")
    assert len(found) == len(photos)
    total = 0
    for photo in photos:
        expected = stock_rows(model, photo)
        assert found[str(photo)] == expected, photo.name
        total += len(expected)
    return total


def demo_model() -> torch.nn.Module:
    """Return the bundled network as torchvision runs it, resized as its checkpoint says."""
    state, metadata = read_state(resolve_model(ModelConfig(name="demo")))
    model = BUILDERS["demo"](4, batch_norm=False)
    model.load_state_dict(state)
    if "preprocessing" in metadata:
        rule = json.loads(metadata["preprocessing"])
        model.transform.min_size, model.transform.max_size = (rule["min_size"],), rule["max_size"]
        assert (model.transform.image_mean, model.transform.image_std) == (rule["image_mean"], rule["image_std"])
    return model.eval()


def test_the_demo_model_on_every_photograph_equals_stock_torchvision(photographs, tmp_path):
    total = assert_same(demo_model(), photographs, tmp_path, model__name="demo")
    assert total > 5 * len(photographs)


def test_the_demo_models_ap_by_eval_equals_a_plain_torchvision_and_pycocotools_loop(coco_free, tmp_path):
    names = json.loads((coco_free / "split.json").read_text())["held_out"]
    listing = tmp_path / "held_out.txt"
    listing.write_text("".join(f"{coco_free / 'images' / name}\n" for name in names))
    run(config(listing, tmp_path / "lake", model__name="demo", resources__cpus_per_actor=THREADS))
    options = EvaluationOptions(by="supercategory", matched_only=True)
    truth_file = str(coco_free / "instances.json")
    found = evaluate(str(tmp_path / "lake"), annotations=truth_file, options=options)

    tree = json.loads(Path(truth_file).read_text())
    groups = {"person": 1, "animal": 2, "vehicle": 3}
    of_category = {one["id"]: groups.get(one["supercategory"]) for one in tree["categories"]}
    ids = {image["file_name"]: image["id"] for image in tree["images"] if image["file_name"] in names}
    tree["images"] = [image for image in tree["images"] if image["file_name"] in names]
    tree["annotations"] = [
        {**one, "category_id": of_category[one["category_id"]]}
        for one in tree["annotations"]
        if of_category[one["category_id"]] and one["image_id"] in ids.values()
    ]
    tree["categories"] = [{"id": index, "name": name} for name, index in groups.items()]
    (tmp_path / "truth.json").write_text(json.dumps(tree))
    model, results = demo_model(), []
    for name, image_id in ids.items():
        height, width = next((one["height"], one["width"]) for one in tree["images"] if one["id"] == image_id)
        for label, score, *bbox, _, counts in stock_rows(model, coco_free / "images" / name):
            code = {"size": [height, width], "counts": counts}
            results.append(
                {"image_id": image_id, "category_id": label, "score": score, "bbox": bbox, "segmentation": code}
            )
    assert (found.num_images, len(ids)) == (47, 47)
    for kind, other in (("segm", "bbox"), ("bbox", "segmentation")):
        plain = [{key: value for key, value in one.items() if key != other} for one in results]
        assert found.figures[kind] == pytest.approx(stock_figures(tmp_path / "truth.json", plain, kind), abs=1e-6)
    assert found.figures["segm"]["AP50"] > 0.2


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_seeded_mask_rcnn_equals_stock_torchvision(photographs, tmp_path, name):
    """No trained weights can be had here: random ones, sharpened until they detect, serve as well for equality."""
    torch.manual_seed(0)
    model = getattr(detection, name)(weights=None, weights_backbone=None).eval()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.weight.mul_(SHARPEN[name])
    torch.save(model.state_dict(), tmp_path / "seeded.pth")
    photos = photographs[:4]
    total = assert_same(model, photos, tmp_path, model__name=name, model__weights=str(tmp_path / "seeded.pth"))
    assert total > 4 * len(photos)


# How much the random classifier's weights are enlarged, so that scores reach over the floor.
SHARPEN = {"maskrcnn_resnet50_fpn": 30.0, "maskrcnn_resnet50_fpn_v2": 30.0}
