"""Making a damaged run whole again: what is broken is forgotten, so that the next start does it anew."""

from dataclasses import dataclass

from segpipe.errors import OutputError
from segpipe.lake import list_chosen_runs
from segpipe.layout import RunLayout
from segpipe.lease import hold_lease
from segpipe.runs import read_receipts, read_run, sum_receipts, sweep, write_run
from segpipe.storage import delete, locate
from segpipe.validation import find_damaged


@dataclass(frozen=True, slots=True)
class Repair:
    """What was repaired in one run.

    Attributes:
        run_id: of the run.
        requeued: names of the images files that were removed with their chunks; the next start makes them anew.
        num_swept: files that no receipt named.
    """

    run_id: str
    requeued: tuple[str, ...]
    num_swept: int


def repair(output: str, *, run_id: str | None = None) -> list[Repair]:
    """Remove orphans, and the receipts of damaged chunks, so that the same `run` command makes them anew.

    Args:
        output: folder of the lake, path or URI.
        run_id: one run; None repairs all.

    Raises:
        OutputError: if there is no such lake or run, or a run's own notes are gone.
        RunLockedError: if somebody is working on the run.
        StoreError: if the store does not answer.
    """
    place = locate(output)
    return [_repair(RunLayout(place, name)) for name in list_chosen_runs(place, run_id)]


def _repair(layout: RunLayout) -> Repair:
    with hold_lease(layout.lease_file):
        record = read_run(layout)
        if record is None:
            raise OutputError(f"{layout.run_file.uri}: is missing, so nobody knows what the run was; restore it")
        damaged = find_damaged(layout)
        delete(damaged)
        receipts = read_receipts(layout)
        num_swept = sweep(layout, receipts)
        if damaged:
            totals = sum_receipts(receipts.values())
            write_run(layout, record.model_copy(update={"state": "unfinished", "totals": totals}))
    return Repair(layout.run_id, tuple(place.name for place in damaged), num_swept)
