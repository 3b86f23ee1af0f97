"""pytest plugin of peft_suite.py: `HeadMaskedLoraConfig` in place of `LoraConfig` in PEFT's own tests.

`--stand-in ne=0` and `--stand-in ne=1` replace the class before any test module is imported. PEFT's tests expect
LoRA's defaults and do not know heads. These are all the adaptations:

- a config that does not set them gets this `ne`, and `num_heads={".*": 2}`: two heads for every `nn.Linear` with an
  even number of outputs, so that our layer is used wherever possible, without masks for ne=0, and with masks for ne=1
  (all heads stay active, because nothing selects any);
- ne is 0 where ne=1 is refused, because an option excludes masks or no target can have heads, and, layer by layer,
  on subclasses of `nn.Linear`;
- our own defaults are off: `target_modules=None` uses PEFT's table, `modules_to_save=None` saves no other modules;
- our own warnings are silenced, because some tests count warnings.

All runs leave out the cases that are parametrised with the configuration of another method.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import peft
import pytest
import torch


# PEFT's settings make errors of them, which would end every test of a transformers model (peft 0.21, transformers 5.23)
RENAMED_IN_TRANSFORMERS = "`(is_)?gradient_checkpointing(_enable|_disable)?` is deprecated"
OWN_WARNINGS = ("these targets have no attention heads", "the adapter saved to .* is to deactivate heads")
REFUSALS = ("no target has attention heads", "cannot be combined with head masks")
masks_made = 0
outcomes: dict[str, dict] = {}


def pytest_addoption(parser):
    parser.addoption("--stand-in", choices=("none", "ne=0", "ne=1"), default="none")
    parser.addoption("--outcomes", type=Path, help="JSON file for {node id: {outcome, error, masked}}")


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", f"ignore:{RENAMED_IN_TRANSFORMERS}")
    if config.getoption("stand_in") != "none":
        stand_in_for_lora(ne=int(config.getoption("stand_in")[-1]))
        for message in OWN_WARNINGS:
            config.addinivalue_line("filterwarnings", f"ignore:{message}")


def stand_in_for_lora(ne: int) -> None:
    from peft_heads.tuners.common import model as common_model
    from peft_heads.tuners.head_masked_lora import layer, model

    config_class = model.HeadMaskedLoraConfig
    for module in (peft, peft.tuners, peft.tuners.lora, peft.tuners.lora.config):
        module.LoraConfig = config_class

    def __post_init__(self, original=config_class.__post_init__):
        if self.ne is None and self.ratio is None:
            self.ne, self.num_heads = ne, self.num_heads or {".*": 2}
        original(self)

    def check_compatible(self, freezes_rows=False, original=config_class.check_compatible):
        try:
            original(self, freezes_rows)
        except ValueError:
            self.ne = 0

    def find_head_layouts(base_model, peft_config, targets, original=model.find_head_layouts):
        try:
            layouts = original(base_model, peft_config, targets)
        except ValueError as error:
            if not any(text in str(error) for text in REFUSALS):
                raise
            peft_config.ne = 0
            layouts = original(base_model, peft_config, targets)
        # subclasses of nn.Linear, refused with masks as well
        plain = (name for name, module in base_model.named_modules() if type(module) is torch.nn.Linear)
        return {name: layouts[name] for name in plain if name in layouts} | {
            name: layout for name, layout in layouts.items() if hasattr(base_model.get_submodule(name), "base_layer")
        }

    def count_mask(self, *args, original=layer.HeadMask.__init__, **kwargs):
        global masks_made
        masks_made += 1
        original(self, *args, **kwargs)

    config_class.__post_init__ = __post_init__
    config_class.check_compatible = check_compatible
    model.find_head_layouts = find_head_layouts
    layer.HeadMask.__init__ = count_mask
    model.default_targets = lambda base_model: []
    model.unknown_architecture = lambda base_model: ValueError("Please specify `target_modules` in `peft_config`")
    common_model.classifier_names = lambda base_model: []


def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if not is_of_another_method(item)]
    if os.environ.get("HF_HUB_OFFLINE") == "1" and "tests.testing_utils" in sys.modules:
        # `hub_online_once` goes online for a model it has not met, and waits 45 s where there is no network
        sys.modules["tests.testing_utils"]._HUB_MODEL_ACCESSES = HasMetEveryModel()


class HasMetEveryModel(Counter):
    def __contains__(self, model_id):
        return True


def is_of_another_method(item) -> bool:
    values = getattr(getattr(item, "callspec", None), "params", {}).values()
    classes = [value if isinstance(value, type) else type(value) for value in values]
    configs = [cls for cls in classes if issubclass(cls, peft.PeftConfig)]
    return bool(configs) and peft.LoraConfig not in configs


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = masks_made
    try:
        return (yield)
    finally:
        item.user_properties.append(("masked", masks_made > before))


def pytest_runtest_logreport(report):
    node_id = report.nodeid.replace("HeadMaskedLora", "Lora")  # class names are part of parametrised ids
    seen = outcomes.setdefault(node_id, {"outcome": "passed", "error": ""})
    seen["masked"] = dict(report.user_properties).get("masked", False)
    if report.outcome != "passed" and seen["outcome"] != "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        text = crash.message if crash else str(report.longrepr)
        seen.update(outcome=report.outcome, error=(text.strip().splitlines() or [""])[0])


def pytest_sessionfinish(session):
    path = session.config.getoption("outcomes")
    if path and not hasattr(session.config, "workerinput"):
        path.write_text(json.dumps(outcomes))
