"""Dataclasses that are written as JSON."""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from peft_heads.benchmark.records.schema import canonical_json, check_fields, check_type, from_mapping, unique


@dataclass(frozen=True)
class Inner:
    text: str

    @classmethod
    def from_json(cls, data):
        return cls(data)

    def to_json(self):
        return self.text


@dataclass(frozen=True)
class Record:
    number: int
    share: float
    numbers: dict[str, list[int]]
    inner: Inner
    free: Any = None
    maybe: str | None = None


DATA = {"number": 1, "share": 2, "numbers": {"a": [1, 2]}, "inner": "words"}


def test_from_mapping():
    record = from_mapping(Record, DATA)
    assert record == Record(1, 2, {"a": [1, 2]}, Inner("words"))
    check_fields(record)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([1], "must be a mapping of fields; got list"),
        ({**DATA, "colour": 1}, r"unknown field colour \(known: number, share, numbers, inner, free, maybe\)"),
        ({name: value for name, value in DATA.items() if name != "share"}, "share is missing"),
    ],
)
def test_other_mappings(data, message):
    with pytest.raises(ValueError, match=message):
        from_mapping(Record, data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": 1.0}, "number must be int; got float 1.0"),
        ({"number": True}, "number must be int; got bool True"),
        ({"share": False}, "share must be float; got bool False"),
        ({"numbers": {"a": [1, "2"]}}, r"numbers\['a'\]\[1\] must be int; got str '2'"),
        ({"numbers": {1: []}}, "key of numbers must be str; got int 1"),
        ({"maybe": 3}, "maybe must be str; got int 3"),
        ({"free": {1, 2}}, "free cannot be written as JSON"),
    ],
)
def test_the_first_wrong_field_is_named(changes, message):
    record = Record(**({**DATA, "inner": Inner("words")} | changes))
    with pytest.raises(ValueError, match=message):
        check_fields(record)


def test_a_whole_number_passes_for_a_float_and_none_where_it_may_be():
    check_type(3, float, "share")
    check_type(None, float | None, "share")
    check_type(object(), Any, "share")
    with pytest.raises(ValueError, match="share must be float; got NoneType None"):
        check_type(None, float, "share")


def test_equal_values_have_equal_json():
    assert canonical_json({"b": 1.0, "a": (2, Inner("x"))}) == '{"a":[2,"x"],"b":1}' == canonical_json(
        {"a": [2.0, "x"], "b": 1}
    )  # fmt: skip
    assert canonical_json([math.nan, math.inf, 0.5, True]) == "[null,null,0.5,true]"


def test_unique():
    assert unique([{"a": 1}, {"b": 2}, {"a": 1.0}, {}]) == [{"a": 1}, {"b": 2}, {}]
    assert unique(["b", "B", "a"], key=str.lower) == ["B", "a"]
