"""Whether single rows say what they may say: every column in its range, and columns that agree with each other."""

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from segpipe.masks.rle import find_problem
from segpipe.records import Receipt
from segpipe.shards.keys import UniqueKeys

_BOX = ("bbox_x", "bbox_y", "bbox_w", "bbox_h")
_FAILURE = ("error_stage", "error_type", "error_message")
_SHA256 = re.compile("(?:[0-9a-f]{64})?")  # empty where no bytes were read


@dataclass
class Findings:
    """Collects problems while the files of a run are read."""

    problems: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    image_ids: UniqueKeys = field(default_factory=UniqueKeys)
    fingerprints: dict[str, str] = field(default_factory=dict)
    num_images: int = 0
    num_instances: int = 0

    def add(self, promise: str, text: str) -> None:
        """Note a problem."""
        self.problems[promise].append(text)


def check_images(name: str, images: pa.Table, receipt: Receipt, findings: Findings) -> None:
    """Check the rows of one images file.

    Args:
        name: of the file, for messages.
        images: its rows.
        receipt: in its metadata.
        findings: take up what is wrong.
    """
    rows = images.to_pylist()
    findings.num_images += len(rows)
    counted = (
        len(rows),
        sum(row["status"] == "failed" for row in rows),
        sum(row["num_instances"] for row in rows),
        sum(row["instances_capped"] for row in rows),
    )
    written = (receipt.num_images, receipt.num_failed, receipt.num_instances, receipt.num_capped)
    if counted != written:
        findings.add("receipts", f"{name}: images, failed, instances, capped are {counted}, receipt says {written}")
    for row in rows:
        if findings.image_ids.add(row["image_id"]) != row["image_id"]:
            findings.add("images", f"{name}: image_id {row['image_id']!r} stands twice in the run")
        problem = _image_problem(row, receipt)
        if problem is not None:
            findings.add("images", f"{name}: {row['image_id']!r} {problem}")


def check_instances(
    name: str, images: pa.Table, instances: pa.Table, categories: Mapping[int, str], findings: Findings
) -> None:
    """Check the rows of one instances file.

    Args:
        name: of the file, for messages.
        images: rows of the images file whose receipt names it.
        instances: its rows.
        categories: of the run, id to name.
        findings: take up what is wrong.
    """
    findings.num_instances += instances.num_rows
    rows_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in instances.to_pylist():
        rows_of[row["image_id"]].append(row)
        problem = find_problem(row["rle_counts"], height=row["height"], width=row["width"], area=row["area"])
        if problem is not None:
            findings.add("masks", f"{name}: {row['image_id']!r} instance {row['instance_id']}: {problem}")
        if categories.get(row["category_id"]) != row["category"]:
            text = f"category {row['category_id']} is not {row['category']!r}"
            findings.add("instances", f"{name}: {row['image_id']!r}: {text}")
        box = np.array([row[side] for side in _BOX])
        if not np.isfinite(box).all() or (box[2:] < 0).any():
            findings.add(
                "instances", f"{name}: {row['image_id']!r} instance {row['instance_id']}: box is {box.tolist()}"
            )
    expected = {row["image_id"]: row for row in images.to_pylist()}
    for image_id in sorted(rows_of.keys() - expected.keys()):
        findings.add("instances", f"{name}: {image_id!r} has instances but is no image of this chunk")
    for image_id, image in expected.items():
        rows, count = rows_of.get(image_id, []), image["num_instances"]
        if [row["instance_id"] for row in rows] != list(range(count)):
            text = f"has {len(rows)} rows for {count} instances, or misnumbered"
            findings.add("instances", f"{name}: {image_id!r} {text}")
        scores = np.array([row["score"] for row in rows], dtype=np.float32)
        if not ((scores >= 0) & (scores <= 1)).all() or (np.diff(scores) > 0).any():
            findings.add("instances", f"{name}: {image_id!r}: scores do not fall, or leave 0 to 1")
        if any((row["height"], row["width"]) != (image["height"], image["width"]) for row in rows):
            findings.add("masks", f"{name}: {image_id!r}: masks have another frame than the image")


def _image_problem(row: Mapping[str, Any], receipt: Receipt) -> str | None:
    """Say what is wrong with one row of `images`; None if nothing is."""
    failed, why = row["status"] == "failed", [row[name] for name in _FAILURE]
    kept, candidates = row["num_instances"], row["num_candidates"]
    own_name = row["key"] if row["shard"] == "." else f"{row['shard']}/{row['key']}"
    named = re.fullmatch(re.escape(own_name) + r"(#\d+)?|.*#read", row["image_id"], re.DOTALL)
    checks = (
        (
            row["status"] in ("ok", "failed") and all((text is not None) == failed for text in why),
            f"has status {row['status']!r}, error {why}",
        ),
        (not (failed and kept), f"failed and has {kept} instances"),
        (kept <= candidates, f"has {kept} instances of {candidates} candidates"),
        (
            (kept < candidates) == row["instances_capped"],
            f"has {kept} of {candidates} candidates, capped {row['instances_capped']}",
        ),
        (row["shard"] == receipt.chunk.shard, f"is of shard {row['shard']!r}, its chunk of {receipt.chunk.shard!r}"),
        (named, f"is called otherwise than its shard {row['shard']!r} and key {row['key']!r}"),
        (
            _SHA256.fullmatch(row["sha256"]) and row["byte_size"] >= 0,
            f"has sha256 {row['sha256']!r} and {row['byte_size']} bytes",
        ),
    )
    return next((text for holds, text in checks if not holds), None)
