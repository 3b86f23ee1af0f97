"""docs/extending.md: its first block runs, and the others are the plugin that tests/cli/test_example_plugin.py runs."""

import re
from pathlib import Path

import tiny
import torch
from peft import get_peft_model

from peft_heads import HeadScorer
from peft_heads.heads import CRITERIA, HeadStatistics


DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"
PLUGIN = Path(__file__).parent / "fixtures" / "plugin"


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)


def test_the_criterion_runs(forget_criteria):
    namespace = {}
    exec(compile(blocks("python")[0], str(DOCUMENT), "exec"), namespace)
    assert CRITERIA["per_weight"].function is namespace["per_weight"]
    model = get_peft_model(tiny.make("vit"), namespace["config"])
    scorer = HeadScorer(model)
    tiny.train(model, steps=2, after_backward=scorer.update)
    signed, norms = scorer.scores("positive"), scorer.scores("weight_norm")
    for name, scores in scorer.scores().items():
        assert torch.equal(scores, signed[name].abs() / (norms[name] + 1e-6)) and scores.any()
    assert all((~mask).sum() == 2 for mask in scorer.select().values())


def test_the_method_is_the_plugin_that_is_tested():
    _, gain, package = blocks("python")
    assert gain == (PLUGIN / "peft_heads_example" / "gain.py").read_text("utf-8")
    assert package == (PLUGIN / "peft_heads_example" / "__init__.py").read_text("utf-8")
    (entry_point,) = blocks("toml")
    assert entry_point in (PLUGIN / "pyproject.toml").read_text("utf-8")


def test_what_it_names_is_there():
    root, text = DOCUMENT.parents[1], DOCUMENT.read_text("utf-8")
    named = re.findall(r"`(peft_heads/[\w/]+\.py)`", text)
    assert named and all((root / name).is_file() for name in named)
    rows = {
        name for names in re.findall(r"^\| (`.*`) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", names)
    }
    assert rows == set(HeadStatistics.__dataclass_fields__)
