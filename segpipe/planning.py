"""What is left to do: the listing of the input, minus what is committed. Listings and receipts only, never images."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from segpipe.errors import OutputError
from segpipe.keylists import KeyList, read_keys
from segpipe.layout import chunk_name
from segpipe.records import ChunkId, ListedImage, Receipt, Shard
from segpipe.request import Request
from segpipe.retries import find_failed
from segpipe.runs import RunRecord, read_receipts, read_run
from segpipe.shards import sample_image_bytes
from segpipe.shards.work import ListedWork, StreamWork, Work
from segpipe.stages.read import chunk_version

# A chunk holds 1/256 of the input, but never so little that its commit costs more than its inference, and never so
# much that it is heavy in memory.
_CHUNKS_PER_INPUT = 256
_LEAST_CHUNK_IMAGES = 4
_MOST_CHUNK_IMAGES = 1024
_MOST_CHUNK_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """What is left to do, and what is done.

    Attributes:
        request: what is asked for.
        record: run.json of earlier starts; None for a new run.
        chunk_images: images a chunk, as the run was created with.
        receipts: of committed chunks, by chunk name, those to be redone included, obsolete ones not.
        work: what to read, in order.
        keys: written list of a listed input, with the additions of this start.
        changed_keys: images whose line in that list is new.
        replaced: what was replaced since it was read, in words; not empty only where that is to be refused.
        obsolete: receipts of chunks beyond the end of a refreshed shard that is shorter now.
        lost_shards: shards that are gone from the input before they were read to their end.
        image_bytes: encoded size of a typical image.
        retries: chunk name to the image_ids that are to be segmented again, of committed chunks.
    """

    request: Request
    record: RunRecord | None
    chunk_images: int
    receipts: Mapping[str, Receipt]
    work: tuple[Work, ...]
    keys: KeyList = field(default_factory=KeyList)
    changed_keys: tuple[ListedImage, ...] = ()
    replaced: tuple[str, ...] = ()
    obsolete: tuple[Receipt, ...] = ()
    lost_shards: tuple[str, ...] = ()
    image_bytes: int = 1
    retries: Mapping[str, frozenset[str]] = field(default_factory=dict)


def make_plan(
    request: Request, *, limit: int | None = None, refresh: bool = False, retry_where: str | None = None
) -> Plan:
    """Find the chunks that are missing.

    Args:
        request: checked request.
        limit: look at the first images only; exact for a folder or manifest that is new, else whole chunks.
        refresh: redo what was replaced since it was read, instead of listing it in `replaced`.
        retry_where: segment failed images again, those that this SQL condition picks; None leaves them.

    Raises:
        ConfigError: if the condition is none.
        OutputError: if the run's name belongs to other settings, or its files are unreadable.
        StoreError: if the store does not answer.
    """
    record = read_run(request.layout)
    if record is not None:
        _refuse_other_settings(record, request)
    receipts = read_receipts(request.layout)
    _refuse_gaps(record, receipts, request)
    image_bytes = sample_image_bytes(request.listing, request.config.input)
    chunk_images = record.chunk_images if record is not None else choose_chunk_images(request, image_bytes)
    retries = {} if retry_where is None else find_failed(request.layout, receipts, retry_where)
    plan = Plan(request, record, chunk_images, receipts, (), image_bytes=image_bytes, retries=retries)
    if request.listing.is_streamed:
        return _plan_streams(plan, refresh=refresh)
    return _plan_listed(plan, limit=limit, refresh=refresh)


def choose_chunk_images(request: Request, image_bytes: int) -> int:
    """Return the images a chunk of a new run: as configured, or grown with the input."""
    asked = request.config.input.chunk_images
    if asked != "auto":
        return asked
    listing = request.listing
    sizes = [shard.version.size_bytes or 0 for shard in listing.shards]
    num_images = len(listing.images) or sum(sizes) // image_bytes
    most = max(_LEAST_CHUNK_IMAGES, min(_MOST_CHUNK_IMAGES, _MOST_CHUNK_BYTES // image_bytes))
    return min(max(num_images // _CHUNKS_PER_INPUT, _LEAST_CHUNK_IMAGES), most)


def expect_images(plan: Plan, ends: Mapping[str, Receipt]) -> tuple[int, bool]:
    """Return the images of the whole input, and whether that is a guess from bytes.

    Args:
        plan: with the listing.
        ends: shard name to the receipt of its last chunk, for shards that were read to their end.
    """
    listing = plan.request.listing
    if not listing.is_streamed:
        return max(len(listing.images), len(plan.keys.images)), False
    sizes = {shard.name: shard.version.size_bytes or 0 for shard in listing.shards}
    read_images = sum(receipt.shard_num_images or 0 for receipt in ends.values())
    read_bytes = sum(sizes.get(name, 0) for name in ends)
    unread_bytes = sum(size for name, size in sizes.items() if name not in ends)
    image_bytes = read_bytes / read_images if read_images and read_bytes else plan.image_bytes
    return read_images + round(unread_bytes / image_bytes), not sizes.keys() <= ends.keys()


def find_ends(receipts: Iterable[Receipt]) -> dict[str, Receipt]:
    """Return the receipt of the last chunk of each shard that was read to its end."""
    return {receipt.chunk.shard: receipt for receipt in receipts if receipt.shard_num_images is not None}


def find_obsolete(plan: Plan, receipts: Mapping[str, Receipt]) -> tuple[Receipt, ...]:
    """Return the receipts of chunks that a refreshed, now shorter shard no longer has."""
    return (
        _plan_streams(replace(plan, receipts=receipts, retries={}), refresh=True).obsolete
        if plan.request.listing.is_streamed
        else ()
    )


def is_complete(plan: Plan, receipts: Mapping[str, Receipt]) -> bool:
    """Tell whether every image of the listed input is committed at its present version."""
    if plan.lost_shards:
        return False
    if not plan.request.listing.is_streamed:
        listed = {image.key for image in plan.request.listing.images}
        chunks = _listed_chunks(plan.request, plan.keys)
        return listed <= plan.keys.images.keys() and all(_stands(chunk, receipts) for chunk, _ in chunks)
    return not _plan_streams(replace(plan, receipts=receipts, retries={}), refresh=True).work


def _refuse_gaps(record: RunRecord | None, receipts: Mapping[str, Receipt], request: Request) -> None:
    """Refuse a run whose own notes are gone: how its input was cut is known from them alone.

    Raises:
        OutputError: if there are committed chunks without run.json, or chunks that its written list of keys has not.
    """
    if not receipts:
        return
    layout, problem = request.layout, ""
    if record is None:
        problem = f"{layout.run_file.uri} is missing"
    elif not request.listing.is_streamed:
        num_chunks = read_keys(layout, request.listing.root).num_chunks
        beyond = [receipt for receipt in receipts.values() if receipt.chunk.index >= num_chunks]
        problem = f"{layout.keys_folder.uri} lacks chunk {beyond[0].chunk.index}" if beyond else ""
    if problem:
        raise OutputError(
            f"output.uri: {layout.output.uri} has {len(receipts):,} committed chunks of {layout.run_id}, but "
            f"{problem}, so nobody knows how they were cut; restore it, or name another run with output.run_id"
        )


def _refuse_other_settings(record: RunRecord, request: Request) -> None:
    if record.fingerprint == request.label.fingerprint:
        return
    wanted = {key: value for key, value in request.settings.items() if record.settings.get(key) != value}
    differences = "; ".join(
        f"{key} is {record.settings.get(key)!r} there, {value!r} here" for key, value in wanted.items()
    )
    raise OutputError(
        f"output.run_id: {record.run_id} was made with other settings ({differences or 'or by another version'}); "
        f"choose another run_id, or leave it out"
    )


# ---------------------------------------------------------------- streamed inputs: tar, Parquet
def _plan_streams(plan: Plan, *, refresh: bool) -> Plan:
    by_shard: dict[str, list[Receipt]] = defaultdict(list)
    for receipt in plan.receipts.values():
        by_shard[receipt.chunk.shard].append(receipt)
    work: list[Work] = []
    replaced: list[str] = []
    obsolete: list[Receipt] = []
    for shard in plan.request.listing.shards:
        receipts = by_shard.pop(shard.name, [])
        version = str(shard.version)
        current = [receipt for receipt in receipts if receipt.chunk.version == version]
        end = next((receipt.chunk.index for receipt in current if receipt.shard_num_images is not None), None)
        again = [receipt for receipt in current if receipt.chunk.name in plan.retries]
        done = frozenset(receipt.chunk.index for receipt in current if receipt not in again)
        # Beyond the end of a shard that was refreshed and is shorter now there is nothing to redo, only to remove.
        beyond = [receipt for receipt in receipts if end is not None and receipt.chunk.index > end]
        obsolete += beyond
        stale = [receipt for receipt in receipts if receipt.chunk.version != version and receipt not in beyond]
        if stale and not refresh:
            replaced.append(f"{shard.name} was {stale[0].chunk.version}, is {shard.version}")
        elif end is None or done != frozenset(range(end + 1)):
            work.append(_stream_work(plan, shard, done, [*stale, *again]))
    lost = [
        name for name, receipts in by_shard.items() if all(receipt.shard_num_images is None for receipt in receipts)
    ]
    gone_names = {receipt.chunk.name for receipt in obsolete}
    return replace(
        plan,
        receipts={name: receipt for name, receipt in plan.receipts.items() if name not in gone_names},
        work=tuple(work),
        replaced=tuple(replaced),
        obsolete=tuple(obsolete),
        lost_shards=tuple(sorted(lost)),
    )


def _stream_work(plan: Plan, shard: Shard, done: frozenset[int], stale: Sequence[Receipt]) -> StreamWork:
    listing, config = plan.request.listing, plan.request.config.input
    generations = {receipt.chunk.index: receipt.chunk.generation + 1 for receipt in stale}
    retries = {
        receipt.chunk.index: plan.retries[receipt.chunk.name] for receipt in stale if receipt.chunk.name in plan.retries
    }
    return StreamWork(shard, listing.kind, config, plan.chunk_images, done, generations, retries=retries)


# ---------------------------------------------------------------- listed inputs: folder, manifest
def _plan_listed(plan: Plan, *, limit: int | None, refresh: bool) -> Plan:
    request = plan.request
    known = read_keys(request.layout, request.listing.root)
    new = [image for image in request.listing.images if image.key not in known.images]
    if limit is not None:
        new = new[: max(0, limit - len(known.images))]
    changed = [
        image
        for image in request.listing.images
        if image.key in known.images and image.version != known.images[image.key].version
    ]
    committed = {chunk.index for chunk, _ in _listed_chunks(request, known) if _stands(chunk, plan.receipts)}
    is_refused = {image.key: not refresh and known.chunk_of[image.key] in committed for image in changed}
    refused = [image for image in changed if is_refused[image.key]]
    updated = [image for image in changed if not is_refused[image.key]]
    keys = known.extended(new, updated, chunk_images=plan.chunk_images)
    work: list[Work] = []
    num_images = 0
    for chunk, images in _listed_chunks(request, keys):
        if limit is not None and num_images >= limit:
            break
        num_images += len(images)
        stands, retry = _stands(chunk, plan.receipts), plan.retries.get(chunk.name)
        if not stands or retry:
            receipt = plan.receipts.get(chunk.name)
            redone = replace(chunk, generation=receipt.chunk.generation + 1 if receipt else 1)
            max_bytes = request.config.input.max_bytes
            work.append(ListedWork(redone, images, max_bytes, retry if stands else None))
    return replace(
        plan,
        work=tuple(work),
        keys=keys,
        changed_keys=(*new, *updated),
        replaced=tuple(f"{image.key} was {known.images[image.key].version}, is {image.version}" for image in refused),
    )


def _listed_chunks(request: Request, keys: KeyList) -> list[tuple[ChunkId, tuple[ListedImage, ...]]]:
    shard = request.listing.shard_name
    return [
        (ChunkId(chunk_name(shard, index), shard, index, 1, chunk_version(images)), images)
        for index, images in enumerate(keys.chunks())
    ]


def _stands(chunk: ChunkId, receipts: Mapping[str, Receipt]) -> bool:
    receipt = receipts.get(chunk.name)
    return receipt is not None and receipt.chunk.version == chunk.version
