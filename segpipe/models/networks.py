"""The networks, built with torchvision parts, without weights: what a checkpoint's architecture name stands for."""

import json
from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torchvision
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN, _resnet_fpn_extractor
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops.misc import FrozenBatchNorm2d

from segpipe.errors import WeightsError


class Builder(Protocol):
    """Builds a network without weights."""

    def __call__(self, num_classes: int, *, batch_norm: bool) -> MaskRCNN:
        """Return the network; `batch_norm` is live in the backbone, else frozen."""
        ...


def expected_shapes(model_name: str, num_classes: int, *, batch_norm: bool) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a network's tensors, without allocating them."""
    with torch.device("meta"):
        model = BUILDERS[model_name](num_classes, batch_norm=batch_norm)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def build_resnet50_fpn(num_classes: int, *, batch_norm: bool) -> MaskRCNN:
    """Build v1; its trained weights have frozen batch norm, which an untrained model of torchvision has not."""
    if batch_norm:
        return torchvision.models.detection.maskrcnn_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=num_classes
        )
    body = torchvision.models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    backbone = _resnet_fpn_extractor(body, trainable_layers=3)
    return MaskRCNN(backbone, num_classes=num_classes)


def build_resnet50_fpn_v2(num_classes: int, *, batch_norm: bool) -> MaskRCNN:  # noqa: ARG001  # v2 always has live ones
    """Build v2."""
    return torchvision.models.detection.maskrcnn_resnet50_fpn_v2(
        weights=None, weights_backbone=None, num_classes=num_classes
    )


def build_mobilenet_v2_fpn(num_classes: int, *, batch_norm: bool) -> MaskRCNN:
    """Build the small network, which is also the demo's: MobileNetV2, 64-channel FPN, 3.43 M parameters, 320 px."""
    channels, head = 64, 256
    norm: Callable[..., nn.Module] = nn.BatchNorm2d if batch_norm else FrozenBatchNorm2d
    features = torchvision.models.mobilenet_v2(norm_layer=norm).features
    stages = {"3": "0", "6": "1", "13": "2", "18": "3"}
    anchors = AnchorGenerator(tuple((size,) for size in (20, 40, 80, 160, 300)), ((0.5, 1.0, 2.0),) * 5)
    return MaskRCNN(
        BackboneWithFPN(features, stages, [24, 32, 96, 1280], channels),
        rpn_anchor_generator=anchors,
        min_size=320,
        max_size=512,
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=128,
        box_head=TwoMLPHead(channels * 49, head),
        box_predictor=FastRCNNPredictor(head, num_classes),
        mask_head=MaskRCNNHeads(channels, (64, 64), 1),
        mask_predictor=MaskRCNNPredictor(64, 64, num_classes),
    )


BUILDERS: Mapping[str, Builder] = {
    "maskrcnn_resnet50_fpn": build_resnet50_fpn,
    "maskrcnn_resnet50_fpn_v2": build_resnet50_fpn_v2,
    "maskrcnn_mobilenet_v2_fpn": build_mobilenet_v2_fpn,
    "demo": build_mobilenet_v2_fpn,
}


def preprocessing_of(model: MaskRCNN) -> str:
    """Return how a network resizes and normalises images, as JSON for a checkpoint's metadata."""
    transform = model.transform
    return json.dumps(
        {
            "min_size": transform.min_size[-1],
            "max_size": transform.max_size,
            "image_mean": list(transform.image_mean),
            "image_std": list(transform.image_std),
        }
    )


def apply_preprocessing(model: MaskRCNN, text: str | None) -> None:
    """Make a network resize and normalise as its checkpoint says; None leaves it as it was built.

    Raises:
        WeightsError: if the text is no JSON of this kind.
    """
    if text is None:
        return
    try:
        values = json.loads(text)
        min_size, max_size = int(values["min_size"]), int(values["max_size"])
        mean, std = [float(part) for part in values["image_mean"]], [float(part) for part in values["image_std"]]
        if not 0 < min_size <= max_size or len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(text)
    except (ValueError, KeyError, TypeError):
        raise WeightsError(f"model.weights: the checkpoint's preprocessing cannot be used: {text[:200]}") from None
    model.transform.min_size, model.transform.max_size = (min_size,), max_size
    model.transform.image_mean, model.transform.image_std = mean, std
