"""What category ids mean: COCO's 91-space as torchvision numbers it, and how names given by a user become ids."""

import difflib
from collections.abc import Iterable, Mapping

from segpipe.errors import ConfigError

COCO_SPACE = "coco91"
OWN_SPACE = "own"

# The 80 names of COCO 2017 (cocodataset.org), at the ids that COCO annotations and torchvision use.
COCO_NAMES: Mapping[int, str] = {
    1: "person", 2: "bicycle", 3: "car", 4: "motorcycle", 5: "airplane", 6: "bus", 7: "train", 8: "truck", 9: "boat",
    10: "traffic light", 11: "fire hydrant", 13: "stop sign", 14: "parking meter", 15: "bench", 16: "bird", 17: "cat",
    18: "dog", 19: "horse", 20: "sheep", 21: "cow", 22: "elephant", 23: "bear", 24: "zebra", 25: "giraffe",
    27: "backpack", 28: "umbrella", 31: "handbag", 32: "tie", 33: "suitcase", 34: "frisbee", 35: "skis",
    36: "snowboard", 37: "sports ball", 38: "kite", 39: "baseball bat", 40: "baseball glove", 41: "skateboard",
    42: "surfboard", 43: "tennis racket", 44: "bottle", 46: "wine glass", 47: "cup", 48: "fork", 49: "knife",
    50: "spoon", 51: "bowl", 52: "banana", 53: "apple", 54: "sandwich", 55: "orange", 56: "broccoli", 57: "carrot",
    58: "hot dog", 59: "pizza", 60: "donut", 61: "cake", 62: "chair", 63: "couch", 64: "potted plant", 65: "bed",
    67: "dining table", 70: "toilet", 72: "tv", 73: "laptop", 74: "mouse", 75: "remote", 76: "keyboard",
    77: "cell phone", 78: "microwave", 79: "oven", 80: "toaster", 81: "sink", 82: "refrigerator", 84: "book",
    85: "clock", 86: "vase", 87: "scissors", 88: "teddy bear", 89: "hair drier", 90: "toothbrush",
}  # fmt: skip
COCO_NUM_CLASSES = 91


def coco_categories() -> dict[int, str]:
    """Return all 90 ids that a COCO model can emit; the ten that COCO never used are called `unused 12` and so on."""
    return {index: COCO_NAMES.get(index, f"unused {index}") for index in range(1, COCO_NUM_CLASSES)}


def contiguous_ids(names: Iterable[int]) -> dict[int, int]:
    """Return each category id's 0-based rank."""
    return {category_id: rank for rank, category_id in enumerate(sorted(names))}


def find_category(wanted: str | int, categories: Mapping[int, str], *, key: str) -> int:
    """Return the id that a user's name or number stands for.

    Args:
        wanted: category name or id.
        categories: id to name.
        key: the setting it stands in, for the message.

    Raises:
        ConfigError: if the model has no such category; names the nearest.
    """
    if isinstance(wanted, int) or wanted.isdigit():
        if int(wanted) in categories:
            return int(wanted)
    else:
        by_name = {name: category_id for category_id, name in categories.items()}
        if wanted in by_name:
            return by_name[wanted]
    close = difflib.get_close_matches(str(wanted), categories.values(), n=1, cutoff=0.5)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    known = ", ".join(f"{name} ({category_id})" for category_id, name in list(categories.items())[:12])
    more = f" and {len(categories) - 12} more" if len(categories) > 12 else ""
    raise ConfigError(f"{key}: the model has no category {wanted!r}.{hint} It knows {known}{more}.")
