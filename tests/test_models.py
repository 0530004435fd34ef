"""Models: names, weights and categories are checked before anything is loaded; selection comes before top-k."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_V2_Weights, MaskRCNN_ResNet50_FPN_Weights

from segpipe.config import ModelConfig
from segpipe.detections import Selection
from segpipe.errors import ConfigError, WeightsError
from segpipe.masks.grids import encode_grids
from segpipe.models import MODELS, find_model, is_machine_fault, load_segmenter, pin_threads
from segpipe.models.categories import COCO_NAMES, coco_categories, contiguous_ids, find_category
from segpipe.models.checkpoints import fetch
from segpipe.models.maskrcnn import BUILDERS, choose_device
from segpipe.models.weights import resolve_model
from segpipe.overview import list_models
from segpipe.records import Location
from segpipe.storage import write_bytes
from tests.factory import cells


def resolve(**settings):
    return resolve_model(ModelConfig(**settings))


@pytest.fixture(scope="module")
def small_state():
    """Return the state dict of an untrained demo network with two categories."""
    torch.manual_seed(0)
    return BUILDERS["demo"](3, batch_norm=False).state_dict()


# ---------------------------------------------------------------- registry and categories
def test_an_unknown_model_names_its_nearest():
    with pytest.raises(
        ConfigError, match=r"unknown model 'maskrcn_v2'. Did you mean 'maskrcnn_resnet50_fpn.*Known models: "
    ):
        find_model("maskrcn_v2")
    with pytest.raises(ConfigError, match=r"unknown model 'xyz'. Known models: maskrcnn_resnet50_fpn_v2,"):
        find_model("xyz")


def test_every_model_is_listed_with_weights_and_licence():
    listed = {model.name: model for model in list_models()}
    assert listed.keys() == MODELS.keys()
    assert all(model.summary and model.licence and model.weights_note for model in listed.values())
    assert listed["maskrcnn_resnet50_fpn"].weights == ("COCO_V1",)


@pytest.mark.parametrize(
    ("name", "enum"),
    [
        ("maskrcnn_resnet50_fpn", MaskRCNN_ResNet50_FPN_Weights),
        ("maskrcnn_resnet50_fpn_v2", MaskRCNN_ResNet50_FPN_V2_Weights),
    ],
)
def test_named_weights_are_those_of_torchvision(name, enum):
    files = MODELS[name].weight_files
    assert {member.name: member.url.rsplit("/", 1)[-1] for member in enum} == files
    assert enum.DEFAULT.name == next(iter(files))


def test_coco_names_are_those_of_torchvision():
    theirs = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert {index: name for index, name in enumerate(theirs) if name not in ("__background__", "N/A")} == COCO_NAMES
    assert sorted(coco_categories()) == list(range(1, len(theirs)))
    assert coco_categories()[12] == "unused 12"
    assert contiguous_ids(COCO_NAMES)[90] == 79


def test_a_category_goes_by_name_or_id():
    categories = {1: "person", 3: "car"}
    assert find_category("car", categories, key="k") == 3
    assert find_category(3, categories, key="k") == find_category("3", categories, key="k") == 3
    with pytest.raises(
        ConfigError, match=r"k: the model has no category 'persn'. Did you mean 'person'\? It knows person"
    ):
        find_category("persn", categories, key="k")
    with pytest.raises(ConfigError, match="k: the model has no category 2"):
        find_category(2, categories, key="k")
    with pytest.raises(ConfigError, match=r"and 78 more"):
        find_category("xyzzy", coco_categories(), key="k")


# ---------------------------------------------------------------- weights
def test_the_demo_resolves_without_a_download():
    request = resolve(name="demo", categories=["person"], category_thresholds={"animal": 0.5})
    assert dict(request.info.categories) == {1: "person", 2: "animal", 3: "vehicle"}
    assert len(request.info.weights_sha256) == 64
    assert request.selection == Selection(0.05, {2: 0.5}, frozenset({1}), 100, 0.5)
    assert resolve(name="demo", weights="BUNDLED").info == request.info


def test_blank_has_no_weights():
    assert resolve(name="blank").info.weights_sha256 == ""
    with pytest.raises(WeightsError, match="the model 'blank' has no weights, got 'COCO_V1'; leave it out"):
        resolve(name="blank", weights="COCO_V1")


def test_a_name_that_is_no_weights_name_is_refused():
    with pytest.raises(WeightsError, match=r"has no weights called 'COCO_V2'. Known: DEFAULT, COCO_V1, or the path"):
        resolve(name="maskrcnn_resnet50_fpn", weights="COCO_V2")


def test_weights_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"there is no file at .*/nope.pth"):
        resolve(name="demo", weights=str(tmp_path / "nope.pth"))


@pytest.fixture
def torch_home(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    return tmp_path / "hub" / "checkpoints"


def test_named_weights_that_cannot_be_downloaded_say_what_to_do(torch_home, monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(
        WeightsError, match=r"COCO_V1 could not be downloaded from https://.* \(no network\); give a file"
    ):
        resolve(name="maskrcnn_resnet50_fpn_v2")


@pytest.mark.slow
def test_named_weights_are_taken_from_torchvisions_cache_with_frozen_batch_norm(torch_home):
    """Trained v1 has frozen batch norm with epsilon 0, which an untrained model of torchvision has not."""
    torch_home.mkdir(parents=True)
    state = BUILDERS["maskrcnn_resnet50_fpn"](91, batch_norm=False).state_dict()
    torch.save(state, torch_home / "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth")
    request = resolve(name="maskrcnn_resnet50_fpn", weights="COCO_V1")
    assert (request.info.category_space, len(request.info.categories)) == ("coco91", 90)
    model = load_segmenter(request)._model
    frozen = [module for module in model.modules() if type(module).__name__ == "FrozenBatchNorm2d"]
    assert len(frozen) == 53
    assert {module.eps for module in frozen} == {0.0}


@pytest.mark.parametrize("kind", ["safetensors", "state_dict", "nested", "data_parallel"])
def test_an_own_checkpoint_brings_its_categories(tmp_path, small_state, kind):
    path = tmp_path / ("w.safetensors" if kind == "safetensors" else "w.pth")
    names = {"1": "cat", "2": "dog"}
    if kind == "safetensors":
        save_file(small_state, path, metadata={"categories": json.dumps(names)})
    else:
        content = (
            {f"module.{key}": value for key, value in small_state.items()} if kind == "data_parallel" else small_state
        )
        torch.save({"model": content, "epoch": 3} if kind == "nested" else content, path)
        (tmp_path / "w.pth.categories.json").write_text(json.dumps(names))
    request = resolve(name="demo", weights=str(path))
    assert dict(request.info.categories) == {1: "cat", 2: "dog"}
    assert request.info.category_space == "own"
    assert load_segmenter(request).batch_size == 1


def test_a_checkpoint_in_a_store_is_copied_once(tmp_path, small_state, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_file(small_state, tmp_path / "w.safetensors", metadata={"categories": '{"1": "cat", "2": "dog"}'})
    remote = Location("memory://weights/w.safetensors")
    write_bytes(remote, (tmp_path / "w.safetensors").read_bytes())
    request = resolve(name="demo", weights=remote.uri)
    copy = fetch(remote)
    assert copy.parent == tmp_path / "cache" / "segpipe" / "weights"
    assert [file.name for file in copy.parent.iterdir()] == [copy.name]
    assert load_segmenter(request).batch_size == 1


def test_weights_that_change_while_the_run_goes_on_are_refused(tmp_path, small_state):
    path = tmp_path / "w.safetensors"
    save_file(small_state, path, metadata={"categories": '{"1": "cat", "2": "dog"}'})
    request = resolve(name="demo", weights=str(path))
    save_file(small_state, path, metadata={"categories": '{"1": "cat", "2": "cow"}'})
    with pytest.raises(WeightsError, match="changed while the run was going on: sha256"):
        load_segmenter(request)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (None, r"has 3 classes \(background included\) and names none; write .*w.pth.categories.json with"),
        ('{"1": "cat"}', r"has 3 classes .* must name the ids 1 to 2; it names 1: \[1\]"),
        ('{"1": "cat", "2": "dog", "3": "cow"}', "must name the ids 1 to 2; it names 3"),
        ('["cat", "dog"]', r'must hold JSON such as \{"1": "cat", "2": "dog"\}'),
        ("{", "must hold JSON such as"),
    ],
)
def test_weights_of_another_class_count_are_refused(tmp_path, small_state, names, message):
    torch.save(small_state, tmp_path / "w.pth")
    if names is not None:
        (tmp_path / "w.pth.categories.json").write_text(names)
    with pytest.raises(WeightsError, match=message):
        resolve(name="demo", weights=str(tmp_path / "w.pth"))


def test_weights_of_another_architecture_are_refused(tmp_path, small_state):
    path = tmp_path / "w.safetensors"
    save_file(small_state, path, metadata={"categories": '{"1": "cat", "2": "dog"}'})
    with pytest.raises(
        WeightsError, match=r"does not fit maskrcnn_resnet50_fpn: .* tensors missing, .*choose the model"
    ):
        resolve(name="maskrcnn_resnet50_fpn", weights=str(path))
    partial = dict(list(small_state.items())[:-1])
    save_file(partial, path, metadata={"categories": '{"1": "cat", "2": "dog"}'})
    with pytest.raises(WeightsError, match=r"1 tensors missing, 0 unexpected, 0 of another shape .*is missing"):
        resolve(name="demo", weights=str(path))


class Malicious:
    """A pickle that would run code."""

    def __reduce__(self):
        return (print, ("this code was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nothing", "cannot be read as weights"),
        (pickle.dumps(Malicious()), "cannot be read as weights"),
        (pickle.dumps([1, 2]), "cannot be read as weights|holds no state dict"),
    ],
)
def test_files_that_are_no_weights_are_refused_and_run_no_code(tmp_path, content, message, capsys):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        resolve(name="demo", weights=str(tmp_path / "w.pth"))
    assert "this code was run" not in capsys.readouterr().out


def test_torch_files_that_carry_code_or_no_tensors_are_refused(tmp_path, capsys):
    torch.save({"model": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="hold nothing but tensors"):
        resolve(name="demo", weights=str(tmp_path / "evil.pth"))
    assert "this code was run" not in capsys.readouterr().out
    torch.save({"a": 1}, tmp_path / "none.pth")
    with pytest.raises(WeightsError, match="holds no state dict; save model.state_dict"):
        resolve(name="demo", weights=str(tmp_path / "none.pth"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"no Mask R-CNN checkpoint of torchvision: .* its first tensor is a"):
        resolve(name="demo", weights=str(tmp_path / "other.pth"))
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="no readable safetensors file"):
        resolve(name="demo", weights=str(tmp_path / "w.safetensors"))


# ---------------------------------------------------------------- selection
CROWD = np.vstack([cells(["red"] * 60, columns=10), (cells(["blue"] * 10, columns=10) * 0.5).astype(np.uint8)])


def blank(**settings):
    return load_segmenter(resolve(name="blank", **settings))


def predict(segmenter, image):
    pixels, frame = segmenter.prepare(image)
    return segmenter.decode(segmenter.forward([pixels], [frame]), [frame])[0]


def test_blank_finds_every_cell_of_strong_colour_once():
    image = cells(["red", None, "green", "blue", None, "red"], columns=3)
    found = predict(blank(), image)
    assert sorted(found.category_ids.tolist()) == [1, 1, 2, 3]
    assert (found.num_candidates, found.boxes_xyxy.dtype, found.scores.dtype) == (4, np.float32, np.float32)
    assert (np.diff(found.scores) <= 0).all()
    assert found.boxes_xyxy[found.category_ids == 3].tolist() == [[0, 16, 16, 32]]


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (16, 17), (31, 15)])
def test_blank_boxes_stay_inside_images_of_any_size(size):
    found = predict(blank(), np.full((*size, 3), (250, 0, 0), np.uint8))
    assert (found.boxes_xyxy[:, 2:] <= [size[1], size[0]]).all()
    assert len(found.scores) == -(-size[0] // 16) * -(-size[1] // 16)


def test_the_category_filter_comes_before_max_instances():
    """Asking for blue must not lose it to sixty cells of red."""
    everything = predict(blank(max_instances=10), CROWD)
    assert set(everything.category_ids.tolist()) == {1}
    assert (everything.num_candidates, len(everything.scores)) == (70, 10)
    blue = predict(blank(max_instances=10, categories=["blue"]), CROWD)
    assert blue.category_ids.tolist() == [3] * 10
    assert blue.num_candidates == 10


def test_thresholds_hold_by_category():
    assert predict(blank(score_threshold=0.99), CROWD).num_candidates == 0
    found = predict(blank(score_threshold=0.99, category_thresholds={"blue": 0.1}), CROWD)
    assert found.category_ids.tolist() == [3] * 10


def test_a_detection_must_score_above_its_threshold_and_not_just_reach_it():
    scores = np.unique(predict(blank(score_threshold=0.0), CROWD).scores)
    middle = float(scores[len(scores) // 2])
    found = predict(blank(score_threshold=middle), CROWD).scores
    assert found.min() == scores[len(scores) // 2 + 1]
    blue = predict(blank(score_threshold=0.0, categories=["blue"]), CROWD).scores
    exact = float(np.unique(blue)[0])
    strict = predict(blank(score_threshold=0.0, categories=["blue"], category_thresholds={"blue": exact}), CROWD)
    assert strict.num_candidates == int((blue > exact).sum()) < len(blue)


def test_a_batch_gives_each_image_its_own_prediction():
    segmenter = blank()
    images = [cells(["red"] * count + [None] * (8 - count)) for count in (3, 0, 8)]
    prepared = [segmenter.prepare(image) for image in images]
    frames = [frame for _, frame in prepared]
    found = segmenter.decode(segmenter.forward([pixels for pixels, _ in prepared], frames), frames)
    assert [len(one.scores) for one in found] == [3, 0, 8]


@pytest.fixture(scope="module")
def crowded():
    """A demo network whose box head calls everything person, and a little less so animal: a crowd of candidates."""
    import copy

    segmenter = load_segmenter(resolve(name="demo"))
    model = copy.deepcopy(segmenter._model)
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias.copy_(torch.tensor([-9.0, 6.0, 3.0, -9.0]))
    return model


@pytest.mark.parametrize(("categories", "kept"), [([], {1}), (["animal"], {2})])
def test_mask_rcnn_filters_categories_before_max_instances(crowded, categories, kept, package_photos):
    from PIL import Image

    from segpipe.models.maskrcnn import MaskRcnnSegmenter

    request = resolve(name="demo", categories=categories, max_instances=2, score_threshold=0.0)
    segmenter = MaskRcnnSegmenter(crowded, request.selection, device="cpu", dtype=torch.float32, batch_size=1)
    found = predict(segmenter, np.array(Image.open(package_photos / "astronaut.png").convert("RGB")))
    assert set(found.category_ids.tolist()) == kept
    assert len(found.scores) == 2 < found.num_candidates


def test_mask_rcnn_thresholds_hold_by_category(package_photos):
    from PIL import Image

    image = np.array(Image.open(package_photos / "astronaut.png").convert("RGB"))
    plain = predict(load_segmenter(resolve(name="demo")), image)
    strict = predict(load_segmenter(resolve(name="demo", category_thresholds={"person": 0.5})), image)
    expected = [
        (category, score)
        for category, score in zip(plain.category_ids, plain.scores, strict=True)
        if category != 1 or score > 0.5
    ]
    assert 0 < len(strict.scores) < len(plain.scores)
    assert list(zip(strict.category_ids, strict.scores, strict=True)) == expected
    exact = float(plain.scores[1])
    above = predict(load_segmenter(resolve(name="demo", score_threshold=exact)), image)
    assert above.scores.tolist() == plain.scores[:1].tolist()
    same = int(plain.category_ids[1])
    above = predict(load_segmenter(resolve(name="demo", category_thresholds={same: exact})), image)
    kept = (plain.category_ids != same) | (plain.scores > exact)
    assert above.scores.tolist() == plain.scores[kept].tolist()


def test_the_mask_threshold_decides_which_pixels_belong_to_a_mask(package_photos):
    from PIL import Image

    image = np.array(Image.open(package_photos / "astronaut.png").convert("RGB"))
    areas = []
    for threshold in (0.3, 0.5, 0.9):
        found = predict(load_segmenter(resolve(name="demo", mask_threshold=threshold, max_instances=3)), image)
        assert found.masks.threshold == threshold
        areas.append(encode_grids(found.masks, height=image.shape[0], width=image.shape[1])[1])
    assert (areas[0] > areas[1]).all()
    assert (areas[1] > areas[2]).all()


def test_mask_rcnn_gives_the_documented_types(package_photos):
    from PIL import Image

    segmenter = load_segmenter(resolve(name="demo", dtype="bfloat16", device="cpu"))
    assert segmenter.resolved == {"device": "cpu", "dtype": "bfloat16"}
    found = predict(segmenter, np.array(Image.open(package_photos / "chelsea.png").convert("RGB")))
    assert (found.boxes_xyxy.dtype, found.scores.dtype, found.category_ids.dtype) == (np.float32, np.float32, np.int64)
    assert found.masks.values.shape == (len(found.scores), 30, 30)
    assert found.masks.values.dtype == np.float32


# ---------------------------------------------------------------- machine
def test_threads_are_pinned_and_the_number_before_is_returned():
    before = torch.get_num_threads()
    assert pin_threads("demo", 1) == before
    assert torch.get_num_threads() == 1
    pin_threads("demo", before)
    assert pin_threads("blank", 3) == 3
    assert torch.get_num_threads() == before


def test_the_device_is_the_one_asked_for_or_the_best_there_is():
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in ("cuda", "mps", "cpu")


@pytest.mark.parametrize(
    ("error", "machine"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("The size of tensor a must match"), False),
        (ValueError("out of memory of this"), False),
    ],
)
def test_faults_of_the_machine_are_told_from_faults_of_an_image(error, machine):
    assert is_machine_fault(error) == machine
