import numpy as np
from benchmark_runs import heads, make_run

from peft_heads.benchmark.report.atlas import head_atlas, plot_head_atlas
from peft_heads.benchmark.report.rows import make_rows


GROUPS = {"cifar": "natural", "dtd": "natural", "eurosat": "specialized", "kitti": "structured"}


def masks(*off, num_heads=3):
    return {name: [head not in off for head in range(num_heads)] for name in ("q", "v")}


def test_what_became_of_each_head():
    (row,) = make_rows(
        [
            make_run("eurosat", method=heads(1), masks=masks(2), scores={"q": [1.0, 2.0, 0.0], "v": [3.0, 0.0, 0.0]}),
            make_run("cifar", method=heads(1), masks=masks(0), scores={"q": [0.0, 5.0, 4.0], "v": [0.0, 0.0, 2.0]}),
            make_run("cifar", seed=1, method=heads(1), masks=masks(1), scores={"q": [1.0, 0.0, 2.0]}),
        ]
    )
    (atlas,) = head_atlas(row, GROUPS).values()
    assert atlas["tasks"] == ["cifar", "eurosat"]
    np.testing.assert_allclose(atlas["off"], [[0.5, 0.5, 0], [0, 0, 1]])
    # cifar: sums 0, 5, 6 rank 0, ½, 1 and 1, 0, 2 rank ½, 0, 1; eurosat: sums 4, 2, 0
    np.testing.assert_allclose(atlas["rank"], [[0.25, 0.25, 1], [1, 0.5, 0]])


def test_ranks_are_places_not_the_order_of_places():
    (row,) = make_rows([make_run("cifar", method=heads(1), masks=masks(1), scores={"q": [5.0, 0.0, 2.0]})])
    np.testing.assert_allclose(head_atlas(row, GROUPS)[3]["rank"], [[1, 0, 0.5]])


def test_layers_that_choose_apart_and_stages_with_other_numbers_of_heads():
    mask = {"0.q": [False, True], "1.q": [True, True], "2.q": [True, False, False, True]}
    (row,) = make_rows([make_run("cifar", method=heads(1), masks=mask)])
    atlas = head_atlas(row, GROUPS)
    np.testing.assert_allclose(atlas[2]["off"], [[0.5, 0]])
    np.testing.assert_allclose(atlas[4]["off"], [[0, 1, 1, 0]])
    assert atlas[2]["rank"] is None
    assert len([axes for axes in plot_head_atlas(row, GROUPS, "t").axes if axes.get_title()]) == 2


def test_the_figure():
    scores = {"q": [0.0, 1.0, 2.0]}
    runs = [make_run(task, method=heads(1), masks=masks(0), scores=scores) for task in GROUPS]
    figure = plot_head_atlas(make_rows(runs)[0], GROUPS, "A title")
    off, rank = (axes for axes in figure.axes if axes.get_title())
    assert off.get_title() == "deactivated (share)" and rank.get_title() == "responsiveness (rank)"
    np.testing.assert_allclose(off.images[0].get_array(), [[1, 0, 0]] * 4)
    assert [label.get_text() for label in off.get_yticklabels()] == list(GROUPS)
    assert [line.get_ydata()[0] for line in off.get_lines()] == [1.5, 2.5]  # between the groups
    assert figure.get_suptitle() == "A title"


def test_nothing_to_show():
    for runs in ([make_run()], [make_run(method=heads(0), masks=masks())]):
        assert plot_head_atlas(make_rows(runs)[0], GROUPS, "t") is None
