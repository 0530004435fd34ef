"""The commit stage: two Parquet files, the images file last. A chunk is done when its images file exists."""

import hashlib
import time

import pyarrow.compute as pc

from segpipe.errors import StoreError
from segpipe.layout import RunLayout, instances_name
from segpipe.records import Committed, Fault, Receipt, SegmentedChunk
from segpipe.storage import delete, write_bytes
from segpipe.tables import RunLabel, write_table


def commit_chunk(chunk: SegmentedChunk | Fault, *, layout: RunLayout, label: RunLabel) -> Committed | Fault:
    """Write a chunk's rows: instances, then images with the receipt, then drop the generation that was replaced.

    Killed anywhere in between, the receipt decides: without it, the instances file is an orphan and the chunk is
    pending; with it, the chunk is done. Writing the same chunk again gives the same bytes.

    Args:
        chunk: rows of one chunk.
        layout: places of the run.
        label: what the files say about the run.

    Returns:
        What was committed, or the fault of the store, or the fault that came in.
    """
    if isinstance(chunk, Fault):
        return chunk
    started = time.perf_counter()
    try:
        receipt = _write(chunk, layout, label)
    except StoreError as error:
        return Fault(chunk.id.name, "commit", str(error))
    return Committed(receipt, {**chunk.seconds, "commit": time.perf_counter() - started})


def _write(chunk: SegmentedChunk, layout: RunLayout, label: RunLabel) -> Receipt:
    instances = write_table(chunk.instances, label)
    images = chunk.images
    receipt = Receipt(
        chunk=chunk.id,
        instances_file=instances_name(chunk.id.name, chunk.id.generation),
        instances_sha256=hashlib.sha256(instances).hexdigest(),
        num_images=images.num_rows,
        num_failed=pc.sum(pc.equal(images["status"], "failed"), min_count=0).as_py(),
        num_instances=chunk.instances.num_rows,
        num_capped=pc.sum(images["instances_capped"], min_count=0).as_py(),
        shard_num_images=chunk.shard_num_images,
        resolved=chunk.resolved,
    )
    write_bytes(layout.instances_file(chunk.id), instances)
    write_bytes(layout.images_file(chunk.id.name), write_table(images, label, receipt))
    replaced = [instances_name(chunk.id.name, older) for older in range(1, chunk.id.generation)]
    delete([layout.table("instances") / name for name in replaced])
    return receipt
