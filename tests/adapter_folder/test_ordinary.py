import os

import pytest

from peft_heads.adapter_folder.ordinary import check_ordinary, check_regular


def test_files_and_what_is_missing(tmp_path):
    (tmp_path / "file").write_text("abc")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert check_regular(tmp_path / name).st_size == 3
        assert check_ordinary(tmp_path / name) is None
    (tmp_path / "broken").symlink_to("gone")
    for name in ("gone", "broken"):
        assert check_ordinary(tmp_path / name) is None
        with pytest.raises(FileNotFoundError):
            check_regular(tmp_path / name)


@pytest.mark.parametrize("kind", ["a folder", "no ordinary file (a pipe or a device)"])
def test_anything_else_is_refused(tmp_path, kind):
    path = tmp_path / "it"
    path.mkdir() if kind == "a folder" else os.mkfifo(path)
    with pytest.raises(ValueError, match="^is not a regular file$"):
        check_regular(path)
    with pytest.raises(ValueError) as caught:
        check_ordinary(path)
    assert str(caught.value) == f"{path} is {kind}; expected a file of an adapter"
