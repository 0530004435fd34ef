"""Input that means harm: it becomes rows, and nothing is written, read or run that should not be."""

import io
import os
import tarfile
from pathlib import Path

import duckdb
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from segpipe.errors import HopelessError, InputError, ShardCorruptError
from segpipe.images import decode_image
from segpipe.lake import read_table
from segpipe.listing import list_files
from segpipe.pipeline import run
from segpipe.records import Location, Shard, Version
from segpipe.shards.manifest import read_manifest
from segpipe.shards.webdataset import read_webdataset
from segpipe.validation import validate
from tests.factory import cells, config, encode, photo, photo_members, write_parquet, write_photos, write_tar

NAMES = [
    "'; DROP TABLE images; --.png",
    '<script>alert("x")</script>.png',
    "two\nlines.png",
    "tab\tand \\ backslash.png",
    "[red]rich markup[/red].png",
    "\u202eright to left.png",
    "null\u0001control.png",
    "x" * 200 + ".png",
]


def everything_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def write_members(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def test_members_that_lead_out_of_a_tar_are_images_like_others_and_nothing_is_unpacked(tmp_path):
    evil = [
        member("/etc/absolute.png", photo(0)),
        member("../../up.png", photo(1)),
        member("link.png", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        member("hard.png", type=tarfile.LNKTYPE, linkname="/etc/passwd"),
        member("device.png", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
        member("fifo.png", type=tarfile.FIFOTYPE),
        member("folder.png", type=tarfile.DIRTYPE),
        member("same.png", photo(2)),
        member("same.png", photo(3)),
        member(".png", photo(4)),
    ]
    write_members(tmp_path / "in" / "evil.tar", evil)
    before = everything_below(tmp_path)
    run(config(tmp_path / "in", tmp_path / "lake"))
    written = everything_below(tmp_path) - before
    assert all(name == "lake" or name.startswith("lake" + os.sep) for name in written)
    rows = read_table(str(tmp_path / "lake"), "images").to_pylist()
    assert [row["key"] for row in rows] == ["/etc/absolute.png", "../../up.png", "same.png", "same.png#2"]
    assert {row["status"] for row in rows} == {"ok"}


def test_sparse_members_and_long_names_are_read_as_they_are(tmp_path):
    long_name = "/".join(["folder" * 10] * 8) + "/x.png"
    write_members(tmp_path / "in" / "a.tar", [member(long_name, photo(0))], format=tarfile.PAX_FORMAT)
    sparse = tmp_path / "sparse.png"
    sparse.write_bytes(photo(1) + b"\0" * 200_000)
    os.system(f"tar --sparse -cf {tmp_path / 'in' / 'b.tar'} -C {tmp_path} sparse.png")  # noqa: S605
    run(config(tmp_path / "in", tmp_path / "lake"))
    rows = read_table(str(tmp_path / "lake"), "images").to_pylist()
    assert [(row["key"], row["status"]) for row in rows] == [(long_name, "ok"), ("sparse.png", "ok")]


def test_a_member_that_claims_more_bytes_than_allowed_is_a_row_and_the_rest_is_read(tmp_path):
    members = [member("big.png", b"\0" * 300_000), member("small.png", photo(0))]
    write_members(tmp_path / "in" / "a.tar", members)
    run(config(tmp_path / "in", tmp_path / "lake", input__max_bytes=100_000, output__max_failed_share=1))
    rows = read_table(str(tmp_path / "lake"), "images").to_pylist()
    assert [(row["key"], row["error_type"]) for row in rows] == [("big.png", "TooManyBytes"), ("small.png", None)]
    assert rows[0]["error_message"] == "300,000 bytes, input.max_bytes allows 100,000"


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_an_image_of_too_many_bytes_is_a_row_in_every_kind_of_input(tmp_path, kind):
    big = photo(0) + b"\0" * 100_000
    if kind == "folder":
        write_photos(tmp_path / "in", [1])
        (tmp_path / "in" / "big.png").write_bytes(big)
    else:
        write_parquet(tmp_path / "in" / "a.parquet", {"image": [big, photo(1)], "key": ["big.png", "b.png"]})
    run(config(tmp_path / "in", tmp_path / "lake", input__max_bytes=50_000, output__max_failed_share=1))
    rows = {row["key"]: row["error_type"] for row in read_table(str(tmp_path / "lake"), "images").to_pylist()}
    assert rows["big.png"] == "TooManyBytes"
    assert sorted(map(str, rows.values())) == ["None", "TooManyBytes"]


def test_names_with_sql_html_and_control_characters_stay_text(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    possible = [name for name in NAMES if "/" not in name]  # in a file's own name
    for number, name in enumerate(possible):
        (folder / name).write_bytes(photo(number))
    with open(os.fsencode(folder) + b"/not utf8 \xff.png", "wb") as file:
        file.write(photo(99))
    run(config(folder, tmp_path / "lake"))
    names = set(read_table(str(tmp_path / "lake"), "images")["image_id"].to_pylist())
    assert names == {*possible, "not utf8 \\xff.png"}
    glob = str(tmp_path / "lake" / "images" / "*" / "*.parquet")
    with duckdb.connect() as connection:
        query = "SELECT count(*) FROM read_parquet(?) WHERE image_id = ?"
        assert connection.execute(query, [glob, NAMES[0]]).fetchall() == [(1,)]
    assert all(found.is_valid for found in validate(str(tmp_path / "lake")))


def test_a_folder_with_hostile_names_in_a_tar(tmp_path):
    write_tar(tmp_path / "in" / "a.tar", [(name, photo(number)) for number, name in enumerate(NAMES)])
    run(config(tmp_path / "in", tmp_path / "lake"))
    assert read_table(str(tmp_path / "lake"), "images")["key"].to_pylist() == NAMES


def test_parquet_of_wrong_types_and_null_images(tmp_path):
    write_parquet(
        tmp_path / "in" / "a.parquet", {"image": [photo(0), None, b"", b"no image"], "key": ["a", None, "", "a"]}
    )
    run(config(tmp_path / "in", tmp_path / "lake", output__max_failed_share=1))
    rows = read_table(str(tmp_path / "lake"), "images").to_pylist()
    assert [(row["key"], row["error_type"]) for row in rows] == [
        ("a", None), ("000000001", "Empty"), ("000000002", "Empty"), ("a#2", "NotAnImage"),
    ]  # fmt: skip
    write_parquet(tmp_path / "bad" / "a.parquet", {"image": [1, 2]})
    with pytest.raises(InputError, match="has no clear image column. Columns of bytes: none; all: image"):
        run(config(tmp_path / "bad", tmp_path / "lake2", input__format="parquet"))


# ---------------------------------------------------------------- manifests
def manifest(tmp_path, *uris: str, remote: bool = False) -> Location:
    if remote:
        import fsspec

        place = Location(f"memory://{tmp_path.name}/list.txt")
        fsspec.filesystem("memory").pipe(place.uri, "\n".join(uris).encode())
        return place
    (tmp_path / "list.txt").write_text("\n".join(uris))
    return Location(str(tmp_path / "list.txt"))


@pytest.mark.parametrize("uri", ["file:///etc/passwd", "/etc/passwd"])
def test_a_remote_manifest_may_not_name_files_of_this_machine(tmp_path, uri):
    with pytest.raises(
        InputError, match="entry 2, .*, is a file address, which a remote manifest may not name; add 'file'"
    ):
        read_manifest(manifest(tmp_path, "a.png", uri, remote=True))
    assert len(read_manifest(manifest(tmp_path, uri, remote=True), allowed_schemes=["file"])) == 1
    assert len(read_manifest(manifest(tmp_path, uri))) == 1  # a local manifest is its user's own


@pytest.mark.parametrize(
    "uri",
    [
        "http://169.254.169.254/latest/meta-data/iam/x.png",
        "http://[fe80::1]/x.png",
        "https://metadata.google.internal/x.png",
        "http://METADATA.google.internal./x.png",
    ],
)
def test_addresses_of_metadata_services_are_refused_whatever_is_allowed(tmp_path, uri):
    for allowed in ((), ("http", "https")):
        with pytest.raises(InputError, match="is a link-local address; remove it"):
            read_manifest(manifest(tmp_path, uri), allowed_schemes=allowed)


def test_schemes_that_are_not_named_are_refused(tmp_path):
    place = manifest(tmp_path, "s3://bucket/a.png", "gs://bucket/b.png")
    assert len(read_manifest(place)) == 2
    with pytest.raises(
        InputError, match="entry 2, gs://bucket/b.png, is a gs address, which input.allowed_schemes does not"
    ):
        read_manifest(place, allowed_schemes=["s3"])


# ---------------------------------------------------------------- limits of a whole run
def test_a_wrong_input_is_stopped_early_and_what_is_committed_stays(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(600):
        (folder / f"{number:04d}.png").write_bytes(b"no image")
    chosen = config(folder, tmp_path / "lake", input__chunk_images=50)
    with pytest.raises(HopelessError, match="200 of the first 200 images failed, output.max_failed_share allows 0.1"):
        run(chosen)
    assert read_table(str(tmp_path / "lake"), "images").num_rows == 200
    summary = run(config(folder, tmp_path / "lake", input__chunk_images=50, output__max_failed_share=1))
    assert (summary.state, summary.totals.images, summary.skipped) == ("done", 600, 200)


# ---------------------------------------------------------------- fuzzing
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_tar_gives_images_then_ends_as_a_corrupt_shard_or_properly(tmp_path, data):
    content = bytearray(TAR)
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    path = tmp_path / "fuzzed.tar"
    path.write_bytes(content[:cut] if data.draw(st.booleans()) else content)
    shard = Shard("fuzzed.tar", Location(str(path)), Version(path.stat().st_size, None))
    try:
        found = list(read_webdataset(shard, lambda _: True, max_bytes=1 << 20))
    except ShardCorruptError:
        return
    assert all(isinstance(content, (bytes, int)) for _, content in found)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_image_is_decoded_or_rejected(data):
    from segpipe.errors import ImageRejectedError

    content = bytearray(
        encode(cells(["red", "blue"]), data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP"])))
    )
    for _ in range(data.draw(st.integers(1, 10))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_image(bytes(content), max_pixels=1_000_000)
    except ImageRejectedError as error:
        assert len(str(error)) < 400
        return
    assert decoded.pixels.shape == (decoded.header.height, decoded.header.width, 3)


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in [*photo_members(range(3)), ("\u00e4" * 120 + ".png", photo(5))]:
            info, data = member(name, content)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


TAR = _tar()


def test_listing_a_folder_reads_no_file_and_leaves_out_what_is_none(tmp_path):
    write_photos(tmp_path / "in", range(2))
    os.mkfifo(tmp_path / "in" / "pipe.png")
    assert [file.name for file in list_files(Location(str(tmp_path / "in")))] == ["photo_000.png", "photo_001.png"]
