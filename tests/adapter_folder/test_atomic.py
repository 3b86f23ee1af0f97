import os

import pytest

from peft_heads.adapter_folder.atomic import new_files, new_folder, write_atomically, write_together


def test_writes_text_and_bytes(tmp_path):
    path = write_atomically(tmp_path / "new" / "a.txt", "Übung")
    assert path.read_text("utf-8") == "Übung"
    assert write_atomically(path, b"\x00").read_bytes() == b"\x00"
    assert os.listdir(path.parent) == ["a.txt"]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert path.stat().st_mode == ordinary.stat().st_mode


@pytest.mark.parametrize("where", ["os.fsync", "os.replace"])
def test_a_crash_leaves_the_old_file(tmp_path, monkeypatch, where):
    path = write_atomically(tmp_path / "a.txt", "old")

    def crash(*args):
        raise OSError("disk full")

    monkeypatch.setattr(where, crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_new_folder_has_ordinary_rights(tmp_path):
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "a" / "b").exists()
    (tmp_path / "ordinary").mkdir()
    assert (tmp_path / "a" / "b").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert os.listdir(tmp_path / "a") == ["b"]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "x").touch()
    assert os.listdir(tmp_path / "empty") == ["x"]


@pytest.mark.parametrize("crash_at", [0, 1, 2, 3])
def test_a_crash_leaves_the_old_folder(tmp_path, monkeypatch, crash_at):
    """The crash comes in the block, while the files are flushed, at the first renaming, or at the second."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename, calls = os.rename, []

    def crash(*args):
        calls.append(args)
        if crash_at == 1 or len(calls) == crash_at - 1:
            raise OSError("disk full")
        return rename(*args)

    monkeypatch.setattr("os.fsync" if crash_at == 1 else "os.rename", crash)
    with pytest.raises(OSError, match="disk full"), new_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
        if crash_at == 0:
            raise OSError("disk full")
    assert os.listdir(tmp_path) == ["target"] and (target / "config.json").read_text() == "old"


@pytest.mark.parametrize("old", [(), ("b",), ("a", "b")])
def test_files_that_belong_together(tmp_path, old):
    for name in old:
        (tmp_path / name).write_text("old")
    write_together({tmp_path / "a": "new", tmp_path / "b": b"new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}


@pytest.mark.parametrize("old", [(), ("b",), ("a", "b")])
@pytest.mark.parametrize("crash_at", [0, 1, 2, 3, 4])
def test_a_crash_leaves_the_old_files(tmp_path, monkeypatch, old, crash_at):
    """The crash comes while they are written, or at a renaming; no reader ever finds an old beside a new file."""
    for name in old:
        (tmp_path / name).write_text("old")
    rename, calls = os.rename, []

    def crash(*args):
        assert len({path.read_text() for path in tmp_path.iterdir() if path.is_file()}) < 2
        calls.append(args)
        if len(calls) == crash_at or crash_at == 0:
            raise OSError("disk full")
        return rename(*args)

    monkeypatch.setattr("os.fsync" if crash_at == 0 else "os.rename", crash)
    contents = {tmp_path / "a": "new", tmp_path / "b": "new"}
    if crash_at > len(old) + 2:
        write_together(contents)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new", "b": "new"}
    else:
        with pytest.raises(OSError, match="disk full"):
            write_together(contents)
        assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(old, "old")


def test_an_old_file_without_a_new_one_goes(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text("old")
    with pytest.raises(OSError, match="broken"), new_files(tmp_path / "a", tmp_path / "b") as folder:
        (folder / "a").write_text("new")
        raise OSError("broken")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "old", "b": "old"}
    with new_files(tmp_path / "a", tmp_path / "b") as folder:
        (folder / "a").write_text("new")
        (folder / "scratch").mkdir()
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "new"}


def test_a_folder_that_comes_meanwhile_is_not_replaced(tmp_path):
    target = tmp_path / "target"
    with pytest.raises(ValueError, match="exists already"), new_folder(target) as folder:
        (folder / "config.json").write_text("mine")
        target.mkdir()
        (target / "config.json").write_text("theirs")
    assert (target / "config.json").read_text() == "theirs" and os.listdir(tmp_path) == ["target"]


def test_links_and_impossible_places(tmp_path):
    (tmp_path / "real").mkdir()
    for name, to in (("link", tmp_path / "real"), ("dangling", tmp_path / "gone")):
        (tmp_path / name).symlink_to(to)
        with pytest.raises(ValueError, match="is a link, which is not replaced"), new_folder(tmp_path / name, True):
            pytest.fail("is entered")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written: "), new_folder(tmp_path / "file" / "target"):
        pytest.fail("is entered")
