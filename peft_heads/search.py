from ._moved import moved


moved(__name__, "peft_heads.scoring.search")
