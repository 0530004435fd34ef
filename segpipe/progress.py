"""How far a run is, and how it ended: counts for people and programs. Draws nothing."""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from segpipe.layout import chunk_name
from segpipe.planning import Plan, expect_images, find_ends
from segpipe.records import Committed, Fault, Receipt
from segpipe.runs import State, Totals, sum_receipts
from segpipe.shards.work import ListedWork

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is.

    Attributes:
        phase: what is going on, in words.
        committed: sums over this start alone.
        skipped: images that earlier starts had committed.
        expected_images: of the whole input; None while nobody knows.
        is_estimate: True if `expected_images` is guessed from sizes in bytes.
        images_per_s: speed since the first chunk was committed, so that start-up does not count.
        num_faults: chunks left pending so far.
    """

    phase: str
    committed: Totals = field(default_factory=Totals)
    skipped: int = 0
    expected_images: int | None = None
    is_estimate: bool = False
    images_per_s: float | None = None
    num_faults: int = 0

    @property
    def left_s(self) -> float | None:
        """Return the seconds left at this speed; None while nobody knows."""
        if self.expected_images is None or not self.images_per_s:
            return None
        return max(0, self.expected_images - self.skipped - self.committed.images) / self.images_per_s


@dataclass(frozen=True, slots=True)
class RunSummary:
    """How a start of a run ended.

    Attributes:
        run_id: name of the run.
        output: folder of the lake.
        state: `done`; `failed` if too large a share of the images failed; else `unfinished`.
        totals: sums over the whole run.
        committed: sums over this start.
        skipped: images that earlier starts had committed.
        faults: chunks that were left pending, and why.
        lost_shards: shards that are gone from the input before they were read to their end.
        limited: True if only the first images were asked for.
        elapsed_s: wall time of this start.
        seconds: time by stage, summed over workers.
    """

    run_id: str
    output: str
    state: State
    totals: Totals
    committed: Totals
    skipped: int
    faults: tuple[Fault, ...]
    lost_shards: tuple[str, ...]
    limited: bool
    elapsed_s: float
    seconds: Mapping[str, float]

    @property
    def exit_code(self) -> int:
        """Return 0 if everything that was asked for is done, else 1."""
        complete = self.state == "done" or (self.state == "unfinished" and self.limited)
        return 0 if complete and not self.faults and not self.lost_shards else 1


OnProgress = Callable[[Progress], None]


class Tally:
    """Counts what comes out of an engine, and tells whoever listens.

    Attributes:
        receipts: of every committed chunk of the run, by chunk name.
        faults: chunks left pending in this start.
    """

    def __init__(self, plan: Plan, on_progress: OnProgress, *, limit: int | None = None) -> None:
        self.receipts: dict[str, Receipt] = dict(plan.receipts)
        self.faults: list[Fault] = []
        self._plan = plan
        self._on_progress = on_progress
        self._limit = limit
        self.committed = Totals()
        self._seconds: dict[str, float] = defaultdict(float)
        self._skipped = sum_receipts(plan.receipts.values()).images - _images_to_redo(plan)
        self._started = time.perf_counter()
        self._first: tuple[float, int] | None = None
        self._ends = find_ends(plan.receipts.values())

    def enter(self, phase: str) -> None:
        """Tell that the run waits for something before work begins."""
        self._on_progress(Progress(phase, skipped=self._skipped))

    def add(self, outcome: Committed | Fault) -> None:
        """Count a chunk that was committed or left pending."""
        if isinstance(outcome, Fault):
            logger.info("pending=%s stage=%s reason=%s", outcome.where, outcome.stage, outcome.message)
            self.faults.append(outcome)
        else:
            receipt = outcome.receipt
            logger.info(
                "chunk=%s images=%d failed=%d instances=%d",
                receipt.chunk.name, receipt.num_images, receipt.num_failed, receipt.num_instances,
            )  # fmt: skip
            self.committed = self.committed.plus(receipt)
            self.receipts[receipt.chunk.name] = receipt
            for stage, seconds in outcome.seconds.items():
                self._seconds[stage] += seconds
            self._ends.update(find_ends([receipt]))
        expected, is_estimate = self._expect()
        progress = Progress(
            "segmenting",
            committed=self.committed,
            skipped=self._skipped,
            expected_images=expected,
            is_estimate=is_estimate,
            images_per_s=self._speed(),
            num_faults=len(self.faults),
        )
        self._on_progress(progress)

    def _speed(self) -> float | None:
        elapsed = time.perf_counter() - self._started
        if self._first is None:
            self._first = (elapsed, self.committed.images)
            return None
        since, images = self._first
        return (self.committed.images - images) / (elapsed - since) if elapsed > since else None

    def _expect(self) -> tuple[int, bool]:
        """Return the images to expect, never fewer than there are, and whether that is a guess."""
        expected, is_estimate = expect_images(self._plan, self._ends)
        if self._limit is not None:
            expected = min(expected, self._limit)
        return max(expected, self._skipped + self.committed.images), is_estimate

    def forget(self, receipts: Iterable[Receipt]) -> None:
        """Drop receipts whose files are gone."""
        for receipt in receipts:
            self.receipts.pop(receipt.chunk.name, None)

    def images_by_shard(self) -> Counter[str]:
        """Return the committed images of each shard."""
        counts: Counter[str] = Counter()
        for receipt in self.receipts.values():
            counts[receipt.chunk.shard] += receipt.num_images
        return counts

    def seconds_with(self, earlier: Mapping[str, float]) -> dict[str, float]:
        """Return the seconds by stage of all starts, with the driver's as `wall`."""
        new = {**self._seconds, "wall": time.perf_counter() - self._started}
        names = sorted({*earlier, *new})
        return {name: round(earlier.get(name, 0.0) + new.get(name, 0.0), 3) for name in names}

    def summary(self, state: State, *, limited: bool) -> RunSummary:
        """Return how this start ended."""
        return RunSummary(
            run_id=self._plan.request.layout.run_id,
            output=self._plan.request.layout.output.uri,
            state=state,
            totals=sum_receipts(self.receipts.values()),
            committed=self.committed,
            skipped=self._skipped,
            faults=tuple(self.faults),
            lost_shards=self._plan.lost_shards,
            limited=limited,
            elapsed_s=time.perf_counter() - self._started,
            seconds=dict(self._seconds),
        )


def _images_to_redo(plan: Plan) -> int:
    """Count the committed images that this start segments anew because they were replaced."""
    names = []
    for item in plan.work:
        if isinstance(item, ListedWork):
            names.append(item.chunk.name)
        else:
            names += [chunk_name(item.shard.name, index) for index in item.generations]
    return sum(plan.receipts[name].num_images for name in names if name in plan.receipts)
