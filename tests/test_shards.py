"""Inputs: what a URI is, what it holds, how a shard is read, and where it breaks off."""

import gzip
import json
import tarfile
import uuid

import pyarrow as pa
import pytest

from segpipe.config import InputConfig
from segpipe.errors import InputError, PlaceError, ShardCorruptError, StoreError
from segpipe.records import Location, Shard, Version
from segpipe.shards import list_input, reader_for, sample_image_bytes
from segpipe.shards.keys import UniqueKeys, printable
from segpipe.shards.names import is_image_name, is_tar_name
from segpipe.storage import write_bytes
from tests.factory import photo, photo_members, write_parquet, write_photos, write_tar


def listed(uri: object, **settings: object):
    return list_input(InputConfig(uri=str(uri), **settings))


def read(kind: str, shard: Shard, wanted=lambda position: True, **settings: object):
    return list(reader_for(kind, InputConfig(uri="x", **settings))(shard, wanted))


def shard_at(path) -> Shard:
    return Shard(path.name, Location(str(path)), Version(path.stat().st_size, None))


# ---------------------------------------------------------------- names and keys
def test_image_names_are_told_by_their_suffix():
    assert all(map(is_image_name, ("a.jpg", "b/A.JPEG", "_DSC0001.jpg", "a.b.png", "x.heic", "y.j2k")))
    assert not any(map(is_image_name, (".a.jpg", "b/._a.jpg", "jpg", "a.json", "a.txt", "a.jpg/")))
    assert all(map(is_tar_name, ("a.tar", "a.tar.gz", "A.TGZ")))


def test_a_repeated_key_gets_a_number_that_no_other_key_has():
    keys = UniqueKeys()
    given = ["a", "b", "a", "a#2", "a", "a#2", "c"]
    assert [keys.add(key) for key in given] == ["a", "b", "a#2", "a#2#2", "a#3", "a#2#3", "c"]


def test_keys_stay_unique_beyond_what_is_held_unsorted():
    keys = UniqueKeys()
    first = [keys.add(f"k{index}") for index in range(70_000)]
    assert first == [f"k{index}" for index in range(70_000)]
    assert [keys.add(f"k{index}") for index in (0, 69_999, 65_536)] == ["k0#2", "k69999#2", "k65536#2"]


def test_names_that_are_no_unicode_are_made_printable():
    assert printable("caf\udce9.jpg") == "caf\\xe9.jpg"
    assert printable("café.jpg") == "café.jpg"


# ---------------------------------------------------------------- what an input is
def test_a_folder_is_listed_recursively_with_names_relative_to_it(tmp_path):
    write_photos(tmp_path / "in" / "b", [1])
    write_photos(tmp_path / "in", [2])
    (tmp_path / "in" / "notes.txt").write_text("x")
    listing = listed(tmp_path / "in")
    assert listing.kind == "folder"
    assert [image.key for image in listing.images] == ["b/photo_001.png", "photo_002.png"]
    assert (listing.shard_name, listing.num_ignored, listing.is_streamed) == (".", 1, False)


def test_one_image_is_a_folder_of_one(tmp_path):
    write_photos(tmp_path, [1])
    listing = listed(tmp_path / "photo_001.png")
    assert [image.key for image in listing.images] == ["photo_001.png"]
    assert listing.root.uri == str(tmp_path)


def test_a_folder_of_tars_or_parquet_files_is_streamed(tmp_path):
    write_tar(tmp_path / "t" / "b" / "1.tar", photo_members([1]))
    write_tar(tmp_path / "t" / "0.tar.gz", photo_members([1]), "w:gz")
    listing = listed(tmp_path / "t")
    assert (listing.kind, [shard.name for shard in listing.shards]) == ("webdataset", ["0.tar.gz", "b/1.tar"])
    assert listing.is_streamed
    write_parquet(tmp_path / "p" / "0.parquet", {"image": [photo(1)]})
    assert listed(tmp_path / "p").kind == "parquet"


def test_a_glob_is_relative_to_its_root(tmp_path):
    for number in range(3):
        write_tar(tmp_path / "train" / f"{number}.tar", photo_members([number]))
    listing = listed(tmp_path / "*" / "[01].tar")
    assert [shard.name for shard in listing.shards] == ["train/0.tar", "train/1.tar"]


def test_a_glob_with_a_stated_format_takes_any_name(tmp_path):
    (tmp_path / "abc123").write_bytes(photo(1))
    with pytest.raises(InputError, match="a glob with --set input.format takes any name"):
        listed(tmp_path)
    assert [image.key for image in listed(tmp_path / "*", format="folder").images] == ["abc123"]


def test_a_memory_store_is_listed_like_a_disk():
    root = f"memory://{uuid.uuid4().hex}"
    write_bytes(Location(f"{root}/a/1.png"), photo(1))
    listing = listed(root)
    assert ([image.key for image in listing.images], listing.kind) == (["a/1.png"], "folder")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: None, "holds no image, tar or Parquet file \\(it is empty\\)"),
        (lambda folder: (folder / "a.doc").write_text("x"), "holds no image.*1 other files, such as a.doc"),
        (
            lambda folder: (write_photos(folder, [1]), write_tar(folder / "a.tar", [])),
            "more than one kind of input .*choose with --set input.format=",
        ),
    ],
)
def test_an_input_of_no_clear_kind_is_refused_with_what_is_there(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(InputError, match=message):
        listed(tmp_path)


def test_an_input_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"input.uri: there is nothing at .*/nope; check the path"):
        listed(tmp_path / "nope")
    with pytest.raises(InputError, match=r"holds no image"):
        listed(tmp_path / "*.jpg")
    write_photos(tmp_path, [1])
    with pytest.raises(InputError, match=r"holds no tar shard \(1 other files, such as photo_001.png"):
        listed(tmp_path, format="webdataset")


def test_an_input_that_may_not_be_read_is_refused(tmp_path, monkeypatch):
    def refused(place):
        raise StoreError("s3://b: permission denied")

    monkeypatch.setattr("segpipe.shards.list_files", refused)
    with pytest.raises(InputError, match="input.uri: cannot be read: s3://b: permission denied"):
        listed("s3://b")


# ---------------------------------------------------------------- tar
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_tar_gives_its_images_in_order_and_passes_over_the_rest(tmp_path, mode):
    members = [("a.png", b"1"), ("a.json", b"{}"), ("d/b.JPG", b"22"), ("._a.png", b"x"), ("./c.webp", b"333")]
    shard = shard_at(write_tar(tmp_path / "s.tar", members, mode))
    assert read("webdataset", shard) == [("a.png", b"1"), ("d/b.JPG", b"22"), ("c.webp", b"333")]


def test_only_wanted_images_are_loaded(tmp_path):
    shard = shard_at(write_tar(tmp_path / "s.tar", photo_members(range(4))))
    entries = read("webdataset", shard, wanted=lambda position: position == 2)
    assert [data is not None for _, data in entries] == [False, False, True, False]


def test_links_folders_and_devices_in_a_tar_are_no_images(tmp_path):
    path = write_tar(tmp_path / "s.tar", [("a.png", b"1")])
    with tarfile.open(path, "a") as tar:
        for name, kind in [("l.png", tarfile.SYMTYPE), ("d.png", tarfile.DIRTYPE), ("c.png", tarfile.CHRTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert read("webdataset", shard_at(path)) == [("a.png", b"1")]


def test_a_tar_without_images_is_empty(tmp_path):
    assert read("webdataset", shard_at(write_tar(tmp_path / "s.tar", []))) == []


def until_broken(shard: Shard, kind: str = "webdataset"):
    entries = []
    with pytest.raises(ShardCorruptError) as caught:
        for entry in reader_for(kind, InputConfig(uri="x"))(shard, lambda position: True):
            entries.append(entry)
    return [key for key, _ in entries], caught.value


@pytest.mark.parametrize("cut", ["in data", "in header", "between members", "before the end marker"])
def test_a_truncated_tar_gives_what_is_whole_and_then_says_so(tmp_path, cut):
    """Python's tarfile ends quietly in three of these four cases."""
    members = [(f"{index}.png", bytes([index]) * 1000) for index in range(5)]
    path = write_tar(tmp_path / "s.tar", members)
    member = 512 + 1024
    size = {
        "in data": 3 * member + 512 + 300,
        "in header": 3 * member + 200,
        "between members": 3 * member,
        "before the end marker": 5 * member,
    }[cut]
    path.write_bytes(path.read_bytes()[:size])
    keys, error = until_broken(shard_at(path))
    assert keys == [f"{index}.png" for index in range(5 if cut == "before the end marker" else 3)]
    assert error.error_type == "TruncatedShard"
    assert "cannot be read any further" in str(error)


def test_a_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    path = write_tar(tmp_path / "s.tar", [(f"{index}.png", b"x" * 600) for index in range(4)])
    data = bytearray(path.read_bytes())
    data[2 * 1536 : 2 * 1536 + 100] = b"\xff" * 100
    path.write_bytes(data)
    keys, error = until_broken(shard_at(path))
    assert keys == ["0.png", "1.png"]
    assert "header is damaged" in str(error)


@pytest.mark.parametrize("content", [b"", b"not a tar at all", gzip.compress(b"not a tar")])
def test_what_is_no_tar_is_a_corrupt_shard(tmp_path, content):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    keys, _ = until_broken(shard_at(path))
    assert keys == []


def test_a_truncated_compressed_tar_is_a_corrupt_shard(tmp_path):
    import numpy as np

    rng = np.random.default_rng(0)
    path = write_tar(tmp_path / "s.tar.gz", [(f"{index}.png", rng.bytes(9000)) for index in range(4)], "w:gz")
    path.write_bytes(path.read_bytes()[:20_000])
    keys, _ = until_broken(shard_at(path))
    assert 1 <= len(keys) < 4


def test_a_store_that_gives_less_than_it_listed_is_at_fault_not_the_shard(tmp_path):
    path = write_tar(tmp_path / "s.tar", [(f"{index}.png", b"x" * 600) for index in range(4)])
    listed_size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:3000])
    shard = Shard("s.tar", Location(str(path)), Version(listed_size, None))
    with pytest.raises(StoreError, match=r"has 3,000 bytes, the listing said 10,240"):
        read("webdataset", shard)


def test_a_store_that_stops_in_the_middle_is_at_fault_not_the_shard(tmp_path, monkeypatch):
    """An object store may end a response early without an error; format libraries take that for a cut file."""
    from fsspec.implementations.local import LocalFileOpener

    tar = write_tar(tmp_path / "s.tar", [(f"{index}.png", b"x" * 600) for index in range(4)])
    table = write_parquet(tmp_path / "s.parquet", {"image": [b"x" * 600] * 4})
    honest = LocalFileOpener.read
    monkeypatch.setattr(LocalFileOpener, "read", lambda self, size=-1: honest(self, max(1, size // 2)))
    for kind, path in (("webdataset", tar), ("parquet", table)):
        with pytest.raises(StoreError, match="gave"):
            read(kind, shard_at(path))


# ---------------------------------------------------------------- Parquet
def test_parquet_with_plain_binary_and_a_key_column(tmp_path):
    path = write_parquet(tmp_path / "s.parquet", {"id": [7, 8], "image": [b"a", b"b"], "label": ["x", "y"]})
    assert read("parquet", shard_at(path)) == [("7", b"a"), ("8", b"b")]


def test_parquet_without_a_key_column_counts_rows(tmp_path):
    path = write_parquet(tmp_path / "s.parquet", {"photo": [b"a", b"b"]})
    assert read("parquet", shard_at(path)) == [("000000000", b"a"), ("000000001", b"b")]


def test_parquet_with_the_hugging_face_struct(tmp_path):
    rows = [{"bytes": b"a", "path": "x.jpg"}, {"bytes": None, "path": "y.jpg"}, None, {"bytes": b"d", "path": None}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    path = write_parquet(tmp_path / "s.parquet", {"image": pa.array(rows, kind)})
    assert read("parquet", shard_at(path)) == [("x.jpg", b"a"), ("y.jpg", b""), ("000000002", b""), ("000000003", b"d")]


def test_parquet_row_groups_that_are_not_wanted_are_not_loaded(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    path = write_parquet(
        tmp_path / "s.parquet", {"id": list(range(40)), "image": [bytes([n]) for n in range(40)]}, row_group_size=10
    )
    asked = []
    honest = pq.ParquetFile.iter_batches

    def spying(self, *args, **kwargs):
        asked.append(kwargs["columns"])
        return honest(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spying)
    entries = read("parquet", shard_at(path), wanted=lambda position: position == 25)
    assert [key for key, data in entries if data is not None] == ["25"]
    assert asked == [["id"], ["id"], ["image", "id"], ["id"]]


def test_parquet_columns_can_be_named(tmp_path):
    path = write_parquet(tmp_path / "s.parquet", {"one": [b"1"], "two": [b"2"], "code": ["k"]})
    assert read("parquet", shard_at(path), image_column="two", key_column="code") == [("k", b"2")]
    with pytest.raises(
        InputError, match=r"has no clear image column. Columns of bytes: one, two; .*input.image_column"
    ):
        read("parquet", shard_at(path))
    with pytest.raises(InputError, match="has no image column 'three'"):
        read("parquet", shard_at(path), image_column="three")
    with pytest.raises(InputError, match="has no key column 'three'"):
        read("parquet", shard_at(path), image_column="one", key_column="three")


def test_parquet_that_cannot_be_read_is_a_corrupt_shard(tmp_path):
    path = tmp_path / "s.parquet"
    path.write_bytes(b"PAR1 nothing PAR1")
    keys, error = until_broken(shard_at(path), "parquet")
    assert (keys, error.error_type) == ([], "UnreadableShard")


def test_parquet_with_a_damaged_row_group_gives_the_rows_before_it(tmp_path):
    import numpy as np
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    images = [rng.bytes(4000) for _ in range(40)]
    path = write_parquet(tmp_path / "s.parquet", {"image": images}, row_group_size=10, compression="zstd")
    data = bytearray(path.read_bytes())
    start = pq.read_metadata(path).row_group(2).column(0).dictionary_page_offset
    data[start : start + 50] = b"\x00" * 50
    path.write_bytes(data)
    keys, error = until_broken(shard_at(path), "parquet")
    assert len(keys) == 20
    assert "row group 2" in str(error)


def test_a_single_parquet_file_is_a_shard_or_a_manifest_by_its_columns(tmp_path):
    assert listed(write_parquet(tmp_path / "a.parquet", {"image": [b"1"]})).kind == "parquet"
    assert listed(write_parquet(tmp_path / "b.parquet", {"uri": ["x.jpg"]})).kind == "manifest"
    (tmp_path / "c.parquet").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no readable Parquet file"):
        listed(tmp_path / "c.parquet")


# ---------------------------------------------------------------- manifests
MANIFESTS = {
    "m.txt": "# photos\na.png\n\n b/c.png \ns3://bucket/d.png\na.png\n",
    "m.csv": "\ufefflabel,uri\nx,a.png\ny,b/c.png\nz,s3://bucket/d.png\nx,a.png\n",
    "m.jsonl": "\n".join(json.dumps({"uri": uri}) for uri in ("a.png", "b/c.png", "s3://bucket/d.png", "a.png")),
}


@pytest.mark.parametrize("name", [*MANIFESTS, "m.parquet"])
def test_a_manifest_names_images_relative_to_itself(tmp_path, name):
    if name == "m.parquet":
        write_parquet(tmp_path / name, {"uri": ["a.png", "b/c.png", "s3://bucket/d.png", "a.png"]})
    else:
        (tmp_path / name).write_text(MANIFESTS[name])
    listing = listed(tmp_path / name)
    assert (listing.kind, listing.shard_name) == ("manifest", name)
    assert [image.key for image in listing.images] == ["a.png", "b/c.png", "s3://bucket/d.png", "a.png#2"]
    assert [image.location.uri for image in listing.images] == [
        str(tmp_path / "a.png"),
        str(tmp_path / "b/c.png"),
        "s3://bucket/d.png",
        str(tmp_path / "a.png"),
    ]


def test_store_options_hold_for_images_of_the_same_scheme_only(tmp_path):
    (tmp_path / "m.txt").write_text("/data/a.png\ns3://bucket/b.png\n")
    local, remote = listed(tmp_path / "m.txt", storage_options={"auto_mkdir": False}).images
    assert (local.location.options, remote.location.options) == ({"auto_mkdir": False}, {})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.csv", "a,b\n1,2\n", r"has no clear column of image URIs. Columns: a, b. Choose one with --set input.image"),
        ("m.jsonl", '{"uri": "a"}\n[1]\n', "each line must be a JSON object"),
        ("m.jsonl", "{", "not a readable .jsonl manifest"),
        ("m.txt", "\n# nothing\n", "holds no image URI"),
        ("m.jsonl", "", "has no clear column of image URIs. Columns: none"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        listed(tmp_path / name)


def test_a_manifest_column_can_be_named(tmp_path):
    (tmp_path / "m.csv").write_text("a,where\n1,x.png\n")
    assert [image.key for image in listed(tmp_path / "m.csv", image_column="where").images] == ["x.png"]
    with pytest.raises(InputError, match="has no column 'there'"):
        listed(tmp_path / "m.csv", image_column="there")


def test_a_manifest_that_is_no_text_or_names_an_unknown_scheme_is_refused(tmp_path):
    (tmp_path / "m.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not a readable .txt manifest"):
        listed(tmp_path / "m.txt")
    (tmp_path / "n.txt").write_text("nope://a.png\n")
    with pytest.raises(PlaceError, match="nope://a.png: cannot be reached"):
        listed(tmp_path / "n.txt")
    write_photos(tmp_path / "in", [1])
    with pytest.raises(InputError, match="a manifest is one .txt, .csv, .jsonl or .parquet file"):
        listed(tmp_path / "in", format="manifest")


# ---------------------------------------------------------------- sizes
def test_the_size_of_an_image_comes_from_the_listing_or_a_sample(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / "in" / f"{number}.png").write_bytes(b"x" * 100)
    config = InputConfig(uri=str(tmp_path / "in"))
    assert sample_image_bytes(list_input(config), config) == 100
    write_tar(tmp_path / "t.tar", [(f"{number}.png", b"x" * 50) for number in range(40)])
    config = InputConfig(uri=str(tmp_path / "t.tar"))
    assert sample_image_bytes(list_input(config), config) == 1024
    write_parquet(
        tmp_path / "p.parquet", {"image": [bytes([number]) * 5000 for number in range(9)]}, compression="none"
    )
    config = InputConfig(uri=str(tmp_path / "p.parquet"))
    assert 5000 <= sample_image_bytes(list_input(config), config) < 5200
    write_tar(tmp_path / "t.tar.gz", [("a.png", b"x" * 50)], "w:gz")
    config = InputConfig(uri=str(tmp_path / "t.tar.gz"))
    assert sample_image_bytes(list_input(config), config) == 256 << 10
    (tmp_path / "broken.tar").write_bytes(b"nothing")
    config = InputConfig(uri=str(tmp_path / "broken.tar"))
    assert sample_image_bytes(list_input(config), config) == 256 << 10
