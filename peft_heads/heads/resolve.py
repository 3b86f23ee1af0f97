from .._moved import moved


moved(
    __name__,
    "peft_heads.heads.detect",
    "peft_heads.backbones.image_part",
    "peft_heads.backbones.targets",
    "peft_heads.backbones.classifier",
    renamed={"task_head_names": "classifier_names", "HEAD_NAMES": "CLASSIFIER_NAMES"},
)
