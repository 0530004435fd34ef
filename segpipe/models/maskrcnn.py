"""torchvision's Mask R-CNN, taken apart at its seams so that nothing is ever pasted to full size.

`prepare` is torchvision's own transform up to the batch; `forward` runs backbone, RPN and RoI heads and keeps the
28 x 28 masks; `decode` scales boxes back and hands the masks on as grids. With the same weights, batch, threads and
dtype, boxes, scores and labels are those of `model([image])` to the last bit.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import maskrcnn_inference
from torchvision.models.detection.transform import resize_boxes

from segpipe.detections import Frame, Prediction, Selection, UInt8Array
from segpipe.errors import ConfigError
from segpipe.masks.roi import roi_grids
from segpipe.models import ModelRequest
from segpipe.models.checkpoints import has_batch_norm
from segpipe.models.networks import BUILDERS, apply_preprocessing
from segpipe.models.weights import read_state

# torchvision sets the epsilon of frozen batch norm to 0 for exactly these weights (mask_rcnn.py, overwrite_eps).
_ZERO_EPSILON_SHA256_PREFIX = "bf2d0c1e"
_KEEP_ALL = 1_000_000
_GPU_BATCH = 4


@dataclass(frozen=True, slots=True)
class RawDetections:
    """What the network says about one image, on the device, in pixels of the resized image.

    Attributes:
        boxes: (N, 4) xyxy.
        scores: (N,).
        labels: (N,).
        mask_probs: (N, 28, 28) of each one's own category.
        num_candidates: detections over the floors, before max_instances.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    mask_probs: Tensor
    num_candidates: int


class MaskRcnnSegmenter:
    """A loaded Mask R-CNN. See `segpipe.models.Segmenter` for the seam."""

    def __init__(
        self, model: MaskRCNN, selection: Selection, *, device: str, dtype: torch.dtype, batch_size: int
    ) -> None:
        num_classes = model.roi_heads.box_predictor.cls_score.out_features
        floors = torch.from_numpy(selection.floors(num_classes))
        # Candidates under every floor need not enter NMS: a weaker box never suppresses a stronger one.
        model.roi_heads.score_thresh = float(floors.min())
        model.roi_heads.detections_per_img = _KEEP_ALL
        self._model = model.eval().to(device)
        self._floors = floors.to(device)
        self._selection = selection
        self._device = device
        self._dtype = dtype
        self.batch_size = batch_size
        self.resolved: Mapping[str, str] = {"device": device, "dtype": str(dtype).removeprefix("torch.")}

    def prepare(self, image: UInt8Array) -> tuple[Tensor, Frame]:
        """Return the normalised, resized image as (3, h, w) float32, and its frame."""
        transform = self._model.transform
        unit = torch.from_numpy(image).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
        with torch.inference_mode():
            resized, _ = transform.resize(transform.normalize(unit))
        height, width = (int(size) for size in resized.shape[-2:])
        stride = transform.size_divisible
        padded = (-(-height // stride) * stride, -(-width // stride) * stride)
        return resized, Frame((image.shape[0], image.shape[1]), (height, width), padded)

    def forward(self, pixels: Sequence[Tensor], frames: Sequence[Frame]) -> list[RawDetections]:
        """Run the network; only selected boxes reach the mask head."""
        sizes = [frame.resized_hw for frame in frames]
        with torch.inference_mode(), self._autocast():
            batch = self._model.transform.batch_images(list(pixels), self._model.transform.size_divisible)
            images = ImageList(batch.to(self._device), sizes)
            features = self._model.backbone(images.tensors)
            proposals, _ = self._model.rpn(images, features)
            boxes, scores, labels, counts = self._detect(features, proposals, sizes)
            probs = self._mask_probs(features, boxes, labels, sizes)
        return [RawDetections(*parts) for parts in zip(boxes, scores, labels, probs, counts, strict=True)]

    def decode(self, raw: Sequence[RawDetections], frames: Sequence[Frame]) -> list[Prediction]:
        """Scale boxes to the image and place the masks in it."""
        return [self._decode_one(detections, frame) for detections, frame in zip(raw, frames, strict=True)]

    def _autocast(self) -> AbstractContextManager[object]:
        if self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self._device, dtype=self._dtype)

    def _detect(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], sizes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[int]]:
        """Classify the proposals, and of what NMS leaves keep the wanted categories, then the best by score."""
        heads = self._model.roi_heads
        pooled = heads.box_head(heads.box_roi_pool(features, proposals, sizes))
        logits, regression = heads.box_predictor(pooled)
        all_boxes, all_scores, all_labels = heads.postprocess_detections(logits, regression, proposals, sizes)
        boxes, scores, labels, counts = [], [], [], []
        for image_boxes, image_scores, image_labels in zip(all_boxes, all_scores, all_labels, strict=True):
            candidates = torch.where(image_scores > self._floors[image_labels])[0]
            kept = candidates[: self._selection.max_instances]  # NMS returns them by falling score
            boxes.append(image_boxes[kept])
            scores.append(image_scores[kept])
            labels.append(image_labels[kept])
            counts.append(len(candidates))
        return boxes, scores, labels, counts

    def _mask_probs(
        self, features: Mapping[str, Tensor], boxes: list[Tensor], labels: list[Tensor], sizes: list[tuple[int, int]]
    ) -> list[Tensor]:
        heads = self._model.roi_heads
        pooled = heads.mask_roi_pool(features, boxes, sizes)
        logits = heads.mask_predictor(heads.mask_head(pooled))
        return [probs[:, 0] for probs in maskrcnn_inference(logits, labels)]

    def _decode_one(self, raw: RawDetections, frame: Frame) -> Prediction:
        boxes = resize_boxes(raw.boxes, list(frame.resized_hw), list(frame.image_hw)).float().cpu().numpy()
        probs = raw.mask_probs.float().cpu().numpy()
        return Prediction(
            boxes_xyxy=boxes,
            scores=raw.scores.float().cpu().numpy(),
            category_ids=raw.labels.cpu().numpy(),
            masks=roi_grids(probs, boxes, threshold=self._selection.mask_threshold),
            num_candidates=raw.num_candidates,
        )


def load(request: ModelRequest) -> MaskRcnnSegmenter:
    """Build the network and load its weights.

    Raises:
        WeightsError: if the weights cannot be read or are not the planned ones.
    """
    state, metadata = read_state(request)
    num_classes = max(request.info.categories) + 1
    model = BUILDERS[request.info.name](num_classes, batch_norm=has_batch_norm(state))
    model.load_state_dict(state)
    apply_preprocessing(model, metadata.get("preprocessing"))
    is_first_coco = request.info.name == "maskrcnn_resnet50_fpn" and request.info.weights == "COCO_V1"
    if is_first_coco or request.info.weights_sha256.startswith(_ZERO_EPSILON_SHA256_PREFIX):
        overwrite_eps(model, 0.0)
    device = choose_device(request.device)
    dtype = torch.float32 if request.dtype == "auto" else getattr(torch, request.dtype)
    batch_size = request.batch_size or (_GPU_BATCH if device == "cuda" else 1)
    return MaskRcnnSegmenter(model, request.selection, device=device, dtype=dtype, batch_size=batch_size)


def describe_devices() -> tuple[str, bool]:
    """Return the devices of this machine in words, and whether one is faster than a CPU."""
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return ", ".join(f"{one.name} with {one.total_memory / 1e9:.0f} GB" for one in names), True
    if torch.backends.mps.is_available():
        return "mps", True
    return "no GPU", False


def choose_device(asked: str) -> str:
    """Return the device that `auto` means here: cuda, then mps, then cpu.

    Raises:
        ConfigError: if another one was asked for and is not there.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked != "auto":
        if not available[asked]:
            found = ", ".join(name for name, is_there in available.items() if is_there)
            raise ConfigError(f"model.device: {asked} is not available on this machine; use auto, or one of {found}")
        return asked
    return next(name for name in ("cuda", "mps", "cpu") if available[name])
