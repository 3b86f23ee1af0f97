import pytest

from peft_heads.backbones.renames import match_renamed, place_of


NAMES = [  # transformers 4.57, and 5.23
    ("vit.encoder.layer.1.attention.attention.query", "vit.layers.1.attention.q_proj"),
    ("vit.encoder.layer.1.attention.attention.value", "vit.layers.1.attention.v_proj"),
    ("vit.encoder.layer.1.attention.output.dense", "vit.layers.1.attention.o_proj"),
    ("vit.encoder.layer.1.intermediate.dense", "vit.layers.1.mlp.fc1"),
    ("vit.encoder.layer.1.output.dense", "vit.layers.1.mlp.fc2"),
    ("swin.encoder.layers.0.blocks.1.attention.self.key", "swin.encoder.layers.0.blocks.1.attention.k_proj"),
    ("encoder.layer.0.attention.attention.query", "layers.0.attention.q_proj"),  # a bare backbone
]


@pytest.mark.parametrize(("old", "new"), NAMES)
def test_both_ways(old, new):
    present = [new for _, new in NAMES]
    assert match_renamed([old], present) == {old: new}
    assert match_renamed([new], [old for old, _ in NAMES]) == {new: old}
    assert match_renamed([new], present) == {}  # nothing to rename


def test_other_places():
    assert match_renamed(["vit.layers.2.attention.query"], [new for _, new in NAMES]) == {}  # no third block
    assert match_renamed(["deit.layers.1.attention.query"], [new for _, new in NAMES]) == {}
    assert match_renamed(["text.layers.0.query"], ["text.layers.0.a.q_proj", "text.layers.0.b.q_proj"]) == {}  # which?
    assert place_of("classifier") == ("classifier", (), "classifier")
