"""Stages: chunks are cut once and for all, bad images become rows, the world's faults leave chunks pending."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from segpipe.config import InputConfig, ModelConfig
from segpipe.errors import StoreError
from segpipe.layout import RunLayout, chunk_name
from segpipe.models.weights import resolve_model
from segpipe.records import ChunkId, EncodedChunk, EncodedImage, Fault, Location, Shard, Version
from segpipe.shards import list_input
from segpipe.shards.work import ListedWork, StreamWork
from segpipe.stages import SegmentSettings
from segpipe.stages.commit import commit_chunk
from segpipe.stages.read import chunk_version, read_chunks
from segpipe.stages.segment import SegmentChunk
from segpipe.tables import RunLabel, parse_receipt
from tests.factory import cells, encode, photo, photo_members, write_photos, write_tar


# ---------------------------------------------------------------- read
def stream(path, **settings) -> StreamWork:
    shard = Shard(path.name, Location(str(path)), Version(path.stat().st_size, "v1"))
    return StreamWork(shard, "webdataset", InputConfig(uri=str(path)), **{"chunk_images": 4, **settings})


def shape(chunks):
    return [(chunk.id.index, [image.key for image in chunk.images], chunk.shard_num_images) for chunk in chunks]


def test_a_shard_is_cut_by_position_and_its_last_chunk_says_how_many_there_are(tmp_path):
    path = write_tar(tmp_path / "s.tar", photo_members(range(10)))
    chunks = list(read_chunks(stream(path)))
    assert [len(chunk.images) for chunk in chunks] == [4, 4, 2]
    assert [chunk.shard_num_images for chunk in chunks] == [None, None, 10]
    assert [image.ordinal for chunk in chunks for image in chunk.images] == list(range(10))
    assert chunks[1].images[0].image_id == "s.tar/photo_004.png"
    assert chunks[1].id == ChunkId(chunk_name("s.tar", 1), "s.tar", 1, 1, str(stream(path).shard.version))


def test_a_shard_of_a_whole_number_of_chunks_ends_with_a_marked_chunk(tmp_path):
    path = write_tar(tmp_path / "s.tar", photo_members(range(8)))
    assert [chunk.shard_num_images for chunk in read_chunks(stream(path))] == [None, 8]


def test_chunks_that_are_done_are_passed_over_and_the_rest_stays_the_same(tmp_path):
    path = write_tar(tmp_path / "s.tar", photo_members(range(10)))
    everything = list(read_chunks(stream(path)))
    for done in ({0}, {1}, {0, 2}, {2}, {0, 1, 2}):
        left = list(read_chunks(stream(path, done=frozenset(done))))
        expected = [chunk for chunk in everything if chunk.id.index not in done]
        assert shape(left) == shape(expected)
        assert [chunk.images for chunk in left] == [chunk.images for chunk in expected]


def test_reading_stops_after_the_chunks_that_are_asked_for(tmp_path):
    path = write_tar(tmp_path / "s.tar", photo_members(range(10)))
    assert shape(read_chunks(stream(path, max_chunks=2)))[-1][0] == 1
    exact = write_tar(tmp_path / "e.tar", photo_members(range(8)))
    assert [chunk.shard_num_images for chunk in read_chunks(stream(exact, max_chunks=2))] == [None, 8]
    assert [chunk.shard_num_images for chunk in read_chunks(stream(exact, max_chunks=1))] == [None]


def test_an_empty_shard_is_one_chunk_without_images(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.json", b"{}")])
    assert shape(read_chunks(stream(path))) == [(0, [], 0)]


def test_a_repeated_key_gets_a_number_also_when_the_first_is_passed_over(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.png", photo(n)) for n in range(6)])
    chunks = list(read_chunks(stream(path, done=frozenset({0}))))
    assert shape(chunks) == [(1, ["a.png#5", "a.png#6"], 6)]


def test_a_truncated_shard_ends_with_one_failed_image(tmp_path):
    path = write_tar(tmp_path / "s.tar", photo_members(range(10)))
    path.write_bytes(path.read_bytes()[: 5 * 1024 + 100])
    chunks = list(read_chunks(stream(path)))
    last = chunks[-1].images[-1]
    assert last.key == last.image_id == "s.tar#read"
    assert (last.failure.stage, last.failure.type, last.data) == ("read", "TruncatedShard", b"")
    assert chunks[-1].shard_num_images == sum(len(chunk.images) for chunk in chunks)


def test_a_shard_that_cannot_be_opened_is_one_failed_image(tmp_path):
    path = tmp_path / "s.tar"
    path.write_bytes(b"nothing")
    assert shape(read_chunks(stream(path))) == [(0, ["s.tar#read"], 1)]


def test_a_shard_that_is_gone_is_one_failed_image(tmp_path):
    path = write_tar(tmp_path / "s.tar", photo_members(range(2)))
    work = stream(path)
    path.unlink()
    assert shape(read_chunks(work)) == [(0, ["s.tar#read"], 1)]


def test_a_parquet_shard_with_other_columns_than_its_neighbours_is_one_failed_image(tmp_path):
    from tests.factory import write_parquet

    path = write_parquet(tmp_path / "s.parquet", {"label": ["x"]})
    shard = Shard(path.name, Location(str(path)), Version(path.stat().st_size, None))
    chunks = list(read_chunks(StreamWork(shard, "parquet", InputConfig(uri="x"), 4)))
    assert chunks[0].images[0].failure.type == "UnreadableShard"
    assert "has no clear image column" in chunks[0].images[0].failure.message


def test_an_image_without_bytes_in_a_shard_is_a_failed_image(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.png", b""), ("b.png", photo(1))])
    (chunk,) = read_chunks(stream(path))
    assert [image.failure.type if image.failure else None for image in chunk.images] == ["Empty", None]


def test_a_store_fault_ends_the_work_with_a_fault_and_keeps_what_was_whole(tmp_path, monkeypatch):
    import segpipe.stages.read as module

    path = write_tar(tmp_path / "s.tar", photo_members(range(10)))
    honest = module.reader_for

    def faulty(kind, config):
        def reader(shard, wanted):
            for position, entry in enumerate(honest(kind, config)(shard, wanted)):
                if position == 6:
                    raise StoreError("s3://b/s.tar: reset")
                yield entry

        return reader

    monkeypatch.setattr(module, "reader_for", faulty)
    chunk, fault = read_chunks(stream(path))
    assert len(chunk.images) == 4
    assert fault == Fault("s.tar", "read", "s3://b/s.tar: reset")


def listed_work(folder) -> ListedWork:
    images = list_input(InputConfig(uri=str(folder))).images
    return ListedWork(ChunkId("c", ".", 0, 1, chunk_version(images)), images, 1 << 30)


def test_a_listed_image_that_is_gone_is_a_failed_image(tmp_path):
    work = listed_work(write_photos(tmp_path / "in", range(3)))
    (tmp_path / "in" / "photo_001.png").unlink()
    (chunk,) = read_chunks(work)
    assert [image.failure.type if image.failure else None for image in chunk.images] == [None, "NotFound", None]
    assert [image.image_id for image in chunk.images] == ["photo_000.png", "photo_001.png", "photo_002.png"]


def test_a_listed_image_that_the_store_does_not_give_leaves_its_chunk_pending(tmp_path, monkeypatch):
    work = listed_work(write_photos(tmp_path / "in", range(3)))

    def down(place):
        raise StoreError("down")

    monkeypatch.setattr("segpipe.stages.read.read_bytes", down)
    assert list(read_chunks(work)) == [Fault("c", "read", "down")]


def test_the_version_of_a_chunk_changes_with_each_of_its_images(tmp_path):
    folder = write_photos(tmp_path / "in", range(3))
    before = listed_work(folder).chunk.version
    assert listed_work(folder).chunk.version == before
    (folder / "photo_002.png").write_bytes(photo(9))
    assert listed_work(folder).chunk.version != before


# ---------------------------------------------------------------- segment
def settings(**model) -> SegmentSettings:
    return SegmentSettings(resolve_model(ModelConfig(**{"name": "blank", **model})), 10_000_000, False, 1)


def chunk_of(*contents: bytes) -> EncodedChunk:
    images = tuple(EncodedImage(f"i{n}", f"i{n}", n, data) for n, data in enumerate(contents))
    return EncodedChunk(ChunkId("c", "s.tar", 0, 1, "v"), images, shard_num_images=len(images))


def test_every_image_becomes_one_row_in_order_and_every_instance_one(tmp_path):
    found = SegmentChunk(settings())(chunk_of(photo(1), b"broken", encode(cells([None])), photo(2)))
    rows = found.images.to_pylist()
    assert [row["image_id"] for row in rows] == ["i0", "i1", "i2", "i3"]
    assert [row["status"] for row in rows] == ["ok", "failed", "ok", "ok"]
    assert (rows[1]["error_stage"], rows[1]["error_type"], rows[1]["num_instances"]) == ("decode", "NotAnImage", 0)
    assert rows[2]["num_instances"] == 0
    assert sum(row["num_instances"] for row in rows) == found.instances.num_rows
    assert [row["shard"] for row in rows] == ["s.tar"] * 4
    ids = [(row["image_id"], row["instance_id"]) for row in found.instances.to_pylist()]
    assert ids == [(row["image_id"], index) for row in rows for index in range(row["num_instances"])]


def test_three_hundred_instances_in_one_image_are_kept():
    image = encode(cells(["red"] * 300, columns=20))
    found = SegmentChunk(settings(max_instances=300))(chunk_of(image))
    assert found.instances.num_rows == 300
    assert found.images.to_pylist()[0]["instances_capped"] is False
    capped = SegmentChunk(settings())(chunk_of(image))
    row = capped.images.to_pylist()[0]
    assert (row["num_instances"], row["num_candidates"], row["instances_capped"]) == (100, 300, True)


def test_a_fault_passes_through():
    fault = Fault("s.tar", "read", "down")
    assert SegmentChunk(settings())(fault) is fault


def test_a_batch_size_changes_nothing_but_who_shares_a_forward():
    contents = [encode(cells(["red"] * n, columns=2)) for n in range(1, 12)] + [b"broken"]
    one = SegmentChunk(settings())(chunk_of(*contents))
    three = SegmentChunk(settings(batch_size=3))
    seen = []
    honest = three._segmenter.forward

    def spying(pixels, frames):
        seen.append({frame.padded_hw for frame in frames})
        return honest(pixels, frames)

    three._segmenter.forward = spying
    found = three(chunk_of(*contents))
    assert found.images.equals(one.images)
    assert found.instances.equals(one.instances)
    assert all(len(shapes) == 1 for shapes in seen)
    assert len(seen) < 11
    assert found.resolved["batch_size"] == 3


def test_images_of_many_shapes_do_not_pile_up():
    """No more than four batches' worth of prepared images wait for others of their shape."""
    contents = [encode(np.full((8 + n, 8, 3), 200, np.uint8)) for n in range(30)]
    segment = SegmentChunk(settings(batch_size=2))
    waiting, most = 0, 0
    prepare, forward = segment._segmenter.prepare, segment._segmenter.forward

    def counted_prepare(image):
        nonlocal waiting, most
        waiting, most = waiting + 1, max(most, waiting + 1)
        return prepare(image)

    def counted_forward(pixels, frames):
        nonlocal waiting
        waiting -= len(pixels)
        return forward(pixels, frames)

    segment._segmenter.prepare, segment._segmenter.forward = counted_prepare, counted_forward
    assert segment(chunk_of(*contents)).images.num_rows == 30
    assert most <= 8


class Awkward:
    """Raises on images whose first pixel says so; the rest goes to the honest segmenter."""

    def __init__(self, honest, step, error):
        self._honest, self._step, self._error = honest, step, error
        self.batch_size, self.resolved = 4, honest.resolved

    def prepare(self, image):
        if self._step == "prepare" and image[0, 0, 0] == 1:
            raise self._error
        return self._honest.prepare(image)

    def forward(self, pixels, frames):
        if self._step == "forward" and any(image[0, 0, 0] == 1 for image in pixels):
            raise self._error
        return self._honest.forward(pixels, frames)

    def decode(self, raw, frames):
        return self._honest.decode(raw, frames)


def awkward(step, error):
    segment = SegmentChunk(settings())
    segment._segmenter = Awkward(segment._segmenter, step, error)
    marked = cells(["red"] * 4)
    marked[0, 0] = 1
    return segment(chunk_of(photo(3), encode(marked), *[encode(cells(["red"] * 4))] * 3))


@pytest.mark.parametrize("step", ["prepare", "forward"])
def test_an_image_that_the_model_cannot_take_fails_alone(step):
    found = awkward(step, RuntimeError("bad shape in /tmp/worker/x.py"))
    rows = found.images.to_pylist()
    assert [row["status"] for row in rows] == ["ok", "failed", "ok", "ok", "ok"]
    failed = rows[1]
    assert (failed["error_stage"], failed["error_type"]) == ("segment", "RuntimeError")
    assert failed["error_message"] == "bad shape in .../x.py"
    assert failed["width"] == 64
    assert [row["num_instances"] for row in rows[2:]] == [4, 4, 4]


def test_lack_of_memory_before_the_model_leaves_the_chunk_pending():
    assert awkward("prepare", MemoryError()) == Fault("c", "segment", "MemoryError: MemoryError")


def test_a_device_that_fails_leaves_the_chunk_pending():
    found = awkward("forward", RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert isinstance(found, Fault)


def test_a_bug_in_the_framework_is_not_swallowed(monkeypatch):
    def bug(*args, **kwargs):
        raise KeyError("bug")

    monkeypatch.setattr("segpipe.stages.segment.instances_table", bug)
    with pytest.raises(KeyError, match="bug"):
        SegmentChunk(settings())(chunk_of(photo(1)))


# ---------------------------------------------------------------- commit
@pytest.fixture
def segmented():
    return SegmentChunk(settings())(chunk_of(photo(1), b"broken", photo(2)))


def label() -> RunLabel:
    return RunLabel("r", "f", resolve_model(ModelConfig(name="blank")).info)


def test_a_commit_writes_instances_first_and_the_receipt_last(tmp_path, segmented, monkeypatch):
    import segpipe.stages.commit as module

    layout = RunLayout(Location(str(tmp_path)), "r")
    written = []
    honest = module.write_bytes
    monkeypatch.setattr(module, "write_bytes", lambda place, data: (written.append(place.uri), honest(place, data)))
    committed = commit_chunk(segmented, layout=layout, label=label())
    assert [uri.rsplit("/", 1)[-1] for uri in written] == ["c.g1.parquet", "c.parquet"]
    metadata = pq.read_metadata(written[1]).metadata
    assert parse_receipt(metadata, file="c.parquet") == committed.receipt
    assert (committed.receipt.num_images, committed.receipt.num_failed, committed.receipt.shard_num_images) == (3, 1, 3)
    assert committed.seconds.keys() >= {"read", "decode", "forward", "encode", "commit"}


def test_the_same_chunk_committed_twice_gives_the_same_bytes(tmp_path, segmented):
    contents = []
    for folder in ("a", "b", "a"):
        layout = RunLayout(Location(str(tmp_path / folder)), "r")
        commit_chunk(segmented, layout=layout, label=label())
        contents.append({file.name: file.read_bytes() for file in (tmp_path / folder).rglob("*.parquet")})
    assert contents[0] == contents[1] == contents[2]


def test_a_store_that_does_not_take_it_leaves_the_chunk_pending(tmp_path, segmented, monkeypatch):
    def full(place, data):
        raise StoreError("No space left on device")

    monkeypatch.setattr("segpipe.stages.commit.write_bytes", full)
    layout = RunLayout(Location(str(tmp_path)), "r")
    assert commit_chunk(segmented, layout=layout, label=label()) == Fault("c", "commit", "No space left on device")
    fault = Fault("c", "read", "x")
    assert commit_chunk(fault, layout=layout, label=label()) is fault


class Hungry:
    """A blank model with room for a number of images at a time."""

    def __init__(self, inner, room):
        self._inner, self._room = inner, room
        self.batch_size, self.resolved = 4, inner.resolved
        self.asked = []

    def prepare(self, image):
        return self._inner.prepare(image)

    def forward(self, pixels, frames):
        self.asked.append(len(pixels))
        if len(pixels) > self._room:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self._inner.forward(pixels, frames)

    def decode(self, raw, frames):
        return self._inner.decode(raw, frames)


@pytest.mark.parametrize("room", [4, 1, 0])
def test_where_memory_is_short_batches_become_single_images_and_those_fail_last(room):
    stage = SegmentChunk(settings())
    data = [encode(cells(["red", "blue", None, "green"]))] * 4
    expected = stage(chunk_of(*data))
    stage._segmenter = hungry = Hungry(stage._segmenter, room)
    found = stage(chunk_of(*data))
    if room:
        assert found.instances.equals(expected.instances)
        assert found.images.equals(expected.images)
        assert found.resolved.get("out_of_memory", 0) == (room < 4)
        assert hungry.asked == ([4] if room == 4 else [4, 1, 1, 1, 1])
    else:
        assert {row["error_type"] for row in found.images.to_pylist()} == {"OutOfMemory"}
        assert found.resolved["out_of_memory"] == 5
    hungry._room = 4
    assert "out_of_memory" not in stage(chunk_of(*data)).resolved
