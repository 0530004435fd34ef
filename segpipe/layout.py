"""Where every file of a run lies, and what it is called: a function of the run and the chunk alone.

OUT/images/run_id=<run>/<chunk>.parquet          one row an image; written last: the receipt
OUT/instances/run_id=<run>/<chunk>.g1.parquet    one row an instance; g1: generation
OUT/categories/run_id=<run>/categories.parquet
OUT/runs/<run>/run.json                          settings, totals, state
OUT/runs/<run>/lease.json                        who is working on the run
OUT/runs/<run>/attempts/<chunk>.json             which images are being tried; gone when the chunk is committed
OUT/runs/<run>/events/<chunk>.g1.json            what happened to a chunk that was tried more than once
OUT/runs/<run>/keys/000000.parquet               which images of a folder or manifest are in which chunk
"""

import hashlib
import re
from dataclasses import dataclass

from segpipe.records import ChunkId, Location

TABLES = ("images", "instances", "categories")
RUNS_FOLDER = "runs"
_SLUG_LENGTH = 40


@dataclass(frozen=True, slots=True)
class RunLayout:
    """The places of one run.

    Attributes:
        output: folder of the lake.
        run_id: name of the run.
    """

    output: Location
    run_id: str

    def table(self, name: str) -> Location:
        """Return the folder of one of the tables."""
        return self.output / name / f"run_id={self.run_id}"

    def images_file(self, chunk_name: str) -> Location:
        """Return a chunk's images file, which is its receipt."""
        return self.table("images") / f"{chunk_name}.parquet"

    def instances_file(self, chunk: ChunkId) -> Location:
        """Return a chunk's instances file of its generation."""
        return self.table("instances") / instances_name(chunk.name, chunk.generation)

    @property
    def categories_file(self) -> Location:
        """Return the one file of categories."""
        return self.table("categories") / "categories.parquet"

    @property
    def folder(self) -> Location:
        """Return the run's own folder."""
        return self.output / RUNS_FOLDER / self.run_id

    @property
    def run_file(self) -> Location:
        """Return run.json."""
        return self.folder / "run.json"

    @property
    def lease_file(self) -> Location:
        """Return the lease."""
        return self.folder / "lease.json"

    @property
    def attempts_folder(self) -> Location:
        """Return the folder of notes about chunks that are being tried."""
        return self.folder / "attempts"

    @property
    def events_folder(self) -> Location:
        """Return the folder of what happened to chunks that were tried more than once."""
        return self.folder / "events"

    @property
    def keys_folder(self) -> Location:
        """Return the folder of written lists of keys."""
        return self.folder / "keys"


def instances_name(chunk_name: str, generation: int) -> str:
    """Return the file name of a chunk's instances."""
    return f"{chunk_name}.g{generation}.parquet"


def chunk_name(shard_name: str, index: int) -> str:
    """Return the name of a chunk: readable, unique in the run, and legal as a file name anywhere.

    16 hex digits of the shard's name keep apart shards whose readable parts are alike: among 100,000 shards
    the chance of a collision is 3e-10.
    """
    stem = shard_name.rsplit("/", 1)[-1].split(".", 1)[0]
    slug = re.sub(r"[^A-Za-z0-9-]+", "-", stem).strip("-")[:_SLUG_LENGTH] or "folder"
    digest = hashlib.sha256(shard_name.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    return f"{slug}-{digest}-{index:06d}"
