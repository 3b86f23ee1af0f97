from torch import nn

from peft_heads.backbones.norms import batch_norms, following_batch_norm, is_norm, normalises


def test_what_is_a_norm():
    for norm in (nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4)):
        assert is_norm(norm) and normalises(norm)
    for other in (nn.LayerNorm(4, elementwise_affine=False), nn.BatchNorm2d(4), nn.Linear(4, 4)):
        assert not is_norm(other)
    assert normalises(nn.LayerNorm(4, elementwise_affine=False)) and not normalises(nn.BatchNorm2d(4))
    assert batch_norms(nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4))) == ["0"]


class ResNetConvLayer(nn.Module):
    """A layer with the parts of transformers' module of the same name."""

    def __init__(self, normalization):
        super().__init__()
        self.convolution, self.normalization = nn.Conv2d(3, 4, 1), normalization


def test_the_batch_norm_after_a_convolution():
    model = nn.Sequential(ResNetConvLayer(nn.BatchNorm2d(4)), ResNetConvLayer(nn.Identity()), nn.Conv2d(4, 4, 1))
    assert following_batch_norm(model, "0.convolution") == "0.normalization"
    assert following_batch_norm(model, "1.convolution") is None
    assert following_batch_norm(model, "2") is None
