"""What a run would do, and how far the runs of a lake are. Listings, run.json and receipts; nothing is written."""

from dataclasses import dataclass

from segpipe.config import Config
from segpipe.keylists import read_keys
from segpipe.lake import list_chosen_runs
from segpipe.layout import RunLayout
from segpipe.lease import is_alive, read_holder
from segpipe.models import MODELS
from segpipe.planning import expect_images, find_ends, make_plan
from segpipe.request import check_request
from segpipe.runs import RunRecord, Totals, read_receipts, read_run, sum_receipts
from segpipe.shards.work import ListedWork
from segpipe.storage import locate


@dataclass(frozen=True, slots=True)
class PlanSummary:
    """What a run would do.

    Attributes:
        run_id: name of the run.
        kind: of the input, resolved.
        input_root: place that names are relative to.
        num_shards: shards of a streamed input; 1 for a folder or manifest.
        num_ignored: files that are no input of this kind.
        input_bytes: as listed; None where the listing does not say.
        num_images: of the whole input.
        is_estimate: True if `num_images` is guessed from bytes.
        committed: what earlier starts have done.
        num_pending: images to do, as sure as `num_images`.
        chunk_images: images a chunk.
        replaced: what was replaced since it was read, and would be refused without refresh.
        images_per_s: speed of the earlier starts of this run; None for a new run.
    """

    run_id: str
    kind: str
    input_root: str
    num_shards: int
    num_ignored: int
    input_bytes: int | None
    num_images: int
    is_estimate: bool
    committed: Totals
    num_pending: int
    chunk_images: int
    replaced: tuple[str, ...]
    images_per_s: float | None

    @property
    def left_s(self) -> float | None:
        """Return the seconds that the pending images would take at that speed."""
        return self.num_pending / self.images_per_s if self.images_per_s else None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """How far one run is.

    Attributes:
        run_id: name of the run.
        state: as run.json says; `interrupted` if it says running and nobody is, `not started` without one.
        holder: who works on it, in words; None if nobody does.
        totals: sums over the receipts.
        num_images: of the input as last listed; None for a streamed input.
        model: name of the model.
        updated_at: when run.json was last written, UTC.
    """

    run_id: str
    state: str
    holder: str | None
    totals: Totals
    num_images: int | None
    model: str
    updated_at: str


@dataclass(frozen=True, slots=True)
class ModelSummary:
    """One model of the registry.

    Attributes:
        name: for `model.name`.
        summary: one line.
        weights: names of its weights, the default first.
        weights_note: what to know before using them.
        licence: of code and weights.
    """

    name: str
    summary: str
    weights: tuple[str, ...]
    weights_note: str
    licence: str


def plan(config: Config, *, limit: int | None = None, refresh: bool = False) -> PlanSummary:
    """Say what a run would do, without doing it.

    Args:
        config: as for `run`.
        limit: as for `run`.
        refresh: as for `run`.

    Raises:
        RequestError: as `run` would.
        StoreError: if a store does not answer.
    """
    request = check_request(config)
    found = make_plan(request, limit=limit, refresh=refresh)
    listing = request.listing
    sizes = [entry.version.size_bytes for entry in (listing.shards or listing.images)]
    num_images, is_estimate = expect_images(found, find_ends(found.receipts.values()))
    committed = sum_receipts(found.receipts.values())
    if listing.is_streamed:
        num_pending = max(0, num_images - committed.images) if found.work else 0
    else:
        num_pending = sum(len(item.images) for item in found.work if isinstance(item, ListedWork))
    return PlanSummary(
        run_id=request.layout.run_id,
        kind=listing.kind,
        input_root=listing.root.uri,
        num_shards=max(1, len(listing.shards)),
        num_ignored=listing.num_ignored,
        input_bytes=None if None in sizes else sum(size or 0 for size in sizes),
        num_images=num_images,
        is_estimate=is_estimate,
        committed=committed,
        num_pending=num_pending if limit is None else min(limit, num_pending),
        chunk_images=found.chunk_images,
        replaced=found.replaced,
        images_per_s=_speed(found.record),
    )


def status(output: str, *, run_id: str | None = None) -> list[RunStatus]:
    """Say how far the runs of a lake are.

    Args:
        output: folder of the lake, path or URI.
        run_id: one run; None for all.

    Raises:
        OutputError: if there is no such lake or run.
        StoreError: if the store does not answer.
    """
    place = locate(output)
    return [_run_status(RunLayout(place, name)) for name in list_chosen_runs(place, run_id)]


def list_models() -> list[ModelSummary]:
    """Return the models that `model.name` may name."""
    return [
        ModelSummary(name, model.summary, tuple(model.weight_files), model.weights_note, model.licence)
        for name, model in MODELS.items()
    ]


def _speed(record: RunRecord | None) -> float | None:
    if record is None or not record.totals.images or not record.seconds.get("wall"):
        return None
    return record.totals.images / record.seconds["wall"]


def _run_status(layout: RunLayout) -> RunStatus:
    record = read_run(layout)
    holder = read_holder(layout.lease_file)
    held = holder is not None and is_alive(holder) is not False
    state = record.state if record else "not started"
    num_images = None
    if record is not None and record.kind in ("folder", "manifest"):
        num_images = len(read_keys(layout, locate(record.input_root)).images)
    return RunStatus(
        run_id=layout.run_id,
        state="interrupted" if state == "running" and not held else state,
        holder=str(holder) if held else None,
        totals=sum_receipts(read_receipts(layout).values()),
        num_images=num_images,
        model=str(record.model.get("name")) if record else "",
        updated_at=record.updated_at if record else "",
    )
