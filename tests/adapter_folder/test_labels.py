"""Label names beside an adapter's weights."""

import json

import pytest

from peft_heads.adapter_folder.labels import LABELS_FILE, find_labels, read_labels, write_labels


LABELS = {0: "cat", 1: "Kätzchen", 2: ""}


def test_what_is_written_is_read(tmp_path):
    assert read_labels(tmp_path) is None
    write_labels(tmp_path, LABELS)
    assert read_labels(tmp_path) == LABELS
    assert "Kätzchen" in (tmp_path / LABELS_FILE).read_text("utf-8")
    (tmp_path / LABELS_FILE).write_text('{"id2label": {"0": 7}}')  # by other hands
    assert read_labels(tmp_path) == {0: "7"}


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"labels": {}}', '{"id2label": ["cat"]}', '{"id2label": {"cat": 0}}'],
)
def test_a_damaged_file_is_named(content, tmp_path):
    (tmp_path / LABELS_FILE).write_text(content)
    with pytest.raises(ValueError, match=rf"{LABELS_FILE} is not a label file, expected .*id2label"):
        read_labels(tmp_path)


@pytest.mark.parametrize(("indices", "missing"), [((0, 2), 1), ((1, 2), 0)])
def test_a_gap_is_named(indices, missing, tmp_path):
    (tmp_path / LABELS_FILE).write_text(json.dumps({"id2label": dict.fromkeys(indices, "x")}))
    with pytest.raises(ValueError, match=f"names no class {missing}, but others up to 2"):
        read_labels(tmp_path)


def test_names_that_are_numbers_are_no_names(tmp_path):
    write_labels(tmp_path, {0: "LABEL_0", 1: "LABEL_1"})
    assert find_labels(str(tmp_path)) is None
    write_labels(tmp_path, {0: "LABEL_1", 1: "LABEL_0"})  # in another order they say something
    assert find_labels(str(tmp_path)) == {0: "LABEL_1", 1: "LABEL_0"}
    assert find_labels(str(tmp_path.parent), tmp_path.name) == {0: "LABEL_1", 1: "LABEL_0"}
