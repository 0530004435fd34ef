"""Notes of who is trying a chunk, so that an image which kills its worker is found: runs/<run>/attempts/<chunk>.json.

A note is written before a chunk is tried and removed when it was committed or given up in good order: a note that is
there when a chunk is begun was left by a process that died. What was tried more than once is kept for people in
runs/<run>/events/<chunk>.g1.json.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter, ValidationError

from segpipe.layout import RunLayout
from segpipe.records import ChunkId, ImageFailure, Location
from segpipe.storage import delete, list_names, read_bytes, write_bytes

_SUFFIX = ".json"


@dataclass(frozen=True, slots=True)
class Attempt:
    """How a chunk is tried.

    Attributes:
        version: of the chunk's input; a note about another version says nothing.
        count: from 1; the first is not watched, all later ones are.
        in_flight: image_ids that a watched attempt was working on when the note was written.
        suspects: image_ids that earlier attempts died with: each is tried alone in a process of its own.
        verdicts: image_id to what a process of its own died of.
        barren: watched attempts that died while no image was in flight.
    """

    version: str
    count: int = 1
    in_flight: tuple[str, ...] = ()
    suspects: tuple[str, ...] = ()
    verdicts: Mapping[str, ImageFailure] = field(default_factory=dict)
    barren: int = 0

    def after_death(self) -> "Attempt":
        """Return the attempt that follows this one, whose process died."""
        suspects = (*self.suspects, *(image_id for image_id in self.in_flight if image_id not in self.suspects))
        barren = self.barren + (self.count > 1 and not self.in_flight)
        return replace(self, count=self.count + 1, in_flight=(), suspects=suspects, barren=barren)


_FORMAT = TypeAdapter(Attempt)


def begin_attempt(layout: RunLayout, chunk: ChunkId) -> Attempt:
    """Note that a chunk is tried now, and return how.

    Raises:
        StoreError: if the store does not answer.
    """
    earlier = _read(layout, chunk)
    attempt = Attempt(chunk.version) if earlier is None else earlier.after_death()
    note_attempt(layout, chunk, attempt)
    return attempt


def note_attempt(layout: RunLayout, chunk: ChunkId, attempt: Attempt) -> None:
    """Write down how far an attempt is."""
    write_bytes(_place(layout, chunk.name), _FORMAT.dump_json(attempt))


def end_attempt(layout: RunLayout, chunk: ChunkId, attempt: Attempt) -> None:
    """Remove the note of an attempt that ended in good order; keep what there is to tell about it."""
    if attempt.count > 1:
        place = layout.events_folder / f"{chunk.name}.g{chunk.generation}.json"
        write_bytes(place, _FORMAT.dump_json(attempt, indent=1))
    delete([_place(layout, chunk.name)])


def sweep_attempts(layout: RunLayout, committed: Sequence[str]) -> None:
    """Remove the notes of committed chunks, whose process died between the commit and the removal."""
    done = set(committed)
    names = [name for name in list_names(layout.attempts_folder) if name.removesuffix(_SUFFIX) in done]
    delete([layout.attempts_folder / name for name in names])


def _read(layout: RunLayout, chunk: ChunkId) -> Attempt | None:
    try:
        attempt = _FORMAT.validate_json(read_bytes(_place(layout, chunk.name)))
    except FileNotFoundError:
        return None
    except ValidationError:  # cut short: its process died, and that is all that is known
        return Attempt(chunk.version)
    return attempt if attempt.version == chunk.version else None


def _place(layout: RunLayout, chunk_name: str) -> Location:
    return layout.attempts_folder / f"{chunk_name}{_SUFFIX}"
