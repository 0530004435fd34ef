"""Fine-tuning: it learns, it resumes with the same losses, and what it writes runs without another word."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from segpipe.config import load_config
from segpipe.errors import ConfigError, InputError, OutputError, WeightsError
from segpipe.evaluation import evaluate
from segpipe.finetuning.augmentation import Augment
from segpipe.finetuning.dataset import EpochBatches, TrainingSet, mix, read_data
from segpipe.finetuning.job import finetune
from segpipe.finetuning.network import build_network
from segpipe.finetuning.settings import AugmentationConfig, NetworkConfig, load_finetune_config
from segpipe.finetuning.trainer import LOSSES, DivergedError, Trainer
from segpipe.lake import read_table
from segpipe.models.weights import resolve_model
from segpipe.pipeline import run
from tests.factory import encode
from tests.test_coco import write

SMALL = "maskrcnn_mobilenet_v2_fpn"
ROOT = Path(__file__).parents[1]
BUNDLED = str(ROOT / "segpipe" / "assets" / "demo_maskrcnn.safetensors")


def write_dataset(folder, seeds, *, broken=()):
    """Write grey images with one large red or green square each, and their annotations."""
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number, seed in enumerate(seeds, start=1):
        rng = np.random.default_rng(seed)
        pixels = np.full((96, 128, 3), 120, np.uint8) + rng.integers(0, 20, (96, 128, 3)).astype(np.uint8)
        left, top, side = int(rng.integers(4, 50)), int(rng.integers(4, 30)), int(rng.integers(36, 60))
        category = int(rng.integers(1, 3))
        pixels[top : top + side, left : left + side] = ((220, 20, 20), (20, 220, 20))[category - 1]
        (folder / "images" / f"{number}.png").write_bytes(encode(pixels) if number not in broken else b"no image")
        images.append({"id": number, "file_name": f"{number}.png", "height": 96, "width": 128})
        corners = [left, top, left + side, top, left + side, top + side, left, top + side]
        annotations.append({
            "id": number, "image_id": number, "category_id": category, "bbox": [left, top, side, side],
            "area": side * side, "iscrowd": 0, "segmentation": [corners],
        })  # fmt: skip
    categories = [{"id": 1, "name": "red", "supercategory": "x"}, {"id": 2, "name": "green", "supercategory": "x"}]
    tree = {"images": images, "annotations": annotations, "categories": categories}
    return write(folder / "instances.json", tree)


def settings_of(train, output, **changes):
    chosen = {
        "data.train": [{"annotations": train}], "output.uri": str(output),
        "network.name": SMALL, "network.weights": "NONE", "network.min_size": 96, "network.max_size": 128,
        "train.epochs": 3, "train.batch_size": 2, "train.optimizer": "adamw", "train.learning_rate": 1e-3,
        "train.warmup_steps": 2, "train.threads": 1,
    }  # fmt: skip
    chosen.update({key.replace("__", "."): value for key, value in changes.items()})
    return load_finetune_config(settings=chosen)


def losses_of(output, name="L"):
    entries = [json.loads(line) for line in (Path(output) / "log.jsonl").read_text().splitlines()]
    return [entry["losses"][name] for entry in entries if "losses" in entry]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def four_images(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("four"), range(4))


# ---------------------------------------------------------------- learning
@pytest.mark.slow
def test_ten_steps_lower_the_loss_on_four_photographs(coco_free, tmp_path):
    tree = json.loads((coco_free / "instances.json").read_text())
    named = {one["image_id"] for one in tree["annotations"] if one["category_id"] == 1 and one["area"] > 4000}
    names = [image["file_name"] for image in tree["images"] if image["id"] in named][:4]
    only = write(tmp_path / "four.json", names)
    config = settings_of(
        str(coco_free / "instances.json"), tmp_path / "out",
        data__train=[{"annotations": str(coco_free / "instances.json"), "only": only}],
        data__categories=["person"], train__epochs=5,
        network__min_size=160, network__max_size=256, network__weights=BUNDLED,
        augmentation__flip=0.0, train__learning_rate=5e-4,
    )  # fmt: skip
    summary = finetune(config)
    losses = losses_of(tmp_path / "out")
    assert (summary.num_steps, len(losses)) == (10, 10)
    assert np.mean(losses[-2:]) < 0.7 * np.mean(losses[:2])
    for name in LOSSES.values():
        assert len(losses_of(tmp_path / "out", name)) == 10
    parts = [losses_of(tmp_path / "out", name) for name in LOSSES.values()]
    np.testing.assert_allclose(np.sum(parts, axis=0), losses, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(four_images, tmp_path_factory):
    """A network that has learned two colours of squares, measured on the images that it learned from."""
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("trained")
    config = settings_of(
        four_images, output, data__validation=[{"annotations": four_images}], train__epochs=30,
        train__evaluate_epochs=10, train__average_decay=0.5, network__weights=BUNDLED,
        network__licence="made of squares",
    )  # fmt: skip
    return output, finetune(config)


@pytest.mark.slow
def test_a_network_learns_its_images_and_says_how_well(trained):
    output, summary = trained
    assert summary.figures["segm AP50"] > 0.8
    entries = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    measured = [entry for entry in entries if "figures" in entry]
    assert [entry["epoch"] for entry in measured] == [10, 20, 30]
    best = max(measured, key=lambda entry: entry["figures"]["segm AP"])
    assert (summary.best_epoch, summary.figures) == (best["epoch"], best["figures"])
    with Image.open(output / "curves.png") as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


@pytest.mark.slow
def test_the_checkpoint_runs_without_another_word_and_measures_the_same(trained, four_images, tmp_path):
    _, summary = trained
    photos = Path(four_images).parent / "images"
    config = load_config(settings={
        "input.uri": str(photos), "output.uri": str(tmp_path / "lake"), "resources.engine": "inline",
        "model.weights": summary.checkpoint, "resources.cpus_per_actor": 1,
    })  # fmt: skip
    info = resolve_model(config.model).info
    assert (info.name, dict(info.categories), info.licence) == (SMALL, {1: "red", 2: "green"}, "made of squares")
    assert run(config).state == "done"
    rows = read_table(str(tmp_path / "lake"), "instances").to_pylist()
    assert {row["category"] for row in rows} <= {"red", "green"}
    figures = evaluate(str(tmp_path / "lake"), annotations=four_images).figures
    # The job measured the same network in this process: same threads, float32 file, 96 px.
    assert figures["segm"]["AP"] == pytest.approx(summary.figures["segm AP"], abs=1e-6)
    assert figures["bbox"]["AP50"] == pytest.approx(summary.figures["bbox AP50"], abs=1e-6)


@pytest.mark.slow
def test_a_checkpoint_asked_for_as_another_network_is_refused(trained):
    config = load_config(settings={
        "input.uri": "x", "output.uri": "y",
        "model.weights": trained[1].checkpoint, "model.name": "maskrcnn_resnet50_fpn",
    })  # fmt: skip
    with pytest.raises(WeightsError, match=f"says that it is a {SMALL}, asked for was maskrcnn_resnet50_fpn; leave"):
        resolve_model(config.model)


# ---------------------------------------------------------------- resuming
@pytest.mark.slow
def test_a_killed_job_resumes_with_the_losses_of_one_that_was_never_killed(four_images, tmp_path):
    changes = {
        "train__epochs": 4, "train__save_minutes": 1e-6, "train__average_decay": 0.9, "augmentation__flip": 0.5,
        "augmentation__scale": [0.8, 1.5], "augmentation__crop_size": 96, "augmentation__photometric": 0.5,
    }  # fmt: skip
    finetune(settings_of(four_images, tmp_path / "whole", **changes))
    code = (
        "import sys, json; from segpipe.finetuning.job import finetune; "
        "from segpipe.finetuning.settings import FinetuneConfig; "
        "finetune(FinetuneConfig.model_validate_json(sys.argv[1]))"
    )
    config = settings_of(four_images, tmp_path / "killed", **changes)
    command = [sys.executable, "-c", code, config.model_dump_json()]
    for least in (2, 5):
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
        log = tmp_path / "killed" / "log.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and log.read_text().count('"losses"') >= least:
                break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
    summary = finetune(config)
    assert 0 < summary.first_step < 8
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    assert len(losses_of(tmp_path / "whole")) == 8
    from safetensors.torch import load_file

    one, other = (load_file(tmp_path / name / "best.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_settings_in_the_same_folder_are_refused(four_images, tmp_path):
    finetune(settings_of(four_images, tmp_path / "out", train__epochs=1))
    with pytest.raises(OutputError, match="with other settings .train.learning_rate: 0.001 there, 0.1 now."):
        finetune(settings_of(four_images, tmp_path / "out", train__epochs=1, train__learning_rate=0.1))
    again = finetune(settings_of(four_images, tmp_path / "out", train__epochs=1))
    assert again.first_step == again.num_steps == 2
    (tmp_path / "out" / "last.pt").write_bytes(b"half a file")
    with pytest.raises(OutputError, match="last.pt is damaged .*remove it to start anew"):
        finetune(settings_of(four_images, tmp_path / "out", train__epochs=1))


def test_every_epoch_takes_every_image_once_in_its_own_order_from_any_step():
    def keys(epoch, first=0):
        return list(EpochBatches(num_images=11, batch_size=4, epoch=epoch, first_step=first, seed=3))

    assert sorted(index for batch in keys(0) for _, index in batch) == list(range(11))
    assert keys(0) != [[(0, index) for _, index in batch] for batch in keys(1)]
    assert keys(0, first=1) == keys(0)[1:]
    assert len(EpochBatches(11, 4, 0, 1, 3)) == 2
    assert mix(1, 2) != mix(2, 1)


def test_a_sample_is_a_function_of_its_epoch_and_place_alone(four_images):
    data = read_data(settings_of(four_images, "out").data)
    augment = Augment(AugmentationConfig(scale=[0.5, 2.0], crop_size=64, photometric=1.0))
    dataset = TrainingSet(data.train, augment, seed=0)
    torch.manual_seed(5)
    first = dataset[2, 1]
    torch.manual_seed(6)
    again, other = dataset[2, 1], dataset[3, 1]
    assert torch.equal(first.image, again.image)
    assert not torch.equal(first.image, other.image)


# ---------------------------------------------------------------- samples
def sample_target(height=60, width=80):
    mask = torch.zeros(2, height, width, dtype=torch.uint8)
    mask[0, 10:40, 20:70] = 1
    mask[1, 0:5, 0:5] = 1
    boxes = torch.tensor([[20.0, 10, 70, 40], [0, 0, 5, 5]])
    return tv_tensors.Image(torch.full((3, height, width), 200, dtype=torch.uint8)), {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        "labels": torch.tensor([1, 2]),
        "masks": tv_tensors.Mask(mask),
    }


def test_flipping_moves_boxes_and_masks_alike():
    image, target = Augment(AugmentationConfig(flip=1.0))(*sample_target())
    assert target["boxes"].tolist() == [[10, 10, 60, 40], [75, 0, 80, 5]]
    assert target["masks"][0, 10:40, 10:60].all()
    assert target["masks"][0].sum() == 30 * 50
    assert (image.dtype, float(image.max())) == (torch.float32, pytest.approx(200 / 255))


def test_after_a_zoom_boxes_hold_their_masks_and_what_is_gone_is_not_learned():
    torch.manual_seed(0)
    augment = Augment(AugmentationConfig(flip=0.0, scale=[0.5, 3.0], crop_size=64, min_visible=0.3))
    lost = 0
    for _ in range(60):
        image, target = augment(*sample_target())
        assert image.shape == (3, 64, 64)
        lost += 2 - len(target["labels"])
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            left, top, right, bottom = (int(side) for side in box)
            assert mask[top:bottom, left:right].sum() == mask.sum() > 0
            rows, columns = torch.where(mask)
            assert (left, top, right, bottom) == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
    assert 20 < lost < 120


def test_crowds_are_not_learned_and_images_without_anything_teach_what_is_nothing(tmp_path):
    file = write_dataset(tmp_path / "data", range(3))
    tree = json.loads(Path(file).read_text())
    tree["annotations"][0]["iscrowd"] = 1
    del tree["annotations"][1]
    write(Path(file), tree)
    kept = read_data(settings_of(file, "out").data)
    assert [len(image.annotations) for image in kept.train] == [0, 0, 1]
    assert len(read_data(settings_of(file, "out", data__keep_empty=False).data).train) == 1


def test_an_image_that_cannot_be_read_is_named_and_the_rest_is_learned(tmp_path):
    file = write_dataset(tmp_path / "data", range(4), broken=[2])
    tree = json.loads(Path(file).read_text())
    tree["images"][3]["height"] = 97
    write(Path(file), tree)
    summary = finetune(settings_of(file, tmp_path / "out", train__epochs=2))
    assert len(summary.unusable) == 2
    assert any("2.png: the bytes are in no image format" in text for text in summary.unusable)
    assert any("4.png: is 128 x 96 px, annotated as 128 x 97" in text for text in summary.unusable)
    assert summary.num_steps == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__train": [{"annotations": "{file}", "images": "{folder}"}]}, "4 of its 4 images are not in"),
        ({"data__train": [{"annotations": "{file}", "only": "{file}#none"}]}, "is no list of file names"),
        ({"data__train": [{"annotations": "{file}", "only": "{folder}/no.json"}]}, "there is no file at"),
        ({"data__train": [{"annotations": "{file}", "only": "{folder}/names.json"}]}, "names no image of"),
    ],
)
def test_data_that_does_not_fit_is_refused_in_one_line(four_images, tmp_path, changes, message):
    write(tmp_path / "names.json", ["stranger.png"])
    text = json.dumps(changes).replace("{file}", four_images).replace("{folder}", str(tmp_path))
    with pytest.raises(InputError, match=message) as raised:
        read_data(settings_of(four_images, "out", **json.loads(text)).data)
    assert "\n" not in str(raised.value)


def test_settings_that_cannot_be_are_refused_in_one_line(four_images):
    with pytest.raises(ConfigError, match=r"augmentation.scale: \[2.0, 0.5\] is not allowed"):
        settings_of(four_images, "out", augmentation__scale=[2.0, 0.5])
    with pytest.raises(ConfigError, match="train.epoch: unknown key. Did you mean 'epochs'"):
        settings_of(four_images, "out", train__epoch=3)
    with pytest.raises(ConfigError, match="network.min_size: 300 px is more than network.max_size, 200 px"):
        build_network(NetworkConfig(name=SMALL, weights="NONE", min_size=300, max_size=200), {1: "a"})


# ---------------------------------------------------------------- network
def test_heads_for_other_categories_start_anew_and_the_rest_is_kept():
    start = build_network(NetworkConfig(name=SMALL, weights=BUNDLED), {1: "a", 2: "b"})
    assert all("predictor" in name for name in start.fresh)
    assert len(start.fresh) == 6
    assert start.model.roi_heads.box_predictor.cls_score.out_features == 3
    same = build_network(NetworkConfig(name=SMALL, weights=BUNDLED), {1: "a", 2: "b", 3: "c"})
    assert same.fresh == ()


def test_frozen_stages_do_not_learn():
    free = build_network(NetworkConfig(name=SMALL, weights="NONE"), {1: "a"}).model
    frozen = build_network(NetworkConfig(name=SMALL, weights="NONE", frozen_stages=2), {1: "a"}).model
    learning = [sum(one.requires_grad for one in model.backbone.body.parameters()) for model in (free, frozen)]
    assert 0 < learning[1] < learning[0]
    assert not any(one.requires_grad for name, one in frozen.backbone.body.named_parameters() if name.startswith("3."))
    assert all(one.requires_grad for name, one in frozen.backbone.body.named_parameters() if name.startswith("4."))


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"])
def test_the_large_networks_take_a_step_and_can_be_saved_and_loaded(name, four_images, tmp_path):
    config = settings_of(
        four_images, tmp_path / "out", network__name=name, train__epochs=1, train__batch_size=4,
        network__frozen_stages=3, network__min_size=64, network__max_size=96,
    )  # fmt: skip
    summary = finetune(config)
    assert summary.num_steps == 1
    request = resolve_model(load_config(settings={
        "input.uri": "x", "output.uri": "y", "model.weights": summary.checkpoint
    }).model)  # fmt: skip
    assert request.info.name == name
    assert request.info.categories == {1: "red", 2: "green"}


def test_weights_of_another_network_are_refused(tmp_path):
    torch.save({"something": torch.zeros(3)}, tmp_path / "x.pth")
    with pytest.raises(WeightsError, match="is no Mask R-CNN checkpoint"):
        build_network(NetworkConfig(name=SMALL, weights=str(tmp_path / "x.pth")), {1: "a"})


def test_the_rate_rises_then_falls_at_milestones_or_along_a_cosine(four_images, tmp_path):
    def rates(**changes):
        config = settings_of(
            four_images, tmp_path, train__learning_rate=1.0, train__warmup_steps=4, train__epochs=10, **changes
        )
        data = read_data(config.data)
        samples = TrainingSet(data.train, Augment(config.augmentation), seed=0)
        model = build_network(config.network, data.categories).model
        trainer = Trainer(model, samples, config.train, device="cpu")
        return [trainer._factor(step) for step in range(21)]

    steps = rates(train__milestones=[4, 6], train__gamma=0.1)
    assert steps[0] == pytest.approx(1e-3)
    assert steps[4:8] == [1.0] * 4
    assert steps[8:14] == pytest.approx([0.1] * 4 + [0.01] * 2)
    cosine = rates(train__schedule="cosine")
    assert cosine[4] == 1.0
    assert cosine[12] == pytest.approx(0.5)
    assert cosine[20] == pytest.approx(0, abs=1e-9)


def test_a_loss_that_is_no_number_stops_with_the_fix(four_images, tmp_path):
    config = settings_of(four_images, tmp_path / "out", train__learning_rate=10.0, train__warmup_steps=0,
                         train__optimizer="sgd", train__clip_norm=0.0, train__epochs=20)  # fmt: skip
    with pytest.raises(DivergedError, match="the loss is .*lower train.learning_rate"):
        finetune(config)


def test_mixed_precision_learns_too(four_images, tmp_path):
    finetune(settings_of(four_images, tmp_path / "out", train__precision="bfloat16", train__epochs=2))
    assert np.isfinite(losses_of(tmp_path / "out")).all()


# ---------------------------------------------------------------- what is saved
def tensors_of(output):
    from safetensors.torch import load_file

    return load_file(Path(output) / "best.safetensors")


def test_a_share_of_the_start_is_mixed_into_what_is_saved(four_images, tmp_path):
    changes = {"network__weights": BUNDLED, "train__epochs": 1, "train__learning_rate": 0.01, "train__warmup_steps": 0}
    for name, share in (("none", 0.0), ("quarter", 0.25), ("all", 1.0)):
        finetune(settings_of(four_images, tmp_path / name, output__start_share=share, **changes))
    none, quarter, start = (tensors_of(tmp_path / name) for name in ("none", "quarter", "all"))
    key = "backbone.fpn.inner_blocks.0.0.weight"
    assert not torch.equal(none[key], start[key])
    torch.testing.assert_close(quarter[key], 0.75 * none[key] + 0.25 * start[key])
    from safetensors.torch import load_file

    torch.testing.assert_close(start[key], load_file(BUNDLED)[key].float())


def test_the_average_is_saved_and_not_the_last_step(four_images, tmp_path):
    changes = {"train__epochs": 2, "train__learning_rate": 0.01, "train__warmup_steps": 0}
    finetune(settings_of(four_images, tmp_path / "last", **changes))
    finetune(settings_of(four_images, tmp_path / "average", train__average_decay=0.9, **changes))
    state = torch.load(tmp_path / "average" / "last.pt", weights_only=True)["trainer"]
    key = "roi_heads.box_predictor.cls_score.weight"
    saved = tensors_of(tmp_path / "average")[key]
    assert torch.equal(saved, state["average"][f"module.{key}"])
    assert not torch.equal(saved, state["model"][key])
    assert torch.equal(tensors_of(tmp_path / "last")[key], state["model"][key])  # the same steps


def test_the_saved_network_resizes_as_its_output_says_and_is_rounded_before_it_is_measured(four_images, tmp_path):
    config = settings_of(
        four_images,
        tmp_path / "out",
        train__epochs=1,
        output__min_size=64,
        output__max_size=90,
        output__dtype="float16",
    )
    finetune(config)
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "best.safetensors", framework="numpy") as file:
        rule = json.loads(file.metadata()["preprocessing"])
    assert (rule["min_size"], rule["max_size"]) == (64, 90)
    assert tensors_of(tmp_path / "out")["backbone.fpn.inner_blocks.0.0.weight"].dtype == torch.float16
    with pytest.raises(OutputError, match="with other settings .output.dtype: 'float16' there, 'float32' now."):
        finetune(settings_of(four_images, tmp_path / "out", train__epochs=1, output__min_size=64, output__max_size=90))


@pytest.mark.parametrize(("keep", "epoch"), [("best", 1), ("last", 3)])
def test_the_best_or_the_last_is_kept(four_images, tmp_path, monkeypatch, keep, epoch):
    falling = iter([0.9, 0.5, 0.3])
    monkeypatch.setattr(
        "segpipe.finetuning.job.measure",
        lambda *_, **__: dict.fromkeys(("segm AP", "segm AP50", "bbox AP"), next(falling)),
    )
    config = settings_of(
        four_images, tmp_path / "out", data__validation=[{"annotations": four_images}], output__keep=keep
    )
    assert finetune(config).best_epoch == epoch


def test_the_seed_decides_and_gradients_are_clipped(four_images, tmp_path):
    for name, changes in {
        "a": {}, "b": {}, "other seed": {"train__seed": 1}, "clipped": {"train__clip_norm": 1e-6},
    }.items():  # fmt: skip
        finetune(settings_of(
            four_images, tmp_path / name, train__epochs=1, train__warmup_steps=0, train__optimizer="sgd", **changes
        ))  # fmt: skip
    losses = {name: losses_of(tmp_path / name) for name in ("a", "b", "other seed", "clipped")}
    assert losses["a"] == losses["b"] != losses["other seed"]
    start = build_network(NetworkConfig(name=SMALL, weights="NONE"), {1: "a", 2: "b"}).model.state_dict()
    key = "roi_heads.box_head.fc6.weight"
    moved = {name: tensors_of(tmp_path / name)[key] for name in ("a", "clipped")}
    assert start[key].shape == moved["a"].shape
    assert losses["clipped"][0] == losses["a"][0]
    assert not torch.equal(moved["a"], moved["clipped"])


def test_photometric_changes_touch_colours_and_nothing_else():
    torch.manual_seed(0)
    image, target = Augment(AugmentationConfig(flip=0.0, photometric=1.0))(*sample_target())
    plain, same = Augment(AugmentationConfig(flip=0.0))(*sample_target())
    assert not torch.equal(image, plain)
    assert torch.equal(target["boxes"], same["boxes"])


def test_several_validation_sets_are_measured_as_one(trained, four_images, tmp_path):
    from segpipe.finetuning.measuring import measure
    from segpipe.models.maskrcnn import load as load_segmenter

    other = write_dataset(tmp_path / "other", range(10, 13))
    both = [{"annotations": four_images}, {"annotations": other}]
    data = read_data(settings_of(four_images, "out", data__validation=both).data)
    settings = {"input.uri": "x", "output.uri": "y", "model.weights": trained[1].checkpoint}
    model = load_segmenter(resolve_model(load_config(settings=settings).model))._model
    alone = [measure(model, [one], device="cpu")["segm AP50"] for one in data.validation]
    together = measure(model, data.validation, device="cpu")["segm AP50"]
    assert min(alone) - 0.05 <= together <= max(alone) + 0.05


def test_labels_follow_the_order_that_was_asked_for_and_unknown_names_are_refused(four_images):
    data = read_data(settings_of(four_images, "out", data__categories=["green", "red"]).data)
    assert data.categories == {1: "green", 2: "red"}
    for names, message in ((["red", "zebra"], "no dataset has zebra"), (["red", "red"], "red stands twice")):
        with pytest.raises(ConfigError, match=f"data.categories: {message}; known are green, red"):
            read_data(settings_of(four_images, "out", data__categories=names).data)


def test_changed_data_is_not_gone_on_with(tmp_path):
    file = write_dataset(tmp_path / "data", range(4))
    finetune(settings_of(file, tmp_path / "out", train__epochs=1))
    tree = json.loads(Path(file).read_text())
    write(Path(file), {**tree, "categories": tree["categories"][::-1]})
    with pytest.raises(OutputError, match="with other settings .labels: "):
        finetune(settings_of(file, tmp_path / "out", train__epochs=2))
    write(Path(file), {**tree, "annotations": tree["annotations"][:-1]})
    with pytest.raises(OutputError, match="with other settings .training data: "):
        finetune(settings_of(file, tmp_path / "out", train__epochs=2))


def test_nothing_usable_is_no_success(tmp_path):
    file = write_dataset(tmp_path / "data", range(3), broken=[1, 2, 3])
    with pytest.raises(
        InputError, match="data.train: not one image can be used; the first: .*png: the bytes are in no"
    ):
        finetune(settings_of(file, tmp_path / "out"))
    tree = json.loads(Path(file).read_text())
    for image in tree["images"]:
        image["file_name"] = f"elsewhere/{image['file_name']}"
    write(Path(file), tree)
    with pytest.raises(InputError, match="3 of its 3 images are not in"):
        read_data(settings_of(file, "out").data)
