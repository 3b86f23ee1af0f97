import pytest
from benchmark_runs import heads, make_run

from peft_heads.benchmark.report.rows import common_and_own, make_rows


def test_runs_that_differ_in_task_and_seed_share_a_row():
    runs = [make_run("cifar", 0.5), make_run("cifar", 0.7, seed=1), make_run("dtd", 0.2)]
    (row,) = make_rows(runs)
    assert row.samples() == {"cifar": {(0, 0): 50.0, (0, 1): 70.0}, "dtd": {(0, 0): 20.0}}
    assert row.mean("cifar") == pytest.approx(60) and row.mean("svhn") is None
    assert row.is_test and row.method == {"name": "lora"}


@pytest.mark.parametrize(
    "other",
    [
        {"environment": {"image_format": "JPEG"}},
        {"environment": {"checkpoint_revision": "r2"}},
        {"environment": {"dirty": True}},
        {"spec": {"preprocessing": {"resize": "bilinear", "normalization": "none"}}},
        {"spec": {"recipe": {"learning_rate": 1e-3, "drop_path": 0.0}}},
        {"spec": {"backbone": "another"}},
        {"spec": {"epochs": 10}},
        {"spec": {"shots": 4, "list_seed": 0}},
        {"method": ("lora", {"r": 4})},
        {"split": "val200"},
    ],
)
def test_whatever_changes_the_number_makes_another_row(other):
    assert len(make_rows([make_run(seed=0), make_run(seed=1, **other)])) == 2


def test_versions_and_device_do_not():
    rows = make_rows(
        [make_run(), make_run(seed=1, environment={"versions": {"torch": "2.14.0"}, "device": "cuda: A"})]
    )
    assert len(rows) == 1


def test_different_data_is_not_averaged():
    other = {"environment": {"data_fingerprint": {"train": "00"}}}
    (row,) = make_rows([make_run(seed=0), make_run(seed=1, **other), make_run("dtd", 0.3, seed=1, **other)])
    assert row.samples() == {"dtd": {(0, 1): 30.0}}
    assert row.notes == ("cifar: left out, its runs were on different data (data_fingerprint)",)
    # few-shot lists are different data by design
    lists = [
        make_run(spec={"shots": 1, "list_seed": i}, environment={"data_fingerprint": {"train": i}}) for i in (0, 1)
    ]
    (row,) = make_rows(lists)
    assert set(row.samples()["cifar"]) == {(0, 0), (1, 0)} and row.notes == ()


def test_different_contents_are_not_averaged():
    """The same holds beside results of earlier versions, which do not record their contents."""

    def run(seed, content=None):
        part = {"sha256": "1"} | ({} if content is None else {"content_sha256": content})
        return make_run(seed=seed, environment={"data_fingerprint": {"train": part}})

    (row,) = make_rows([run(0), run(1, "a"), run(2, "a")])
    assert len(row.samples()["cifar"]) == 3 and row.notes == ()
    (row,) = make_rows([run(0), run(1, "a"), run(2, "b")])
    assert row.samples() == {} and len(row.notes) == 1


def test_runs_without_accuracy_are_left_out():
    assert make_rows([make_run(accuracy=None, partial=True)]) == []


def test_what_rows_share_and_what_not():
    rows = make_rows([make_run(), make_run(method=heads(1), spec={"recipe": {"drop_path": 0.0}})])
    common, own = common_and_own(rows)
    assert common["preprocessing.resize"] == "bicubic" and common["image_format"] == "PNG"
    assert own == [
        {"recipe.drop_path": 0.0, "recipe.learning_rate": None},
        {"recipe.drop_path": 0.1, "recipe.learning_rate": 0.001},
    ]


def test_a_jpeg_tree_with_some_other_images_is_one_row():
    runs = [
        make_run("cifar", environment={"image_format": "JPEG"}),
        make_run("dtd", environment={"image_format": "JPEG+PNG"}),
        make_run("svhn", environment={"image_format": "PNG"}),
    ]
    assert [sorted(row.runs) for row in make_rows(runs)] == [["cifar", "dtd"], ["svhn"]]
