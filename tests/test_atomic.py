import os

import pytest

from peft_heads.atomic import write_atomically


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
