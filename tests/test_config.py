"""Settings: strict, explained in one line each, and a fingerprint of exactly those that change rows."""

from pathlib import Path

import pytest
import yaml

from segpipe.config import Config, fingerprint, load_config, reference_yaml, row_settings
from segpipe.errors import ConfigError
from segpipe.finetuning.settings import FinetuneConfig, finetune_reference_yaml, load_finetune_config
from segpipe.sections import parse_assignment

BASE = {"input.uri": "photos", "output.uri": "lake"}
CONFIGS = Path(__file__).parents[1] / "configs"

# Another value for every key, and whether it gives other rows (section 3 of the contract).
PERTURBED = {
    "input.uri": ("other", True),
    "input.format": ("folder", True),
    "input.chunk_images": (7, False),
    "input.image_column": ("photo", True),
    "input.key_column": ("id", True),
    "input.max_pixels": (1000, True),
    "input.max_bytes": (1000, True),
    "input.allowed_schemes": (["s3"], False),
    "input.allow_truncated": (True, True),
    "input.storage_options": ({"anon": True}, False),
    "model.name": ("demo", True),
    "model.weights": ("COCO_V1", True),
    "model.score_threshold": (0.3, True),
    "model.category_thresholds": ({"person": 0.5}, True),
    "model.categories": (["person"], True),
    "model.max_instances": (50, True),
    "model.mask_threshold": (0.4, True),
    "model.batch_size": (2, True),
    "model.dtype": ("bfloat16", True),
    "model.device": ("cpu", False),
    "output.uri": ("elsewhere", False),
    "output.run_id": ("mine", False),
    "output.max_failed_share": (0.5, False),
    "output.storage_options": ({"profile": "x"}, False),
    "resources.engine": ("inline", False),
    "resources.ray_address": ("local", False),
    "resources.num_actors": (3, False),
    "resources.gpus_per_actor": (0.5, False),
    "resources.cpus_per_actor": (2, False),
    "resources.max_image_seconds": (5.0, False),
    "resources.max_image_memory_gb": (2.0, False),
}


def test_every_key_is_perturbed_by_this_file():
    keys = {f"{name}.{key}" for name, section in Config.model_fields.items() for key in section.annotation.model_fields}
    assert keys == set(PERTURBED)


@pytest.mark.parametrize("key", PERTURBED)
def test_the_fingerprint_covers_exactly_what_changes_rows(key):
    value, changes_rows = PERTURBED[key]
    before = fingerprint(row_settings(load_config(settings=BASE)))
    after = fingerprint(row_settings(load_config(settings={**BASE, key: value})))
    assert (before != after) == changes_rows


def test_the_fingerprint_is_the_same_everywhere():
    """A changed digest would orphan every run that exists: raise RESULT_VERSION on purpose instead."""
    settings = {"input.uri": "/photos", "model.score_threshold": 0.05, "model.categories": [1, 2]}
    assert fingerprint(settings).startswith("707bb68f")
    assert fingerprint(dict(reversed(settings.items()))) == fingerprint(settings)


def test_settings_win_over_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("input: {uri: a}\noutput: {uri: b}\nmodel: {score_threshold: 0.2, max_instances: 5}\n")
    config = load_config(file, {"model.score_threshold": 0.4})
    assert (config.model.score_threshold, config.model.max_instances) == (0.4, 5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "input: is missing; give it in the file or with --input."),
        ({"input.uri": "a"}, "output: is missing; give it in the file or with --output."),
        ({**BASE, "model.scor_threshold": 1}, "model.scor_threshold: unknown key. Did you mean 'score_threshold'?"),
        ({**BASE, "modle.name": "demo"}, "modle: unknown section. Did you mean 'model'? Known: input, model"),
        ({**BASE, "model.score_threshold": 1.5}, "model.score_threshold: 1.5 is not allowed. Allowed: keep detections"),
        ({**BASE, "model.score_threshold": "0.5"}, "model.score_threshold: '0.5' is not allowed."),
        ({**BASE, "model.batch_size": 0}, "model.batch_size: 0 is not allowed. Allowed: images of one padded shape"),
        ({**BASE, "model.max_instances": True}, "model.max_instances: True is not allowed."),
        ({**BASE, "model.category_thresholds": {"a": 3}}, "model.category_thresholds: 3 is not allowed."),
        (
            {**BASE, "output.run_id": "2026-11-22"},
            "output.run_id: '2026-11-22' is not allowed. Allowed: name of the run",
        ),
        ({**BASE, "output.run_id": "Mine"}, "output.run_id: 'Mine' is not allowed."),
        ({**BASE, "input.uri": ""}, "input.uri: '' is not allowed."),
        ({**BASE, "resources.engine": "spark"}, "resources.engine: 'spark' is not allowed. Allowed: ray: actors"),
        ({**BASE, "model": 3}, "model: a setting is written section.key, for example model.score_threshold=0.5"),
    ],
)
def test_a_wrong_setting_is_one_line_with_the_key_the_value_and_what_is_allowed(settings, message):
    with pytest.raises(ConfigError) as caught:
        load_config(settings=settings)
    assert message in str(caught.value)


def test_several_mistakes_are_several_lines():
    with pytest.raises(ConfigError) as caught:
        load_config(settings={**BASE, "model.batch_size": "x", "model.dtype": "int8"})
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("input: [", "no valid YAML"),
        ("- a\n- b\n", "must hold the sections input, model, output, resources"),
        ("input: !!python/object/apply:os.system ['true']\n", "no valid YAML"),
        ("input: photos\noutput: {uri: a}\n", "input: 'photos' is not allowed"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_config(file)


def test_a_section_of_the_file_that_is_no_section_is_named(tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("input: photos\n")
    with pytest.raises(ConfigError, match="input: must be a section with keys, got 'photos'"):
        load_config(file, {"input.format": "folder"})


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"--config .*nope.yaml: no such file"):
        load_config(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match=r"--config .*: cannot be read"):
        load_config(tmp_path)


def test_an_empty_file_is_an_empty_configuration(tmp_path):
    file = tmp_path / "empty.yaml"
    file.write_text("")
    assert load_config(file, BASE).input.uri == "photos"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("model.score_threshold=0.5", "model.score_threshold", 0.5),
        ("model.categories=[person, 3]", "model.categories", ["person", 3]),
        ("input.uri=a=b", "input.uri", "a=b"),
        ("input.allow_truncated=true", "input.allow_truncated", True),
    ],
)
def test_an_assignment_gets_the_type_that_yaml_gives_it(text, key, value):
    assert parse_assignment(text) == (key, value)


@pytest.mark.parametrize(("text", "message"), [("model.name", "write it as section.key=value"), ("a.b=[", "no YAML")])
def test_a_wrong_assignment_is_one_line(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_assignment(text)


def test_the_reference_file_equals_the_code():
    assert (CONFIGS / "reference.yaml").read_text() == reference_yaml()


def test_the_reference_file_holds_every_key_with_its_default_and_is_valid():
    tree = yaml.safe_load(reference_yaml())
    assert Config.model_validate(tree) == load_config(settings={"input.uri": "photos/", "output.uri": "lake/"})


FINETUNING = {"finetune.yaml", "demo_model.yaml"}


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(file):
    if file.name in FINETUNING:
        load_finetune_config(file)
    else:
        load_config(file)


def test_the_reference_file_of_fine_tuning_equals_the_code():
    assert (CONFIGS / "finetune.yaml").read_text() == finetune_reference_yaml()


def test_every_key_says_what_it_means_and_numbers_say_their_range():
    for section in [*Config.model_fields.values(), *FinetuneConfig.model_fields.values()]:
        for name, field in section.annotation.model_fields.items():
            assert len(field.description) > 15, name
            kind = str(field.annotation)
            if "Ge(" in f"{kind} {field.metadata}":
                assert any(
                    word in field.description for word in (" to ", "at least", "below", "fewer", "pixels", "or more")
                ), name
