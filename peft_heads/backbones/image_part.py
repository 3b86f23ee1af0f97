"""Which part of a model sees the images: the backbone, beside a classifier, a text tower or a decoder."""

from __future__ import annotations

from torch import nn

from ..heads.detect import resolve_heads
from ..heads.layout import ProjectionLayout
from ..heads.traversal import own_modules


# Configurations of transformers name the part that sees the image where there are other parts: towers for other inputs
# (`encoder` in a vision encoder-decoder), or modules that a task adds to a backbone.
TOWER_CONFIGS = ("vision_config", "image_config", "encoder")
BACKBONE_CONFIGS = (*TOWER_CONFIGS, "backbone_config")


def backbone_name(model: nn.Module) -> str:
    """Name of the image backbone in a model that has other parts as well (a classifier, a text tower); else `""`."""
    for key in BACKBONE_CONFIGS:
        config = _config_of(model, key)
        if config is not None:
            for name, module in own_modules(model):
                if name and type(getattr(module, "config", None)) is type(config):
                    return name
    prefix = getattr(
        model, "base_model_prefix", ""
    )  # transformers: the attribute that holds the model without its classifier
    return prefix if prefix and isinstance(getattr(model, prefix, None), nn.Module) else ""


def image_projections(model: nn.Module) -> dict[str, ProjectionLayout]:
    """`{module name: ProjectionLayout}` of every query, key, value and fused projection of the image backbone."""
    layouts = resolve_heads(model)
    return {name: layouts[name] for name in in_image_part(model, list(layouts), list(layouts))}


def in_image_part(model: nn.Module, names: list[str], projections: list[str]) -> list[str]:
    """The names among these of modules in the part of the model whose projections are adapted.

    Args:
        model: The model.
        names: Names of modules in it.
        projections: Names of all projections in it.
    """
    towers = tuple(f"{tower}." for tower in _text_towers(model))
    names, projections = ([n for n in some if not n.startswith(towers or ("\0",))] for some in (names, projections))
    backbone = backbone_name(model)
    has_towers = any(_config_of(model, key) is not None for key in TOWER_CONFIGS)
    # beside a convolutional backbone a detector's transformer is adapted, but not another tower
    if backbone and (has_towers or any(name.startswith(f"{backbone}.") for name in projections)):
        return [name for name in names if name.startswith(f"{backbone}.")]
    return names


def _text_towers(model: nn.Module) -> list[str]:
    """Names of the models inside a model that read text, and are neither a vision tower nor inside or around one."""
    models = {name: getattr(module, "main_input_name", None) for name, module in own_modules(model) if name}
    vision = [name for name, main_input in models.items() if main_input == "pixel_values"]
    vision += [backbone] if (backbone := backbone_name(model)) else []
    return [
        name
        for name, main_input in models.items()
        if main_input == "input_ids"
        and hasattr(getattr(model.get_submodule(name), "config", None), "vocab_size")
        and not any(f"{tower}.".startswith(f"{name}.") for tower in vision)
        and not (backbone and name.startswith(f"{backbone}."))
    ]


def _config_of(model: nn.Module, key: str) -> object | None:
    return getattr(getattr(model, "config", None), key, None)
