"""Settings that are in effect by default, and departures of a run from the recipe of its suite."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from benchmark_runs import heads, make_run

from peft_heads.benchmark.engine.run import make_spec
from peft_heads.benchmark.offline.settings import offline_settings, offline_specs
from peft_heads.benchmark.recipes import RECIPES, SHIPPED
from peft_heads.benchmark.records.effective import deviations, effective_method, merge_settings
from peft_heads.benchmark.records.results import read_result, write_result
from peft_heads.benchmark.report import make_report, summarize
from peft_heads.data.tasks import find_task


CIFAR = find_task("cifar", "vtab")


def spec_of(recipe=RECIPES["vtab"], backbone=SHIPPED, method=None, task=CIFAR, **changes):
    return make_spec(task, method or {"name": "linear"}, replace(recipe, **changes), backbone, 0, final=True)


@pytest.mark.parametrize(
    ("method", "some"),
    [
        (
            {"name": "head-masked-lora", "r": 32, "adapter_bits": 1, "scale": 0.1, "ne": 3},
            {"r": 32, "adapter_bits": 1, "classifier_bits": 32, "criterion": "absolute", "head_warmup_epochs": 10}
            | {"lora_alpha": 3.2, "scale": 0.1, "bottleneck_dropout": 0.0, "granularity": "global", "ne": 3},
        ),
        ({"name": "lora"}, {"r": 8, "lora_alpha": 8, "scale": 1, "lora_dropout": 0.0}),
        ({"name": "rlrr"}, {"r": 1, "init": "kaiming", "norms": True, "ne": 0}),
        ({"name": "rlrr", "ne": 2}, {"ne": 2, "criterion": "absolute", "head_warmup_epochs": 10}),
        ({"name": "linear"}, {}),
        ({"name": "peft", "peft_config": '{"peft_type": "LOHA", "r": 3}'}, {"peft_type": "LOHA", "r": 3}),
    ],
)
def test_settings_in_effect(method, some):
    effective = effective_method(method, RECIPES["vtab"].settings())
    assert effective["name"] == method["name"]
    assert {name: effective[name] for name in some} == pytest.approx(some) if some else len(effective) == 1
    assert ("criterion" in effective) is bool(some.get("criterion"))


def test_they_are_those_of_the_adapter():
    """The numbers are those of the trained configuration."""
    from peft_heads.benchmark.engine.training import Training

    method = {"name": "head-masked-lora", "r": 32, "adapter_bits": 1, "scale": 0.5, "ne": 1}
    training = object.__new__(Training)
    training.spec = spec_of(method=method, drop_path=0.0)
    label = SimpleNamespace(names=["a", "b"])
    training.splits = {"train": SimpleNamespace(dataset=SimpleNamespace(features={"label": label}))}
    model, (scorer,) = training._model()
    effective = effective_method(method, training.spec.recipe)
    config = model.peft_config["default"]
    for name in ("r", "lora_alpha", "adapter_bits", "classifier_bits", "criterion", "granularity", "joint", "ne"):
        assert effective[name] == getattr(config, name), name
    assert effective["head_warmup_epochs"] == scorer.warmup_epochs == 10
    layer = next(module for module in model.modules() if isinstance(getattr(module, "scaling", None), dict))
    assert layer.scaling["default"] == effective["scale"]


def test_a_faithful_run_departs_nowhere():
    assert deviations(make_run().spec) == []
    for task in ("digits", "count"):
        specs = offline_specs(offline_settings(core=True).values(), seeds=(0,), tasks=[find_task(task, "offline")])
        assert [text for spec in specs for text in deviations(spec)] == []
    assert deviations(make_run("cats", suite="my-images").spec) == []


def test_deviations():
    spec = spec_of(epochs=12, learning_rate=0.01, method={"name": "head-masked-lora", "head_warmup_epochs": 3})
    assert deviations(spec) == [
        "epochs 12 (recipe: 100)",
        "learning_rate 0.01 (recipe: 0.001)",
        "head_warmup_epochs 3 (recipe: 10)",
        f"backbone {SHIPPED} (recipe: google/vit-base-patch16-224-in21k)",
        "images: size 32 (recipe: 224)",
    ]
    recipe = RECIPES["offline"]
    task = find_task("digits", "offline")
    images = {**recipe.train_images, "normalization": "none"}
    assert deviations(spec_of(recipe, task=task, train_images=images)) == [
        "training images: normalization none (recipe: half)"
    ]
    selected = spec_of(recipe, task=task, method={"name": "head-masked-lora", "head_select_at": 0.5})
    assert deviations(selected) == ["head_select_at 0.5 (recipe: after 3 epochs)"]
    # full has a learning rate of its own
    assert deviations(spec_of(recipe, task=task, method={"name": "full"})) == ["learning_rate 0.01 (recipe: 0.001)"]


def test_trees_of_another_size():
    data = {"train": {"images": 37}, "eval": {"images": 10_000}}
    run = make_run(environment={"data_fingerprint": data})
    assert deviations(run.spec, run.environment) == ["37 images in train800val200 (published: 1,000)"]


def test_every_result_says_both(tmp_path):
    run = make_run(method=heads(1, r=32), spec={"epochs": 3, "recipe": RECIPES["vtab"].settings()})
    path = write_result(tmp_path, run.spec, run.result, run.environment)
    content = json.loads(path.read_text())
    assert content["deviations"] == ["epochs 3 (recipe: 100)"]
    assert content["effective_method"]["r"] == 32 and content["effective_method"]["granularity"] == "global"
    assert read_result(path).spec == run.spec
    # a method of a later version is written as it is
    run = make_run(method=("later", {"depth": 2}))
    path = write_result(tmp_path, run.spec, run.result, run.environment)
    assert json.loads(path.read_text())["effective_method"] == {"name": "later", "depth": 2}


def test_the_report_says_both():
    faithful, short = make_run(method=heads(1)), make_run(method=heads(1), spec={"epochs": 3})
    report = make_report([faithful], "vtab")["report.md"]
    assert "Official means: a complete run of committed code" in report and "All rows follow the recipe" in report
    recipe = {"recipe": RECIPES["vtab"].settings()}
    report = make_report([make_run(method=heads(1), spec=recipe)], "vtab")["report.md"]
    line = report.partition("In effect by default, in all rows of head-masked-lora: ")[2].partition("\n")[0]
    assert "r=8, " in line and "adapter_bits=32" in line and "joint=true" in line and "head_warmup_epochs=10" in line
    assert "ne=1" not in line and "criterion" not in line  # rows name them
    report = make_report([short], "vtab")["report.md"]
    assert "**All rows depart from the recipe of vtab**: epochs 3 (recipe: 100)" in report
    assert "All rows depart from the recipe" in summarize([short], "vtab").replace("*", "")
    mixed = make_report([faithful, short], "vtab")["report.md"]
    (line,) = [line for line in mixed.splitlines() if "Departs from the recipe of vtab" in line]
    assert "epochs=3" in line and "epochs=100" not in line


def test_settings_of_several_runs():
    merged = merge_settings([{"r": 8, "scale": 1}, {"r": 8, "scale": 10}, {"r": 8.0}])
    assert merged == {"r": 8.0, "scale": [1, 10]}
