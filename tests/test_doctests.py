"""The examples in all docstrings of the package."""

import doctest
import functools
import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from peft_heads import HeadMaskedLoraConfig, TaylorHeadScorer


ROOT = Path(__file__).parents[1]
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "peft_heads").rglob("*.py"))
}
WITH_EXAMPLES = [name for name, source in SOURCES.items() if ">>> " in source]
SKIPPED = re.compile(r"#\s*(\S.*?)\s*# doctest: \+SKIP$", re.MULTILINE)


class Parser(doctest.DocTestParser):
    """A parser that does not take the end of a code block for the output of its last example."""

    def parse(self, string, name="<string>"):
        return super().parse(re.sub(r"^\s*```.*$", "", string, flags=re.MULTILINE), name)


class Checker(doctest.OutputChecker):
    """A checker that accepts any output of an example that shows none, as in PEFT's docstrings."""

    def check_output(self, want, got, optionflags):
        return not want or super().check_output(want, got, optionflags)


@pytest.fixture
def given(tmp_path, forget_criteria):
    """Return the names that examples use without defining them, as tiny objects."""
    args = TrainingArguments(
        str(tmp_path),
        num_train_epochs=11,  # more than ten, of one step each
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    model = get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1))
    return {
        "functools": functools,
        "torch": torch,
        "HeadMaskedLoraConfig": HeadMaskedLoraConfig,
        "TaylorHeadScorer": TaylorHeadScorer,
        "Trainer": Trainer,
        "args": args,
        "best": SimpleNamespace(hyperparameters={"ne": 2, "learning_rate": 0.01}),
        "dataset": tiny.examples(8),
        "loader": [tiny.batch(1, seed=seed) for seed in range(101)],
        "make_model": lambda: tiny.make("vit"),
        "model": model,
        "trainer": Trainer(model, args, train_dataset=tiny.examples(8)),
        "optimizer": torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01),
        "vit": tiny.make("vit"),
    }


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name, given):
    tests = doctest.DocTestFinder(parser=Parser()).find(importlib.import_module(name), extraglobs=given)
    examples = [example for test in tests for example in test.examples]
    assert len(examples) == len(re.findall(r"^\s*>>> (?!#)", SOURCES[name], re.MULTILINE))  # none is overlooked
    skipped = [example.source for example in examples if example.options.get(doctest.SKIP)]
    for source in skipped:
        assert SKIPPED.search(source), f"{source.strip()}\nsay why: `…  # needs the Hub  # doctest: +SKIP`"
    runner = doctest.DocTestRunner(checker=Checker())
    for test in tests:
        runner.run(test)
    results = runner.summarize(verbose=False)
    assert results.failed == 0
    assert results.attempted >= len(examples) - len(skipped)


def test_examples_are_found():
    assert len(WITH_EXAMPLES) > 20
