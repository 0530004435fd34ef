"""How training images are varied: torchvision's transforms, put together as its detection references do."""

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from segpipe.finetuning.settings import AugmentationConfig

# ImageNet's mean colour: what lies outside an image is nothing in particular.
_GREY = (124, 116, 104)


class Augment:
    """Varies an image and its instances alike."""

    def __init__(self, config: AugmentationConfig) -> None:
        self._min_visible = config.min_visible
        self._size = (config.crop_size, config.crop_size)
        self._scale = tuple(config.scale)
        self._flip = v2.RandomHorizontalFlip(config.flip)
        self._photometric = v2.RandomPhotometricDistort(p=config.photometric)
        self._to_float = v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)

    def __call__(self, image: tv_tensors.Image, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the image as (3, H, W) float32 in [0, 1], and boxes, labels and masks of what is still in it.

        Args:
            image: (3, H, W) uint8.
            target: `boxes` (N, 4) xyxy px, `labels` (N,), `masks` (N, H, W) uint8.
        """
        image, target = self._flip(self._photometric(image), target)
        if self._scale:
            image, target = self._zoom(image, target)
        tensors = {key: value.as_subclass(Tensor) for key, value in target.items()}
        return self._to_float(image).as_subclass(Tensor), _without_empty(tensors)

    def _zoom(self, image: tv_tensors.Image, target: dict[str, Tensor]) -> tuple[tv_tensors.Image, dict[str, Tensor]]:
        """Scale, cut, fill up; drop what the cut left too little of, and draw boxes anew around what it left."""
        image, target = v2.ScaleJitter(self._size, self._scale)(image, target)
        before = target["masks"].flatten(1).sum(1)
        image, target = v2.RandomCrop(self._size, pad_if_needed=True, fill={tv_tensors.Image: _GREY, "others": 0})(
            image, target
        )
        masks = target["masks"].as_subclass(Tensor)
        after = masks.flatten(1).sum(1)
        kept = (after > 0) & (after >= self._min_visible * before)
        boxes = masks_to_boxes(masks[kept]) + torch.tensor([0.0, 0.0, 1.0, 1.0])  # its ends are inclusive
        return image, {"boxes": boxes, "labels": target["labels"][kept], "masks": masks[kept]}


def _without_empty(target: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop instances without a pixel or with a box of no area, which the losses cannot take."""
    boxes = target["boxes"]
    kept = (target["masks"].flatten(1).sum(1) > 0) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    return {key: value[kept] for key, value in target.items()}
