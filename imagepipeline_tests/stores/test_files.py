"""Files appear whole, and nothing outside the storage root is opened."""

import os

import pytest

from imagepipeline.errors import InvalidUploadError, MissingOriginalError, UnsafePathError


def test_an_original_is_found_by_its_id(files):
    path = files.put_original("a", b"x", "jpg")
    assert path == files.find_original("a") == "original/a.jpg"
    assert files.read(path) == b"x"


def test_a_missing_original_is_a_permanent_error(files):
    with pytest.raises(MissingOriginalError, match=r"original/a\.\*"):
        files.find_original("a")
    files.put_original("b", b"x", "jpg")
    with pytest.raises(MissingOriginalError, match=r"original/a\.jpg"):
        files.read("original/a.jpg")


def test_two_originals_of_one_id_are_named(files):
    files.write("original/a.jpg", b"1")
    files.write("original/a.png", b"2")
    with pytest.raises(MissingOriginalError, match=r"a\.jpg, a\.png"):
        files.find_original("a")


def test_a_longer_id_is_another_image(files):
    files.put_original("ab", b"x", "jpg")
    with pytest.raises(MissingOriginalError):
        files.find_original("a")


def test_a_new_original_takes_the_place_of_the_old_one(files):
    files.put_original("a", b"1", "jpg")
    files.put_original("a", b"2", "png")
    assert files.read(files.find_original("a")) == b"2"


def test_an_id_that_is_none_never_reaches_the_disk(files):
    for image_id in ("*", "../x", "a/b", ""):
        with pytest.raises(InvalidUploadError):
            files.find_original(image_id)
        with pytest.raises(InvalidUploadError):
            files.put_original(image_id, b"", "jpg")


@pytest.mark.parametrize("kind", ["link", "link to a folder", "fifo", "folder"])
def test_only_plain_files_are_read(files, tmp_path, kind):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "a.jpg").write_bytes(b"secret")
    files.write("original/x.jpg", b"")
    target = files.root / "original" / "a.jpg"
    path = "original/a.jpg"
    if kind == "link":
        target.symlink_to(secret / "a.jpg")
    elif kind == "link to a folder":
        (files.root / "original" / "sub").symlink_to(secret)
        path = "original/sub/a.jpg"
    elif kind == "fifo":
        os.mkfifo(target)
    else:
        target.mkdir()
    with pytest.raises(MissingOriginalError):
        files.read(path)


def test_no_more_than_the_limit_is_read(files):
    files.write("original/a.jpg", b"x" * 100)
    assert len(files.read("original/a.jpg", max_bytes=10)) == 11


def test_a_file_is_replaced_whole_and_nothing_is_left_beside(files):
    files.write("variants/a/b.webp", b"old")
    files.write("variants/a/b.webp", b"new")
    assert files.read("variants/a/b.webp") == b"new"
    assert [path.name for path in (files.root / "variants" / "a").iterdir()] == ["b.webp"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(files, monkeypatch):
    files.write("variants/b.webp", b"old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write("variants/b.webp", b"new")
    assert files.read("variants/b.webp") == b"old"
    assert len(list((files.root / "variants").iterdir())) == 1


@pytest.mark.parametrize("folder", ["original", "variants"])
def test_nothing_is_written_or_listed_through_a_link(files, tmp_path, folder):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "a.jpg").write_bytes(b"theirs")
    files.root.mkdir()
    (files.root / folder).symlink_to(outside)
    with pytest.raises(UnsafePathError, match=f"{folder}/a.jpg"):
        files.write(f"{folder}/a.jpg", b"ours")
    assert (outside / "a.jpg").read_bytes() == b"theirs"
    with pytest.raises(MissingOriginalError):
        files.find_original("a")
