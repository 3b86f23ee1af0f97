"""The classifier of a model: what a new task must train, wherever in the model it lies.

It is what stands beside the backbone, and whatever else is as large as the number of labels.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable

import torch
from torch import nn

from ..heads.detect import resolve_heads
from ..heads.traversal import own_modules, unwrapped
from .bypass import UNCALLED
from .image_part import backbone_name


# Where the backbone is no module of its own: timm (`head`, and `head_dist` of a distilled one), EoMT.
CLASSIFIER_NAMES = ("classifier", "head", "head_dist", "decode_head", "auxiliary_head", "class_predictor", "mask_head")
# By which a model of transformers shows that it computes a task's loss (SAM's `input_labels` are no labels of a task).
LABEL_ARGUMENTS = {"labels", "mask_labels", "class_labels"}
# Layers whose size can be the number of labels.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_KINDS = (nn.Linear, *_CONVOLUTIONS, nn.Embedding)


def classifier_names(model: nn.Module) -> list[str]:
    """Names of the modules that a task trains from scratch, for PEFT's `modules_to_save`; empty for a bare backbone.

    In a model of transformers that takes labels, the classifier is everything beside the backbone that is not a model,
    a stack of layers or a loss itself: `classifier`, DeiT's two classifiers, `decode_head` of a segmentation model.
    Modules inside the backbone that are as large as the number of labels belong to it too (Perceiver, OneFormer).

    In other models, and inside transformers' wrapper of timm, it is found by its name (`CLASSIFIER_NAMES`) or by timm's
    `get_classifier`. A warning says so if a model takes labels and no classifier is found.
    """
    backbone = backbone_name(model)
    names: list[str] = []
    is_transformers = hasattr(model, "base_model_prefix")
    takes_labels = is_transformers and bool(LABEL_ARGUMENTS & set(inspect.signature(model.forward).parameters))
    if is_transformers:
        names = [name for name, _ in model.named_children() if backbone and name != backbone.partition(".")[0]]
        if not takes_labels:
            return [name for name in names if name.endswith("classifier")]  # DeiT with teacher takes no labels
    if not names:
        owner = model.get_submodule(backbone)
        prefix = f"{backbone}." if backbone else ""
        named = {name: getattr(owner, name, None) for name in CLASSIFIER_NAMES}
        names = [
            prefix + n for n, module in named.items() if isinstance(module, nn.Module) and _has_parameters(module)
        ]
        names = names or [prefix + name for name in _named_by_model(owner)]
    names = [name for name in names if _is_classifier(model, name)]
    if takes_labels:
        names += _classifiers_inside(model, names)
    return _unambiguous(model, names)


def _is_classifier(model: nn.Module, name: str) -> bool:
    """Whether a module beside the backbone can be what a task trains from scratch.

    A model of its own (a text decoder), a stack of attention layers and the output layer of a language model cannot,
    nor can the `nn.Identity` that stands there for num_labels=0.
    """
    module = model.get_submodule(name)
    # transformers before 5.0 makes a model of SegFormer's `decode_head` as well
    holds_model = any(hasattr(inner, "base_model_prefix") for _, inner in own_modules(module))
    is_model = holds_model and name not in CLASSIFIER_NAMES
    is_stack = isinstance(module, UNCALLED) and bool(resolve_heads(module))
    get_output_embeddings = getattr(model, "get_output_embeddings", lambda: None)
    return (
        _has_parameters(module)
        and not is_model
        and not is_stack
        and not is_loss(module)
        and module is not get_output_embeddings()
    )


def _named_by_model(model: nn.Module) -> list[str]:
    """Name of the classifier that a model of timm returns itself."""
    classifier = getattr(model, "get_classifier", lambda: None)()
    return [name for name, module in model.named_modules() if name and module is classifier]


def _classifiers_inside(model: nn.Module, names: list[str]) -> list[str]:
    """Other modules as large as the number of labels, beside classifiers of these names; warns if there is none."""
    inside, lost = label_sized_modules(model, names)
    if lost:
        warnings.warn(
            f"{', '.join(lost)} of {type(model).__name__} depend on the number of labels, but PEFT cannot train them "
            "without the modules beside them: they stay as they are. Name the modules to train in modules_to_save="
        )
    elif not names and not inside and _takes_classes(model):
        warnings.warn(
            f"no classifier was found in {type(model).__name__}, so that nothing but the adapter is trained and saved. "
            "Pass modules_to_save= with the modules that are new for the task, or modules_to_save=[] if there are none"
        )
    return inside


def _takes_classes(model: nn.Module) -> bool:
    """Whether the labels that a model takes are classes, and not the words of a language model inside."""
    models = [module for module in model.modules() if hasattr(module, "base_model_prefix")]
    speaks = any(getattr(part, "get_output_embeddings", lambda: None)() is not None for part in models)
    return not speaks and (getattr(getattr(model, "config", None), "num_labels", 0) or 0) > 0


def _unambiguous(model: nn.Module, classifiers: list[str]) -> list[str]:
    """Names for `modules_to_save` that PEFT reads as these classifiers and nothing else.

    PEFT takes a name for the end of module names ("head" is "decode_head.head" as well) and wraps what it finds. That
    must not be a mere container, nor contain something else that is wrapped. A name that leads there is replaced by
    those of the modules inside; one that PEFT could not wrap at all is left out, with a warning.
    """
    names = list(classifiers)
    while True:
        matched = [key for key, _ in own_modules(model) if key.endswith(tuple(names))]
        for name in names:
            mine = [key for key in matched if key.endswith(name)]
            inner = [f"{name}.{c}" for c, m in model.get_submodule(name).named_children() if _has_parameters(m)]
            if inner and not all(_stands_alone(model, key, classifiers, matched) for key in mine):
                names = [other for other in names if other != name] + inner
                break
            if any(isinstance(model.get_submodule(key), UNCALLED) for key in mine):
                warnings.warn(
                    f"{name} looks like a part of the classifier, but PEFT cannot train it in full, because its name "
                    f"also means {', '.join(mine)}; name the modules to train in modules_to_save"
                )
                names = [other for other in names if other != name]
                break
        else:
            return names


def _stands_alone(model: nn.Module, key: str, classifiers: list[str], matched: list[str]) -> bool:
    return (
        any(key == name or key.startswith(f"{name}.") for name in classifiers)
        and not isinstance(model.get_submodule(key), UNCALLED)
        and not any(other.startswith(key + ".") for other in matched)
    )


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def label_sized_modules(model: nn.Module, classifiers: Iterable[str]) -> tuple[list[str], list[str]]:
    """Modules of a model of transformers that depend on the number of labels, outside the known classifiers.

    The model is built on the meta device with one label more, which shows them. This is skipped where layers of the
    classifiers have that size and no other layer has.

    Args:
        model: The model, plain or with adapters in it.
        classifiers: Names of its known classifiers.

    Returns:
        Names of the modules that can be trained in full, and of parameters that lie in a module with other modules.
    """
    known = tuple(f"{name}." for name in classifiers)
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    if not isinstance(num_labels, int) or num_labels < 1:
        return [], []
    sized = [f"{name}." for name in _sized(model, {num_labels, num_labels + 1})]
    if any(name.startswith(known) for name in sized) and all(name.startswith(known) for name in sized):
        return [], []
    parameters = [name for name in _dependent_parameters(model, num_labels) if not name.startswith(known or ("\0",))]
    modules = dict.fromkeys(name.rpartition(".")[0] for name in parameters)
    shared = {name for name in modules if any(True for _ in unwrapped(model.get_submodule(name)).children())}
    return (
        [name for name in modules if name not in shared],
        [name for name in parameters if name.rpartition(".")[0] in shared],
    )


def is_loss(module: nn.Module) -> bool:
    """Whether a module computes a loss; its parameters (a temperature) are no task's classifier."""
    return type(module).__name__.endswith(("Loss", "Criterion"))


def _sized(model: nn.Module, sizes: set[int]) -> list[str]:
    """Names of the layers with so many outputs or entries, without those that adapters have put inside."""
    found: dict[str, None] = {}
    inside: tuple[str, ...] = ("\0",)
    for name, module in own_modules(model):
        if name.startswith(inside):
            continue
        if hasattr(module, "base_layer"):
            inside += (f"{name}.",)
            module = module.base_layer
        if isinstance(module, _KINDS) and module.weight.shape[0] in sizes:
            found[name.partition(".original_module")[0].partition(".modules_to_save.")[0]] = None
    return list(found)


def _dependent_parameters(model: nn.Module, num_labels: int) -> list[str]:
    """Names of the parameters whose shape depends on the number of labels; empty if the model cannot be built again."""
    shapes = []
    for number in (num_labels, num_labels + 1):
        config = copy.deepcopy(model.config)
        config.num_labels = number
        if hasattr(config, "use_pretrained_backbone"):
            config.use_pretrained_backbone = False  # nothing is to be downloaded
        try:
            with torch.device("meta"), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                built = type(model)(config)
        except Exception:  # a class may do anything when it is built; nothing can be learned from it then
            return []
        shapes.append({name: param.shape for name, param in built.named_parameters()})
    return [name for name, shape in shapes[0].items() if shapes[1].get(name, shape) != shape]
