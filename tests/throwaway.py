"""Methods that are registered only during a test."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from peft import LoraConfig, LoraModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from peft_heads import Method, register_method
from peft_heads._compat.peft import OWN_CONFIGS, add_peft_type
from peft_heads.adapter_folder.card import CardText
from peft_heads.tuners.common import method_registry


@dataclass
class ThrowawayConfig(LoraConfig):
    gain: float = field(default=1.5, metadata={"help": "Factor of the update"})
    mode: Literal["soft", "hard"] = field(default="soft", metadata={"help": "How it is applied."})
    init: Literal["ones", "twos"] = field(default="ones", metadata={"help": "Its start."})
    steps: int | dict[str, int] = field(default=3, metadata={"help": "Steps, or steps by module."})

    card = CardText("Throw-away", "A method.", "plain", ("gain",), ("throw-away", "lora"))

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = add_peft_type("THROW_AWAY")


class ThrowawayModel(LoraModel):
    prefix = "throw_"


def throwaway(**changes):
    parts = {"config": ThrowawayConfig, "model": ThrowawayModel, "options": ("gain", "mode", "init", "steps")}
    return Method(**({"name": "throw-away", "help": "something", "grid": {"gain": [1, 2]}} | parts | changes))


@contextmanager
def registered(method):
    """Register the method inside the block."""
    tables = (
        method_registry._METHODS,
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )
    before, own = [dict(table) for table in tables], list(OWN_CONFIGS)
    try:
        register_method(method)
        yield method
    finally:
        for table, content in zip(tables, before, strict=True):
            table.clear()
            table.update(content)
        OWN_CONFIGS[:] = own
