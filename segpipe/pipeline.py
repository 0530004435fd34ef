"""The whole flow on one page.

plan      list the input, minus what is committed: listings and receipts only
read      shard to chunks of encoded images
segment   decode, model, RLE, rows
commit    instances file, then images file, which is the receipt
finish    sum receipts, run.json

The engine does the three in the middle, chunk by chunk.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice

from segpipe.attempts import sweep_attempts
from segpipe.config import Config
from segpipe.engines import Job, open_engine
from segpipe.errors import HopelessError, LeaseLostError, OutputError, StoreError
from segpipe.keylists import write_keys
from segpipe.layout import RunLayout
from segpipe.lease import hold_lease
from segpipe.planning import Plan, find_obsolete, is_complete, make_plan
from segpipe.progress import OnProgress, Progress, RunSummary, Tally
from segpipe.records import Receipt
from segpipe.request import Request, check_request
from segpipe.runs import RunRecord, State, distinct_resolved, now, sum_receipts, sweep, versions, write_run
from segpipe.shards.work import StreamWork, Work
from segpipe.storage import delete, write_bytes
from segpipe.tables import categories_table, write_table

# Ray Data keeps metadata for every block, so a large plan is run in waves.
_WAVE = 2000
# Images after which a start is judged by how many of them failed.
_ENOUGH_TO_JUDGE = 200


def run(
    config: Config,
    *,
    limit: int | None = None,
    refresh: bool = False,
    retry_where: str | None = None,
    on_progress: OnProgress = lambda _: None,
) -> RunSummary:
    """Segment every image of an input that is not committed yet, and commit it.

    The same call again resumes: an interrupted one loses the chunks in flight and nothing else.

    Args:
        config: input, model, output, resources.
        limit: only the first images of the input; whole chunks where images are streamed from shards.
        refresh: redo what was replaced in the input since it was read.
        retry_where: segment failed images again, those that this SQL condition over `images` picks: `TRUE` for all,
            or such as `error_type = 'TimedOut'`.
        on_progress: told of every phase and every committed chunk.

    Raises:
        RequestError: if the request is wrong; nothing was started.
        StoreError: if the output cannot be used.
        LeaseLostError: if another driver took the run over.
        HopelessError: if nearly all images fail.
    """
    on_progress(Progress("listing the input"))
    request = check_request(config, lambda text: on_progress(Progress(text)))
    with ExitStack() as stack:
        try:
            lease = stack.enter_context(hold_lease(request.layout.lease_file, lambda text: on_progress(Progress(text))))
        except (StoreError, OSError) as error:
            raise OutputError(f"output.uri: {request.layout.output.uri} cannot be written: {error}") from None
        plan = make_plan(request, limit=limit, refresh=refresh, retry_where=retry_where)
        _refuse_replaced(plan)
        record = _begin(plan)
        tally = Tally(plan, on_progress, limit=limit)
        try:
            if plan.work:
                with open_engine(_job(request), tally.enter) as execute:
                    for wave in _waves(plan, tally, limit):
                        for outcome in execute(wave):
                            lease.check()
                            tally.add(outcome)
                            _refuse_hopeless(tally, config.output.max_failed_share)
            _clean(plan, tally)
        except LeaseLostError:
            raise  # the files are the other driver's now
        except BaseException:
            _write_end(plan, record, tally, "unfinished")
            raise
        state = _end_state(plan, tally)
        _write_end(plan, record, tally, state)
    return tally.summary(state, limited=limit is not None)


def _refuse_replaced(plan: Plan) -> None:
    if plan.replaced:
        shown = "; ".join(plan.replaced[:3]) + (
            f"; and {len(plan.replaced) - 3} more" if len(plan.replaced) > 3 else ""
        )
        raise OutputError(
            f"input.uri: {len(plan.replaced)} of the inputs of this run were replaced since they were read ({shown}); "
            f"--refresh segments exactly these anew"
        )


def _begin(plan: Plan) -> RunRecord:
    """Write down what the run is and which image is in which chunk; remove what an earlier start left behind."""
    request, layout = plan.request, plan.request.layout
    info = request.model.info
    record = RunRecord(
        run_id=layout.run_id,
        state="running",
        fingerprint=request.label.fingerprint,
        settings=dict(request.settings),
        kind=request.listing.kind,
        input_root=request.listing.root.uri,
        chunk_images=plan.chunk_images,
        model={
            "name": info.name,
            "weights": info.weights,
            "weights_sha256": info.weights_sha256,
            "category_space": info.category_space,
            "licence": info.licence,
        },
        versions=versions(),
        created_at=plan.record.created_at if plan.record else now(),
        updated_at=now(),
        num_starts=(plan.record.num_starts if plan.record else 0) + 1,
        totals=sum_receipts(plan.receipts.values()),
        seconds=plan.record.seconds if plan.record else {},
    )
    write_run(layout, record)
    write_keys(layout, plan.keys, plan.changed_keys)
    write_bytes(layout.categories_file, write_table(categories_table(info), request.label))
    _remove(layout, plan.obsolete, plan.receipts)
    return record


def _job(request: Request) -> Job:
    config = request.config
    return Job(
        request=request.model,
        max_pixels=config.input.max_pixels,
        allow_truncated=config.input.allow_truncated,
        layout=request.layout,
        label=request.label,
        resources=config.resources,
    )


def _waves(plan: Plan, tally: Tally, limit: int | None) -> Iterator[Sequence[Work]]:
    """Cut the work into waves; with a limit on streamed shards, only as many as it takes to reach it.

    How many images a shard holds is known when it was read: the first wave is one shard, later ones are sized by it.
    """
    work = iter(plan.work)
    if limit is None or not plan.request.listing.is_streamed:
        while wave := list(islice(work, _WAVE)):
            yield wave
        return
    pending = {item.shard.name: item for item in plan.work if isinstance(item, StreamWork)}
    shards = [shard.name for shard in plan.request.listing.shards]
    position = 0
    while position < len(shards):
        counts = tally.images_by_shard()
        remaining = limit - sum(counts[name] for name in shards[:position])
        if remaining <= 0:
            return
        step = max(1, remaining // max([counts[name] for name in shards[:position]] or [remaining]))
        chosen = [pending[name] for name in shards[position : position + step] if name in pending]
        if chosen:
            max_chunks = -(-remaining // plan.chunk_images)
            yield [replace(item, max_chunks=max_chunks) for item in chosen]
        position += step


def _refuse_hopeless(tally: Tally, allowed: float) -> None:
    """Stop where nearly everything fails: the input is another one than was meant, and more of it helps nobody.

    Raises:
        HopelessError: if at least 200 images of this start were tried, and more than half of what may not fail did.
    """
    tried, failed = tally.committed.images, tally.committed.failed
    if tried >= _ENOUGH_TO_JUDGE and failed > tried * (1 + allowed) / 2:
        raise HopelessError(
            f"{failed:,} of the first {tried:,} images failed, output.max_failed_share allows {allowed:g}: stopped. "
            f"What is committed stays, see error_type in images; with output.max_failed_share=1 the command goes on"
        )


def _clean(plan: Plan, tally: Tally) -> None:
    """Remove chunks beyond the end of shards that are shorter now, receipts first, and then all orphans."""
    obsolete = find_obsolete(plan, tally.receipts)
    tally.forget(obsolete)
    _remove(plan.request.layout, obsolete, tally.receipts)
    sweep_attempts(plan.request.layout, list(tally.receipts))


def _remove(layout: RunLayout, obsolete: Sequence[Receipt], receipts: Mapping[str, Receipt]) -> None:
    """Remove obsolete chunks, receipts first, so that no receipt ever names a file that is gone; then all orphans."""
    if obsolete:
        delete([layout.images_file(receipt.chunk.name) for receipt in obsolete])
    sweep(layout, receipts)


def _end_state(plan: Plan, tally: Tally) -> State:
    if tally.faults or not is_complete(plan, tally.receipts):
        return "unfinished"
    totals = sum_receipts(tally.receipts.values())
    allowed = plan.request.config.output.max_failed_share
    return "failed" if totals.failed > allowed * totals.images else "done"


def _write_end(plan: Plan, record: RunRecord, tally: Tally, state: State) -> None:
    ended = record.model_copy(
        update={
            "state": state,
            "updated_at": now(),
            "totals": sum_receipts(tally.receipts.values()),
            "seconds": tally.seconds_with(record.seconds),
            "resolved": distinct_resolved(tally.receipts.values()),
        }
    )
    write_run(plan.request.layout, ended)
