import pytest
from benchmark_runs import heads, make_run

from peft_heads.benchmark.report.accuracy_tables import accuracy_table, cost_table, papers_name, validation_table
from peft_heads.benchmark.report.groups import suite_groups
from peft_heads.benchmark.report.rows import make_rows


GROUPS = suite_groups("vtab")
SMALL = {"a": "one", "b": "one", "c": "two"}


def small_run(*args, **kwargs):
    return make_run(*args, suite="small", **kwargs)


def table_of(runs, groups=SMALL):
    return accuracy_table(make_rows(runs), groups, "title")


def find(table, label):
    (row,) = (row for row in table.rows if row.label == label)
    return {column.name: text for column, text in zip(table.columns, row.texts(table.columns), strict=True)}


def test_mean_and_deviation_over_seeds_and_both_averages():
    runs = [small_run(task, 0.1 * i + 0.02 * seed, seed) for i, task in enumerate(SMALL, 1) for seed in (0, 1)]
    table = table_of(runs)
    # 10 and 12, 20 and 22, 30 and 32: each 11, 21, 31 ± √2; all averages move by 2 as well
    assert find(table, "lora") == {
        "a": "11.0 ± 1.4",
        "b": "21.0 ± 1.4",
        "c": "31.0 ± 1.4",
        "one": "16.00 ± 1.41",
        "two": "31.00 ± 1.41",
        "mean of group means": "23.50 ± 1.41",
        "mean of tasks": "21.00 ± 1.41",
        "size (MB)": "1.00",
        "parameters (M)": "0.40",
    }
    assert "Mean ± std over seeds 0, 1, where nothing else is said; a single seed has no std." in table.notes
    assert [column.group for column in table.columns[:4]] == ["one", "one", "two", "averages"]


def test_a_missing_task_is_a_dash_and_said():
    table = table_of([small_run("a", 0.5), small_run("c", 0.7)])
    row = find(table, "lora")
    assert (row["b"], row["one"], row["two"]) == ("–", "–", "70.00")
    assert row["mean of group means"] == row["mean of tasks"] == "–"
    assert "Missing, so there is no average over it: lora: b" in table.notes


def test_what_changes_the_number_stands_in_the_label_or_under_the_table():
    runs = [small_run("a"), small_run("a", spec={"recipe": {"learning_rate": 1e-3, "drop_path": 0.0}})]
    runs.append(small_run("a", 0.9, environment={"dirty": True}))
    table = table_of(runs)
    assert {row.label for row in table.rows} == {
        "lora, recipe.drop_path=0.0",
        "lora, recipe.drop_path=0.1 (unofficial)",
        "lora, recipe.drop_path=0.1",
    }
    for words in (
        "preprocessing.resize bicubic",
        "preprocessing.normalization none",
        "image_format PNG",
        "epochs 100",
    ):
        assert words in table.notes[0]
    assert "drop_path" not in table.notes[0]
    table = table_of([small_run("a"), small_run("b", environment={"versions": {"torch": "2.14.0"}, "commit": None})])
    assert "Versions: torch 2.13.0 / 2.14.0, commit abc / none (installed package)" in table.notes


def test_other_seeds_are_said():
    table = table_of([small_run(task, seed=seed) for task in "abc" for seed in ((0, 1) if task < "c" else (5,))])
    assert "lora: seeds 0, 1 (2 tasks); seeds 5 (1 tasks)" in table.notes
    lists = [small_run("a", seed=7, spec={"shots": 1, "list_seed": i}) for i in (0, 1)]
    assert any(note.startswith("Mean ± std over list/seed 0/7, 1/7,") for note in table_of(lists).notes)


def test_rows_chosen_per_task_stand_apart_with_their_choices():
    runs = [
        small_run(task, accuracy, method=heads(ne), split=split, best=best)
        for task in SMALL
        for ne, split, accuracy, best in (
            (0, "val200", 0.6, None),
            (1, "val200", 0.7, None),
            (0, "test", 0.65, 0.66),
            (1, "test", 0.55, None),
        )
    ]
    table = table_of(runs)
    sections = {row.label: row.section for row in table.rows}
    assert sections == {
        "head-masked-lora criterion=absolute ne=0": "This package, last epoch",
        "head-masked-lora criterion=absolute ne=1": "This package, last epoch",
        "head-masked-lora, best per task chosen on val200": "This package, chosen per task on validation",
        "head-masked-lora, best of all variants per task, chosen on test (as in the paper)": (
            "Not a result: chosen on test"
        ),
        "head-masked-lora criterion=absolute ne=0, best epoch per run, chosen on test": (
            "Not a result: best epoch on test"
        ),
    }
    labels = list(sections)
    assert [find(table, label)["mean of tasks"] for label in labels] == ["65.00", "55.00", "55.00", "65.00", "66.00"]
    choice = "head-masked-lora, best per task chosen on val200 (chosen from 2 variants): " + "; ".join(
        f"{task}: criterion=absolute ne=1" for task in SMALL
    )
    assert choice in table.notes
    validation = validation_table(make_rows(runs), SMALL, "v")
    assert [row.cells["mean of tasks"].mean for row in validation.rows] == [pytest.approx(60), pytest.approx(70)]
    assert validation_table(make_rows([small_run("a")]), SMALL, "v") is None


def test_a_choice_among_scales_only_stands_there_once():
    runs = [
        small_run("a", accuracy, method=("lora", {"scale": scale}), split=split)
        for scale, accuracy in ((0.1, 0.3), (1, 0.4))
        for split in ("val200", "test")
    ]
    labels = [row.label for row in table_of(runs).rows]
    # the runs with scale=1 are those that were chosen
    assert labels == [
        "lora scale=0.1",
        "lora, scale per task chosen on val200",
        "lora, best of all variants per task, chosen on test (as in the paper)",
    ]


def test_published_rows_stand_beside():
    table = table_of([make_run("cifar")], GROUPS)
    full = find(table, "Full (HEAT, Table 1)")
    assert full["cifar"] == "68.9" and full["average as printed"] == "68.90"
    assert (full["mean of group means"], full["mean of tasks"]) == ("68.97", "65.57")
    headline = find(table, "HEAT [best of all variants per task, chosen on test] (HEAT, Table 1)")
    assert headline["average as printed"] == headline["mean of group means"] == "77.20"
    fixed = find(table, "HEAT negative, ne = 1 [fixed setting] (HEAT, Table 4)")
    assert fixed["cifar"] == "–" and fixed["mean of group means"] == "76.77"
    assert any("A fixed setting compares with HEAT, Table 4" in note for note in table.notes)
    assert {row.section for row in table.rows} == {"This package, last epoch", "Published, ViT-B/16"}
    assert not any("MAE" in row.label for row in table.rows)


def test_published_averages_that_do_not_follow_are_said():
    swin = {"backbone": "microsoft/swin-base-patch4-window7-224-in22k"}
    table = table_of([make_run("cifar", spec=swin)], GROUPS)
    assert {row.section for row in table.rows[1:]} == {"Published, Swin-B"}
    assert "VPT-Deep (RLRR, Table 7): the mean of tasks is printed as 67.7, but its figures give 68.59" in table.notes
    assert len(table_of([make_run("cifar", spec={"backbone": "facebook/dinov2-base"})], GROUPS).rows) == 1


@pytest.mark.parametrize(
    ("backbone", "name", "checkpoint"),
    [
        ("google/vit-base-patch16-224-in21k", "ViT-B/16", "ImageNet-21k"),
        ("/models/ViT-B_16", "ViT-B/16", "ImageNet-21k"),
        ("facebook/vit-mae-base-patch16", "ViT-B/16", "MAE"),
        ("google/vit-large-patch16-224-in21k", "ViT-L/16", "ImageNet-21k"),
        ("google/vit-huge-patch14-224-in21k", "ViT-H/14", "ImageNet-21k"),
        ("google/vit-base-patch32-224-in21k", None, "ImageNet-21k"),
        ("microsoft/swinv2-base-patch4-window8-256", None, "ImageNet-21k"),
        ("facebook/deit-base-patch16-224", None, "ImageNet-21k"),
    ],
)
def test_the_papers_names_of_backbones(backbone, name, checkpoint):
    architecture, checkpoints = papers_name(backbone)
    assert architecture == name and checkpoint in checkpoints


def test_cost():
    table = cost_table(make_rows([make_run("a"), make_run("b", seed=1)]), "cost")
    assert [row.texts(table.columns) for row in table.rows] == [["2", "0.400", "1.000", "0.500", "60.0", "–"]]
    assert "Devices: cpu: x86_64 (2 runs)" in table.notes
