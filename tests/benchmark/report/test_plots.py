import pytest
from benchmark_runs import heads, make_run

from peft_heads.benchmark.report.plots import (
    NO_WIN,
    criterion_families,
    criterion_wins,
    plot_accuracy_against_ne,
    plot_accuracy_by_shots,
    plot_criterion_wins,
)
from peft_heads.benchmark.report.rows import make_rows


GROUPS = {"cifar": "natural", "eurosat": "specialized"}


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


def lines(axes):
    """Return `{x: y}` of every line with a marker, in the order of colours."""
    return [list(zip(*line.get_data(), strict=True)) for line in axes.get_lines() if line.get_marker() == "o"]


def test_accuracy_against_ne():
    runs = [
        make_run(task, accuracy + bonus, seed, method=heads(ne, criterion))
        for task, bonus in (("cifar", 0.0), ("eurosat", 0.2))
        for criterion, ne, accuracies in (
            ("absolute", 0, (0.5, 0.5)),
            ("absolute", 3, (0.3, 0.5)),
            ("absolute", 1, (0.6, 0.6)),
            ("negative", 1, (0.4, 0.4)),
        )
        for seed, accuracy in enumerate(accuracies)
        if (task, criterion) != ("eurosat", "negative")
    ]
    figure = plot_accuracy_against_ne(make_rows(runs), GROUPS)
    axes = panels(figure)
    assert list(axes) == ["cifar", "eurosat", "mean of group means", "mean of tasks"]
    absolute, negative = lines(axes["cifar"])
    assert absolute == [(1, pytest.approx(60)), (3, pytest.approx(40))] and negative == [(1, pytest.approx(40))]
    # criterion negative has no figure on eurosat, so none in the means
    assert lines(axes["mean of group means"]) == [[(1, pytest.approx(70)), (3, pytest.approx(50))]]
    (dashed,) = (line for line in axes["eurosat"].get_lines() if line.get_linestyle() == "--")
    assert dashed.get_ydata()[0] == pytest.approx(70)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["criterion=absolute", "criterion=negative", "ne = 0"]
    assert plot_accuracy_against_ne(make_rows([make_run(method=heads(1))]), GROUPS) is None


def test_accuracy_by_shots():
    runs = [
        make_run(task, shots / 10 + list_seed / 100, 0, method=method, spec={"shots": shots, "list_seed": list_seed})
        for task in GROUPS
        for method in (("lora", {}), heads(1))
        for shots in (1, 2, 4)
        for list_seed in (0, 2)
    ]
    figure = plot_accuracy_by_shots(make_rows(runs), dict.fromkeys(GROUPS, "all tasks"))
    axes = panels(figure)
    assert list(axes) == ["cifar", "eurosat", "mean of tasks"]
    assert lines(axes["mean of tasks"]) == 2 * [
        [(1, pytest.approx(11)), (2, pytest.approx(21)), (4, pytest.approx(41))]
    ]
    texts = {text.get_text() for text in figure.legends[0].get_texts()}
    assert texts == {"lora", "head-masked-lora criterion=absolute ne=1"}
    assert plot_accuracy_by_shots(make_rows([make_run()]), GROUPS) is None


def test_criterion_wins():
    tasks = {
        #        ne = 0, absolute 1, absolute 3, negative 1
        "cifar": (0.5, 0.4, 0.7, 0.6),
        "dtd": (0.5, 0.6, 0.4, 0.6),  # a tie
        "svhn": (0.7, 0.6, 0.7, 0.2),  # not better than ne = 0
        "sun397": (0.1, 0.9, 0.9, None),  # not all criteria were run
    }
    settings = [heads(0), heads(1), heads(3), heads(1, "negative")]
    runs = [
        make_run(task, accuracy, method=method)
        for task, accuracies in tasks.items()
        for method, accuracy in zip(settings, accuracies, strict=True)
        if accuracy is not None
    ]
    runs.append(make_run("cifar", 0.99, method=heads(1, "negative", adapter_bits=1)))
    families = sorted(criterion_families(make_rows(runs)), key=len, reverse=True)
    assert [len(family) for family in families] == [4, 1]
    wins = criterion_wins(families[0], dict.fromkeys(tasks, "natural"))
    assert wins == {"absolute": 1.5, "negative": 0.5, NO_WIN: 1.0}
    assert criterion_wins(families[1], GROUPS) == {}
    axes = plot_criterion_wins(wins).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1.5, 0.5, 1.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["absolute", "negative", NO_WIN]
    without = [row for row in families[0] if row.method["ne"]]
    assert criterion_wins(without, dict.fromkeys(tasks, "natural")) == {"absolute": 2.5, "negative": 0.5}
