"""Storage: atomic writes, listings without content, and faults told apart from answers."""

import os
import threading
import uuid

import pytest

from segpipe.errors import PlaceError, StoreError
from segpipe.listing import glob_root, is_glob, list_files
from segpipe.records import Location, Version
from segpipe.storage import (
    attempt,
    create_bytes,
    delete,
    list_names,
    locate,
    open_stream,
    read_bytes,
    write_bytes,
)


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path) -> Location:
    """Return an empty folder, once on disk and once in an object store without folders."""
    if request.param == "local":
        return Location(str(tmp_path / "store"))
    return Location(f"memory://{uuid.uuid4().hex}")


def test_a_relative_path_becomes_absolute_and_a_uri_stays(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert locate("photos/").uri == str(tmp_path / "photos")
    assert locate(f"file://{tmp_path}/photos").uri == str(tmp_path / "photos")
    assert locate("s3://bucket/a/").uri == "s3://bucket/a"
    assert locate("~").uri == os.path.expanduser("~")
    assert (locate("s3://b/a").scheme, locate("a").scheme) == ("s3", "file")
    assert (locate("s3://b/a/c").parent.uri, (locate("s3://b/a") / "c").name) == ("s3://b/a", "c")


def test_what_is_written_is_read(place):
    write_bytes(place / "a" / "b.bin", b"one")
    write_bytes(place / "a" / "b.bin", b"two")
    assert read_bytes(place / "a" / "b.bin") == b"two"
    assert list_names(place / "a") == ["b.bin"]
    with open_stream(place / "a" / "b.bin") as stream:
        assert (stream.read(2), stream.tell()) == (b"tw", 2)
        assert stream.seek(1) == 1
        assert stream.read() == b"wo"
        assert stream.readable()
        assert stream.seekable()
    delete([place / "a" / "b.bin", place / "a" / "b.bin"])
    with pytest.raises(FileNotFoundError):
        read_bytes(place / "a" / "b.bin")


def test_of_many_creators_one_wins(place):
    winners = []

    def create(index: int) -> None:
        if create_bytes(place / "lease", str(index).encode()):
            winners.append(index)

    threads = [threading.Thread(target=create, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert read_bytes(place / "lease") == str(winners[0]).encode()


def test_a_local_write_that_is_cut_short_leaves_the_old_content_and_no_debris(tmp_path, monkeypatch):
    place = Location(str(tmp_path / "file"))
    write_bytes(place, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("segpipe.storage.os.fsync", full)
    monkeypatch.setattr("segpipe.storage.wait_random_exponential", lambda **_: lambda _: 0)
    with pytest.raises(StoreError, match="No space left on device"):
        write_bytes(place, b"new")
    assert read_bytes(place) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_names_of_a_missing_place_are_none(place):
    assert list_names(place / "nothing") == []


def test_files_are_listed_below_a_place_sorted_and_without_hidden_ones(place):
    for name in ("b/2.jpg", "a.jpg", "b/1.jpg", ".hidden/x.jpg", "b/.DS_Store", "b/c/_DSC1.jpg"):
        write_bytes(place / name, b"12")
    files = list_files(place)
    assert [file.name for file in files] == ["a.jpg", "b/1.jpg", "b/2.jpg", "b/c/_DSC1.jpg"]
    assert {file.version.size_bytes for file in files} == {2}
    assert read_bytes(files[3].location) == b"12"


def test_one_file_is_a_listing_of_itself(place):
    write_bytes(place / "a.tar", b"1")
    files = list_files(place / "a.tar")
    assert [(file.name, file.location.uri) for file in files] == [("a.tar", (place / "a.tar").uri)]


def test_a_glob_lists_what_matches_relative_to_its_root(place):
    for name in ("x/1.jpg", "x/y/2.jpg", "x/3.png", "z/4.jpg"):
        write_bytes(place / name, b"1")
    assert [file.name for file in list_files(place / "x" / "*.jpg")] == ["1.jpg"]
    assert [file.name for file in list_files(place / "x" / "**" / "*.jpg")] == ["1.jpg", "y/2.jpg"]
    assert [file.name for file in list_files(place / "?" / "*.jpg")] == ["x/1.jpg", "z/4.jpg"]
    assert glob_root(place / "x" / "*.jpg").uri == (place / "x").uri
    assert glob_root(place).uri == place.uri


def test_a_folder_with_brackets_in_its_name_is_no_glob(tmp_path):
    folder = tmp_path / "Summer [2023]"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"1")
    assert not is_glob(Location(str(folder)))
    assert [file.name for file in list_files(Location(str(folder)))] == ["a.jpg"]


def test_linked_folders_are_followed_once(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.jpg").write_bytes(b"1")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "dangling.jpg").symlink_to(tmp_path / "gone")
    assert [file.name for file in list_files(Location(str(tmp_path / "in")))] == [
        "dangling.jpg",  # an input that cannot be read
        "link/a.jpg",
    ]


def test_nothing_at_a_place_is_an_answer_not_a_fault(place):
    with pytest.raises(FileNotFoundError):
        list_files(place / "nothing")


def test_a_changed_file_has_another_version(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(b"1")
    os.utime(file, ns=(1, 1_700_000_000_123_456_789))
    before = list_files(Location(str(file)))[0].version
    assert str(before) == "1 bytes, modified 2023-11-14T22:13:20.123456789Z"
    os.utime(file, ns=(1, 1_700_000_000_123_456_790))
    assert list_files(Location(str(file)))[0].version != before
    assert str(Version(None, None)) == "unknown size"


def test_faults_are_tried_again_and_answers_are_not(monkeypatch):
    monkeypatch.setattr("segpipe.storage.wait_random_exponential", lambda **_: lambda _: 0)
    calls = []

    def flaky():
        calls.append(1)
        if len(calls) < 3:
            raise ConnectionResetError("reset")
        return "answer"

    assert attempt(Location("/x"), flaky) == "answer"
    assert len(calls) == 3

    def gone():
        calls.append(1)
        raise FileNotFoundError("/x")

    calls.clear()
    with pytest.raises(FileNotFoundError):
        attempt(Location("/x"), gone)
    assert len(calls) == 1


def test_a_fault_that_stays_is_a_store_error_and_a_bug_is_a_bug(monkeypatch):
    monkeypatch.setattr("segpipe.storage.wait_random_exponential", lambda **_: lambda _: 0)
    calls = []

    def broken():
        calls.append(1)
        raise TimeoutError("too slow")

    with pytest.raises(StoreError, match="/x: TimeoutError: too slow"):
        attempt(Location("/x"), broken)
    assert len(calls) == 4

    from botocore.exceptions import EndpointConnectionError

    def unreachable():
        raise EndpointConnectionError(endpoint_url="http://nowhere")

    with pytest.raises(StoreError, match="EndpointConnectionError"):
        attempt(Location("s3://b/x"), unreachable)

    def bug():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        attempt(Location("/x"), bug)


def test_a_refusal_names_rights_and_credentials():
    def refused():
        raise PermissionError("no")

    with pytest.raises(StoreError, match="s3://b/x: permission denied; check the rights or the credentials"):
        attempt(Location("s3://b/x"), refused)


def test_a_fault_in_the_middle_of_a_stream_is_a_store_error(tmp_path):
    (tmp_path / "a").write_bytes(b"123")
    with open_stream(Location(str(tmp_path / "a"))) as stream:

        class Cut:
            size = 3

            def read(self, size):
                raise OSError("connection lost")

        stream._raw = Cut()
        with pytest.raises(StoreError, match="connection lost"):
            stream.read(1)


@pytest.mark.parametrize("uri", ["nope://bucket/a", "gs:://x"])
def test_a_scheme_that_nobody_knows_is_the_users_mistake(uri):
    with pytest.raises(PlaceError, match="cannot be reached"):
        read_bytes(Location(uri))


@pytest.mark.parametrize("uri", ["s3://", "memory://", "s3:///", "gs:////"])
def test_a_uri_without_a_bucket_is_refused(uri):
    with pytest.raises(PlaceError, match="names no bucket or folder"):
        locate(uri)


def test_a_write_replaces_the_file_as_a_whole_and_is_synced_with_its_folder(tmp_path, monkeypatch):
    """A reader that opened the old file keeps it; name and content are on the disk before the call returns."""
    place = Location(str(tmp_path / "a"))
    write_bytes(place, b"old")
    inode = os.stat(place.uri).st_ino
    synced = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda number: (synced.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number))
    )
    with open(place.uri, "rb") as reader:
        write_bytes(place, b"new and longer")
        assert reader.read() == b"old"
    assert os.stat(place.uri).st_ino != inode
    assert [os.path.isdir(path) for path in synced] == [False, True]
    assert synced[1] == str(tmp_path)
    create_bytes(Location(str(tmp_path / "b")), b"1")
    assert synced[2:] == [str(tmp_path / "b")]


def test_a_file_that_cannot_be_created_whole_is_not_there(tmp_path, monkeypatch):
    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    with pytest.raises(StoreError, match="No space left"):
        create_bytes(Location(str(tmp_path / "lease.json")), b"{}")
    assert not list(tmp_path.iterdir())
