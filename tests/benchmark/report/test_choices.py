from benchmark_runs import heads, make_run

from peft_heads.benchmark.report.choices import SCALE, best_on_test, best_on_validation
from peft_heads.benchmark.report.rows import make_rows


def test_best_of_all_variants_chosen_on_test():
    runs = [
        make_run("cifar", 0.5, method=heads(0)),
        make_run("cifar", 0.6, method=heads(1)),
        make_run("cifar", 0.4, method=heads(3, "positive")),
        make_run("dtd", 0.3, method=heads(0)),
        make_run("dtd", 0.2, method=heads(1)),
        make_run("dtd", 0.9, method=heads(1), split="val200"),
        make_run("dtd", 0.9, method=("lora", {})),
        make_run("dtd", 0.9, method=heads(0, adapter_bits=1)),
    ]
    (row,) = best_on_test(make_rows(runs))
    assert row.samples() == {"cifar": {(0, 0): 60.0}, "dtd": {(0, 0): 30.0}}
    assert row.label == "head-masked-lora, best of all variants per task, chosen on test (as in the paper)"
    assert row.choices == {"cifar": "criterion=absolute ne=1", "dtd": "criterion=absolute ne=0"}
    assert row.notes == ("chosen from 3 variants",)


def test_best_chosen_on_validation_reports_the_test_figure():
    runs = [
        make_run("cifar", 0.8, method=heads(0), split="val200"),
        make_run("cifar", 0.6, method=heads(1), split="val200"),
        make_run("cifar", 0.9, method=heads(1), split="val200", seed=1),  # mean 0.75
        make_run("cifar", 0.5, method=heads(0)),
        make_run("cifar", 0.9, method=heads(1)),
        make_run("dtd", 0.1, method=heads(0), split="val200"),
        make_run("dtd", 0.2, method=heads(3), split="val200"),
        make_run("dtd", 0.6, method=heads(0)),
        make_run("cifar", 0.9, method=heads(1), spec={"recipe": {}}),  # another recipe: never looked at
    ]
    (row,) = best_on_validation(make_rows(runs))
    assert row.samples() == {"cifar": {(0, 0): 50.0}}
    assert row.label == "head-masked-lora, best per task chosen on val200"
    assert row.notes == (
        "chosen from 3 variants",
        "chosen, but not run on test: dtd (head-masked-lora criterion=absolute ne=3)",
    )


def test_the_scale_alone_can_be_chosen():
    runs = [
        make_run("cifar", accuracy, method=heads(ne, scale=scale), split=split)
        for ne, scale, split, accuracy in [
            (1, 0.1, "val200", 0.5),
            (1, 10, "val200", 0.6),
            (1, 0.1, "test", 0.55),
            (1, 10, "test", 0.45),
            (3, 10, "val200", 0.9),
            (3, 10, "test", 0.9),
        ]
    ]
    (row,) = best_on_validation(make_rows(runs), SCALE)
    assert row.label == "head-masked-lora criterion=absolute ne=1, scale per task chosen on val200"
    assert row.samples() == {"cifar": {(0, 0): 45.0}} and row.choices == {"cifar": "scale=10"}
