from ._moved import moved


moved(__name__, "peft_heads.convert.lora", "peft_heads.convert.merged", "peft_heads.convert.packed")
