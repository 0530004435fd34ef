"""COCO annotations as samples for torchvision's detection models.

Every random choice is a function of the seed, the epoch and the sample, so that a resumed job sees what the killed one
would have seen, whatever the number of loading processes.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from segpipe.coco.annotations import (
    Annotations,
    category_names,
    describe_problems,
    read_annotations,
    regroup,
)
from segpipe.coco.masks import decode_segmentation
from segpipe.errors import ConfigError, ImageRejectedError, InputError
from segpipe.finetuning.augmentation import Augment
from segpipe.finetuning.settings import DataConfig, DatasetConfig
from segpipe.images import decode_image
from segpipe.listing import list_files
from segpipe.records import Location
from segpipe.storage import list_names, locate, read_bytes

_MAX_PIXELS = 200_000_000
SampleKey = tuple[int, int]
Target = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """One image and what is in it.

    Attributes:
        location: of the image file.
        height: px, as the annotations say.
        width: px.
        annotations: of the wanted categories, crowds left out; `category_id` is the label, 1 and up.
    """

    location: Location
    height: int
    width: int
    annotations: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class LabelledData:
    """What there is to learn from and to measure with.

    Attributes:
        categories: label (1 and up) to name.
        train: images to learn from.
        validation: datasets in the same categories, each with the folder of its images.
        problems: what was wrong with the annotations, a line each.
    """

    categories: Mapping[int, str]
    train: tuple[LabelledImage, ...]
    validation: tuple[tuple[Annotations, Location], ...]
    problems: tuple[str, ...]

    def identity(self) -> dict[str, object]:
        """Return what must be the same when a job is resumed: labels, and every image with what is in it."""
        content = [(one.location.uri, one.height, one.width, one.annotations) for one in self.train]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
        return {"labels": {str(label): name for label, name in self.categories.items()}, "training data": digest[:16]}


@dataclass(frozen=True, slots=True)
class Sample:
    """One image as the network learns from it, or the reason why it cannot be used."""

    image: Tensor
    target: Target
    problem: str | None = None


class TrainingSet(Dataset[Sample]):
    """Loads and varies one image; its key is (epoch, index)."""

    def __init__(self, images: Sequence[LabelledImage], augment: Augment, *, seed: int) -> None:
        self._images = images
        self._augment = augment
        self._seed = seed

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, key: SampleKey) -> Sample:
        epoch, index = key
        one = self._images[index]
        try:
            pixels = decode_image(read_bytes(one.location), max_pixels=_MAX_PIXELS).pixels
        except (ImageRejectedError, FileNotFoundError) as error:
            return Sample(torch.empty(0), {}, f"{one.location.uri}: {error}")
        if pixels.shape[:2] != (one.height, one.width):
            found = f"{pixels.shape[1]} x {pixels.shape[0]}"
            return Sample(
                torch.empty(0), {}, f"{one.location.uri}: is {found} px, annotated as {one.width} x {one.height}"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix(self._seed, epoch, index))
            return Sample(*self._augment(*_as_tensors(one, pixels)))


@dataclass(frozen=True, slots=True)
class EpochBatches:
    """The keys of an epoch in random order, `batch_size` at a time, from a given step on.

    Attributes:
        num_images: of the dataset.
        batch_size: images a step; the last step of an epoch may have fewer.
        epoch: 0-based.
        first_step: steps of this epoch that are done already.
        seed: of the job.
    """

    num_images: int
    batch_size: int
    epoch: int
    first_step: int
    seed: int

    def __len__(self) -> int:
        return -(-self.num_images // self.batch_size) - self.first_step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        order = torch.randperm(self.num_images, generator=generator).tolist()
        for start in range(self.first_step * self.batch_size, self.num_images, self.batch_size):
            yield [(self.epoch, index) for index in order[start : start + self.batch_size]]


def mix(*numbers: int) -> int:
    """Return a 32-bit seed that stands for some numbers; near numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def keep_list(samples: list[Sample]) -> list[Sample]:
    """Return the samples of a batch as they are; detection models take images of any size."""
    return samples


def read_data(config: DataConfig) -> LabelledData:
    """Read and check all annotations, and look whether their images are there.

    Raises:
        InputError: if a file is no COCO dataset, has none of the categories, or its images are not there.
        StoreError: if a store does not answer.
    """
    train = [_read_dataset(dataset, clip=True) for dataset in config.train]
    names = config.categories or category_names(train[0][0], by=config.group_by)
    if not names:
        raise InputError(f"{train[0][0].uri}: its categories have no {config.group_by}; set data.group_by to category")
    known = {name for annotations, _ in train for name in category_names(annotations, by=config.group_by)}
    unknown, twice = sorted(set(names) - known), sorted({name for name in names if names.count(name) > 1})
    if unknown or twice:
        problem = f"no dataset has {', '.join(unknown)}" if unknown else f"{', '.join(twice)} stands twice"
        raise ConfigError(f"data.categories: {problem}; known are {', '.join(sorted(known)[:10])}")
    labels = {name: index for index, name in enumerate(names, start=1)}
    images = [
        image
        for annotations, folder in train
        for image in _labelled(regroup(annotations, labels, by=config.group_by), folder)
        if image.annotations or config.keep_empty
    ]
    if not any(image.annotations for image in images):
        raise InputError(f"data.train: no image has an annotation of {', '.join(names)}")
    validation = [_read_dataset(dataset, clip=False) for dataset in config.validation]
    problems = [
        f"{annotations.uri}: {line}"
        for annotations, _ in train + validation
        for line in describe_problems(annotations.problems)
    ]
    measured = tuple((regroup(annotations, labels, by=config.group_by), folder) for annotations, folder in validation)
    return LabelledData({index: name for name, index in labels.items()}, tuple(images), measured, tuple(problems))


def _read_dataset(config: DatasetConfig, *, clip: bool) -> tuple[Annotations, Location]:
    """Return a dataset, reduced to the images that `only` names, and the folder of its images."""
    place = locate(config.annotations)
    annotations = read_annotations(place, clip=clip)
    if config.only is not None:
        annotations = _reduced(annotations, _read_names(config.only), config.only)
    beside = place.parent / "images"
    folder = locate(config.images) if config.images != "auto" else beside if list_names(beside) else place.parent
    there = _names_below(folder)
    missing = [image["file_name"] for image in annotations.images.values() if image["file_name"] not in there]
    if missing:
        raise InputError(
            f"{place.uri}: {len(missing):,} of its {len(annotations.images):,} images are not in {folder.uri}, the "
            f"first is {missing[0]}; give their folder as `images`"
        )
    return annotations, folder


def _names_below(folder: Location) -> set[str]:
    try:
        return {file.name for file in list_files(folder)}
    except FileNotFoundError:
        return set()


def _reduced(annotations: Annotations, names: Sequence[str], source: str) -> Annotations:
    wanted = set(names)
    strangers = wanted - {str(image["file_name"]) for image in annotations.images.values()}
    if strangers and len(strangers) < len(wanted):
        raise InputError(
            f"{source}: {len(strangers):,} of its names, such as {min(strangers)}, are not in {annotations.uri}"
        )
    images = {index: image for index, image in annotations.images.items() if image["file_name"] in wanted}
    if not images:
        raise InputError(f"{source}: names no image of {annotations.uri}")
    kept = [annotation for annotation in annotations.annotations if annotation["image_id"] in images]
    return Annotations(annotations.uri, images, annotations.categories, kept, annotations.problems, annotations.info)


def _read_names(source: str) -> list[str]:
    uri, _, key = source.partition("#")
    try:
        content = json.loads(read_bytes(locate(uri)))
    except FileNotFoundError:
        raise InputError(f"data: there is no file at {uri}") from None
    except ValueError:
        raise InputError(f"data: {uri} is no JSON") from None
    names = content.get(key) if key and isinstance(content, dict) else content
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"data: {source} is no list of file names; write FILE.json, or FILE.json#key for one of several"
        )
    return names


def _labelled(annotations: Annotations, folder: Location) -> list[LabelledImage]:
    return [
        LabelledImage(
            folder / str(annotations.images[image_id]["file_name"]),
            int(annotations.images[image_id]["height"]),
            int(annotations.images[image_id]["width"]),
            tuple(annotation for annotation in found if not annotation["iscrowd"]),
        )
        for image_id, found in annotations.by_image().items()
    ]


def _as_tensors(one: LabelledImage, pixels: Any) -> tuple[tv_tensors.Image, Target]:  # noqa: ANN401  # numpy uint8
    size = (one.height, one.width)
    masks = [
        decode_segmentation(annotation["segmentation"], height=one.height, width=one.width)
        for annotation in one.annotations
    ]
    boxes = [
        (x, y, x + width, y + height) for x, y, width, height in (annotation["bbox"] for annotation in one.annotations)
    ]
    stacked = np.stack(masks) if masks else np.zeros((0, *size), np.uint8)
    target: Target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), format="XYXY", canvas_size=size
        ),
        "labels": torch.tensor([annotation["category_id"] for annotation in one.annotations], dtype=torch.int64),
        "masks": tv_tensors.Mask(torch.from_numpy(stacked)),
    }
    return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1)), target
