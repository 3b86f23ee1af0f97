"""The lists of published trees, line by line."""

import re

import pytest

from peft_heads.data.formats import LEAVES, Layout, read_json_list, read_json_object, read_text_list


def test_text_lists(tmp_path):
    path = tmp_path / "test.txt"
    path.write_text("﻿a b.jpg 3\r\n\n  \nc.jpg -1\n", encoding="utf-8")
    rows, faults = read_text_list(path)
    assert [tuple(row) for row in rows] == [("a b.jpg", 3, "test.txt:1"), ("c.jpg", -1, "test.txt:4")]
    assert not faults


@pytest.mark.parametrize("line", ["a.jpg", "a.jpg x", " 3", "a.jpg 1.5", "a.jpg 1234567890", "a.jpg ٣"])
def test_a_line_that_is_none_is_named(line, tmp_path):
    path = tmp_path / "test.txt"
    path.write_text(f"a.jpg 0\n{line}\nb.jpg 1\n", encoding="utf-8")
    rows, faults = read_text_list(path)
    assert [row.image for row in rows] == ["a.jpg", "b.jpg"]
    assert len(faults) == 1 and faults[0].startswith("test.txt:2: ")


def test_json_lists(tmp_path):
    path = tmp_path / "val.json"
    path.write_text('[{"a.jpg": 1}, {"b.jpg": "x"}, {"c.jpg": 1, "d.jpg": 2}, {"e.jpg": true}, {"f.jpg": 0}]')
    rows, faults = read_json_list(path)
    assert [tuple(row) for row in rows] == [("a.jpg", 1, "val.json, entry 1"), ("f.jpg", 0, "val.json, entry 5")]
    assert [fault.partition(":")[0] for fault in faults] == [f"val.json, entry {number}" for number in (2, 3, 4)]


def test_a_json_object_keeps_paths_that_stand_twice(tmp_path):
    path = tmp_path / "val.json"
    path.write_text('{"a.jpg": "cat", "b.jpg": 2, "a.jpg": "dog"}')
    rows, faults = read_json_object(path)
    assert [(row.image, row.label) for row in rows] == [("a.jpg", "cat"), ("b.jpg", 2), ("a.jpg", "dog")]
    assert not faults


@pytest.mark.parametrize(
    ("read", "content", "fault"),
    [
        (read_json_list, b"[", "is no JSON"),
        (read_json_list, b'{"a.jpg": 1}', "is not a list of objects with one entry"),
        (read_json_object, b"[]", "is not an object of path: class"),
        (read_json_object, b"\xff", "is not UTF-8"),
        (read_text_list, b"\xff", "is not UTF-8"),
    ],
)
def test_a_file_that_is_no_list(read, content, fault, tmp_path):
    path = tmp_path / "val.json"
    path.write_bytes(content)
    rows, faults = read(path)
    assert rows == [] and len(faults) == 1
    assert faults[0].startswith(f"val.json {fault}")


def test_layout(tmp_path):
    layout = Layout("some", read_text_list, "lists/{split}.list", ("images", ""))
    assert layout.list_path(tmp_path, "val") == tmp_path / "lists" / "val.list"
    assert layout.list_path(tmp_path, "train", 4, 2) == tmp_path / "lists" / "train.list.num_shot_4.seed_2"
    assert layout.image_folder(tmp_path, "a.jpg") == "images"  # where it is said to be missing
    (tmp_path / "a.jpg").touch()
    assert layout.image_folder(tmp_path, "a.jpg") == ""


@pytest.mark.parametrize("path", ["../a", "a/../b", "a\\..\\b", "/a", "\\a", "C:a", "a\0b", "a/.."])
def test_paths_that_lead_out(path):
    assert re.search(LEAVES, path)


@pytest.mark.parametrize("path", ["a/b.jpg", "..a/b..jpg", "a...b", "a b/c:d"])
def test_paths_that_stay(path):
    assert not re.search(LEAVES, path)
