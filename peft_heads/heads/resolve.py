from .._moved import moved


moved(__name__, "peft_heads.heads.detect")
