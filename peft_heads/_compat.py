"""Every fact tied to a version of a host (peft, transformers, torch, …), and every private name of theirs that we use.

Each says on what condition it can be deleted.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import peft
import torch
from peft import PeftConfig, PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import tuners_utils
from peft.utils import CONFIG_NAME, PeftType, hotswap, register_peft_method
from torch import nn


if TYPE_CHECKING:
    from transformers import BaseImageProcessor

# PEFT's own types, before a method of ours adds one.
PEFT_TYPES = frozenset(PeftType.__members__)

_OWN_CONFIGS: list[type[PeftConfig]] = []
_READING_CONFIG: ContextVar[bool] = ContextVar("reading_config", default=False)


class Override(NamedTuple):
    """A private method of a host that classes of ours override.

    Attributes:
        why: What the override does.
        parameters: Names of the host's parameters that ours relies on.
        test: The test that fails where the host calls the method no longer, or otherwise.
        is_vital: Whether importing must fail where the host has lost the method. Nothing else would show it: no layer
            would be masked, no mask be saved.
    """

    why: str
    parameters: tuple[str, ...]
    test: str
    is_vital: bool = True


_CONTRACT = "tests/tuners/test_contract.py::"
# Every private method of a host that classes of ours override. Delete an entry when the method becomes public.
OVERRIDDEN = {
    "peft.tuners.tuners_utils.BaseTuner._prepare_adapter_config": Override(
        "default targets and classifier; refuses settings before anything is changed",
        ("peft_config", "model_config"),
        f"{_CONTRACT}test_default_targets",
    ),
    "peft.tuners.tuners_utils.BaseTuner._create_and_replace": Override(
        "one layer of ours for every target",
        ("adapter_name", "target", "target_name", "parent", "current_key"),
        f"{_CONTRACT}test_forward",
    ),
    "peft.tuners.lora.model.LoraModel._create_new_module": Override(
        "layers that carry masks; it is static there, but called through the instance",
        ("lora_config", "adapter_name", "target", "kwargs"),
        f"{_CONTRACT}test_forward",
    ),
    "peft.tuners.tuners_utils.BaseTuner._replace_module": Override(
        "a trained classifier does not get the weight of what it replaces",
        ("parent", "child_name", "new_module", "child"),
        "tests/tuners/rlrr/test_families.py::test_modules_trained_in_full",
    ),
    "peft.tuners.tuners_utils.BaseTuner._cast_adapter_dtype": Override(
        "the cast parameters of an adapter that is not active are not trained",
        ("adapter_name", "autocast_adapter_dtype"),
        "tests/tuners/rlrr/test_model.py::test_a_second_adapter_on_half_precision_is_not_trained",
    ),
    "peft.tuners.tuners_utils.BaseTuner._get_adapter_state_dict": Override(
        "zero rows, masks, packed codes and noted settings in the file",
        ("model", "config", "adapter_name", "state_dict", "unwanted_adapter_names"),
        f"{_CONTRACT}test_file",
    ),
    "peft.tuners.tuners_utils.BaseTuner._remap_adapter_state_dict_for_load": Override(
        "reads what `_get_adapter_state_dict` has written, and refuses a file that contradicts itself",
        ("model", "config", "adapter_name", "state_dict"),
        f"{_CONTRACT}test_save_and_load",
    ),
    "peft.tuners.tuners_utils.BaseTuner._convert_state_dict_for_initial_model": Override(
        "refuses a conversion that would lose the masks",
        ("peft_model", "peft_config"),
        "tests/tuners/head_masked_lora/test_features.py::test_conversion_from_an_initialisation_is_refused",
    ),
    "peft.tuners.tuners_utils.BaseTuner._unload_and_optionally_merge": Override(
        "classifier and labels of the adapters that are merged",
        ("merge", "adapter_names"),
        f"{_CONTRACT}test_merge_and_unload",
    ),
    "peft.tuners.lora.model.LoraModel._enable_peft_forward_hooks": Override(
        "refuses mixed batches that have no one classifier; k-bit weights are quantised once per pass",
        ("args", "kwargs"),
        f"{_CONTRACT}test_mixed_batch",
        is_vital=False,  # PEFT refuses mixed batches without it
    ),
    "torch.nn.Module._load_from_state_dict": Override(
        "reads the masks of earlier versions",
        ("state_dict", "prefix", "local_metadata", "strict", "missing_keys", "unexpected_keys", "error_msgs"),
        "tests/tuners/common/test_head_mask.py::test_an_old_state_dict_is_converted",
        is_vital=False,
    ),
}
# Private methods and attributes of PEFT's classes that our subclasses use as they are. Delete what becomes public.
INHERITED = {
    "peft.tuners.tuners_utils.BaseTuner._check_target_module_exists": "whether a configuration targets a module",
    "peft.tuners.lora.model.LoraModel._check_add_weighted_adapter": "the rank of a sum of adapters",
    "peft.tuners.tuners_utils.BaseTuner._remove_adapter_name_from_key": "the key of a tensor in a file",
    "peft.tuners.tuners_utils.BaseTunerLayer._move_adapter_to_device_of_base_layer": "places new parameters",
    "peft.tuners.tuners_utils.BaseTunerLayer._disable_adapters": "every layer's constructor sets it",
    "peft.tuners.tuners_utils.BaseTunerLayer._active_adapter": "every layer's constructor sets it",
}

# The attribute of a compiled model, and the part of its modules' names, that leads to the model itself.
COMPILED = "_orig_mod"


def is_own(config: Any) -> bool:
    """Whether a configuration is of a method registered here; what this module extends leaves all others alone."""
    return isinstance(config, tuple(_OWN_CONFIGS))


def add_peft_type(name: str) -> PeftType:
    """Return `PeftType.<name>`, creating the member if PEFT does not know it.

    `register_peft_method` refuses names that are not members of the enum, and Python's enums are closed. A true
    `str` member is added, so that lookup by name and value, comparison with the plain string, copy and pickle work.

    Delete when PEFT accepts methods from outside (https://github.com/huggingface/peft/issues/2273).
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)
    return member


def register_tuner(*, name: str, config_cls: type, model_cls: type) -> None:
    """Register a tuner with PEFT under `name` (lower case). Doing so twice is harmless.

    Our tuners share the prefix of the method they extend (`lora_`). PEFT lets that pass only because it looks the
    prefix up among the keys instead of the values of its table; should that be mended, the tables are filled here.

    Delete the fallback when PEFT lets two methods share a prefix on purpose.

    Raises:
        ImportError: The installed PEFT has other hooks than those that the tuner extends.
    """
    check_hooks(model_cls)
    peft_type = add_peft_type(name.upper())
    if PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type) is not config_cls:
        _fill_tables(name, peft_type, config_cls, model_cls)
    if config_cls not in _OWN_CONFIGS:
        _OWN_CONFIGS.append(config_cls)


def _fill_tables(name: str, peft_type: PeftType, config_cls: type, model_cls: type) -> None:
    try:
        register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    except KeyError:
        if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:  # a different class of the same name: a real conflict
            raise
        PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model_cls.prefix
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls


def check_hooks(model_cls: type) -> None:
    """Raise ImportError if a tuner of ours extends a private method that PEFT's tuners no longer have."""
    theirs = [cls for cls in model_cls.__mro__ if cls.__module__.partition(".")[0] == "peft"]
    ours = [cls for cls in model_cls.__mro__ if cls.__module__.partition(".")[0] == __package__]
    vital = [path.rpartition(".")[2] for path, override in OVERRIDDEN.items() if override.is_vital]
    lost = [
        name
        for name in vital
        if any(name in vars(cls) for cls in ours) and not any(hasattr(cls, name) for cls in theirs)
    ]
    if lost:
        raise ImportError(
            f"{model_cls.__name__} extends {', '.join(lost)}, which peft {peft.__version__} no longer has: heads would "
            "stay on without a word. Install peft 0.21, or a newer peft-heads"
        )


def allow_hotswap(name: str, *keys: str) -> None:
    """Let `hotswap_adapter` swap adapters of a LoRA-like type whose configurations agree in LoRA's keys and in `keys`.

    Where PEFT has no such table, or no such check as `extend_hotswap_check` extends, it is left to refuse ours.

    Delete when PEFT asks the tuner instead of a table.
    """
    if hasattr(hotswap, "CONFIG_KEYS_TO_CHECK") and hasattr(hotswap, "check_hotswap_configs_compatible"):
        hotswap.CONFIG_KEYS_TO_CHECK[PeftType[name.upper()]] = [*hotswap.CONFIG_KEYS_TO_CHECK[PeftType.LORA], *keys]


def delegate_config_loading() -> None:
    """Let `PeftConfig.from_pretrained` call `from_pretrained` of our class where the file names one.

    PEFT only constructs the class, which would then miss what it reads beside `adapter_config.json`.

    Delete when PEFT delegates.
    """
    load = PeftConfig.from_pretrained.__func__
    if hasattr(load, "extended_by_peft_heads"):
        return

    @functools.wraps(load)
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        found = _config_class(pretrained_model_name_or_path, subfolder) if cls is PeftConfig else None
        if found is not None:
            return found.from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        token = _READING_CONFIG.set(True)
        try:
            config = load(cls, pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        finally:
            _READING_CONFIG.reset(token)
        own = type(config).from_pretrained.__func__
        if cls is PeftConfig and is_own(config) and own is not from_pretrained:
            return type(config).from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        return config

    from_pretrained.extended_by_peft_heads = True
    PeftConfig.from_pretrained = classmethod(from_pretrained)


def is_reading_config() -> bool:
    """Whether the configuration that is being created is read from a file, rather than new.

    Delete when PEFT tells a configuration where it comes from.
    """
    return _READING_CONFIG.get()


def _config_class(folder: str | os.PathLike, subfolder: str | None) -> type[PeftConfig] | None:
    """Our class of the configuration in a local folder, whatever else is wrong with it; None if it is not ours."""
    path = os.path.join(folder, subfolder or "")
    try:
        found = PEFT_TYPE_TO_CONFIG_MAPPING[PeftConfig._get_peft_type(path)] if os.path.isdir(path) else None
    except Exception:  # PEFT says what is wrong with it
        return None
    return found if found in _OWN_CONFIGS else None


def extend_hotswap_check(check: Callable[[PeftConfig, PeftConfig], None]) -> None:
    """Call `check(old config, new config)` whenever PEFT has accepted two adapters of ours for hot-swapping.

    Delete when PEFT asks the tuner instead of a table.
    """
    compare = getattr(hotswap, "check_hotswap_configs_compatible", None)
    if compare is None or hasattr(compare, "extended_by_peft_heads"):
        return

    @functools.wraps(compare)
    def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig, *args: Any, **kwargs: Any):
        result = compare(config0, config1, *args, **kwargs)
        if is_own(config0) and is_own(config1):
            check(config0, config1)
        return result

    check_hotswap_configs_compatible.extended_by_peft_heads = True
    hotswap.check_hotswap_configs_compatible = check_hotswap_configs_compatible


def extend_hotswap(
    prepare: Callable[[nn.Module, dict[str, torch.Tensor], str, PeftConfig], dict[str, torch.Tensor]],
    check_padding: Callable[[nn.Module, int], None],
) -> None:
    """Let a method prepare the weights that PEFT swaps in, and refuse the ranks that PEFT pads to.

    Args:
        prepare: Returns the weights to swap in. Called with the model, the weights of the file, the adapter's name and
            the new configuration.
        check_padding: Raises ValueError. Called with the model and the rank, and called twice, because whoever has
            imported PEFT's function before us goes past the first time; scalings are tensors the second time, of the
            same values.

    Delete when PEFT asks the tuner.
    """
    if hasattr(hotswap.hotswap_adapter_from_state_dict, "extended_by_peft_heads"):
        return
    swap, prepare_model = hotswap.hotswap_adapter_from_state_dict, hotswap.prepare_model_for_compiled_hotswap
    pad = getattr(hotswap, "_pad_lora_weights", None)

    @functools.wraps(swap)
    def hotswap_adapter_from_state_dict(model, state_dict, adapter_name, config, *args, **kwargs):
        state_dict = prepare(model, state_dict, adapter_name, config)
        return swap(model, state_dict, adapter_name, config, *args, **kwargs)

    @functools.wraps(prepare_model)
    def prepare_model_for_compiled_hotswap(model, *, target_rank=None, **kwargs):
        if target_rank is not None:
            check_padding(model, target_rank)
        return prepare_model(model, target_rank=target_rank, **kwargs)

    @functools.wraps(pad)
    def _pad_lora_weights(model, target_rank):
        check_padding(model, target_rank)
        return pad(model, target_rank=target_rank)

    hotswap_adapter_from_state_dict.extended_by_peft_heads = True
    hotswap.hotswap_adapter_from_state_dict = hotswap_adapter_from_state_dict
    hotswap.prepare_model_for_compiled_hotswap = prepare_model_for_compiled_hotswap
    if pad is not None:
        hotswap._pad_lora_weights = _pad_lora_weights


def extend_weight_mapping(name: str, converter: Callable[[str], Any]) -> None:
    """Let transformers' own `load_adapter` convert the head masks of a file of the PEFT type `name` (lower case).

    `converter` returns the conversion of an adapter's masks, given the adapter's name.

    transformers 5 reads the file by a list of renamings and conversions, without asking the tuner. The list is made in
    PEFT, before transformers 5.10 or so in transformers itself.

    Delete when `load_adapter` goes through `set_peft_model_state_dict` again, as in transformers 4.
    """
    if importlib.util.find_spec("transformers.core_model_loading") is None:  # transformers 4
        return
    from peft.utils import transformers_weight_conversion
    from transformers.integrations import peft as integration

    def extended(build: Callable) -> Callable:
        @functools.wraps(build)
        def build_peft_weight_mapping(weight_conversions, adapter_name, peft_config=None):
            mapping = build(weight_conversions, adapter_name, peft_config=peft_config)
            if mapping and getattr(peft_config, "peft_type", None) == PeftType[name.upper()]:
                mapping = [*mapping, converter(adapter_name)]
            return mapping

        build_peft_weight_mapping.extended_by_peft_heads = {*getattr(build, "extended_by_peft_heads", ()), name}
        return build_peft_weight_mapping

    for module in (transformers_weight_conversion, integration):
        for function in ("build_peft_weight_mapping", "_build_peft_weight_mapping"):
            build = getattr(module, function, None)
            if build is not None and name not in getattr(build, "extended_by_peft_heads", ()):
                setattr(module, function, extended(build))


@dataclass
class Loading:
    """What the user has said about the saved adapter that is being loaded.

    Attributes:
        key_mapping, ignore_mismatched_sizes: Arguments of `PeftModel.from_pretrained`.
        checked: Configurations whose folders have been found to fit the model.
    """

    key_mapping: dict[str, str] | None = None
    ignore_mismatched_sizes: bool = False
    checked: list[PeftConfig] = field(default_factory=list)


_loading: ContextVar[Loading | None] = ContextVar("peft_heads_loading", default=None)


def current_loading() -> Loading | None:
    """The loading in progress; None where an adapter is created, or weights are given as a dict."""
    return _loading.get()


@contextmanager
def loading_begins(loading: Loading) -> Iterator[Loading]:
    """Inside the block, a saved adapter is being loaded."""
    token = _loading.set(loading)
    try:
        yield loading
    finally:
        _loading.reset(token)


def announce_loading(check: Callable[[nn.Module, PeftConfig, dict[str, Any], Loading], None]) -> None:
    """Let tuners know that a saved folder is being loaded: PEFT tells them neither this nor what the user has said.

    A folder that is loaded into an existing adapter is checked before PEFT reads it. A new adapter whose weights
    cannot be loaded is removed again.

    Delete when PEFT hands tuners the source and the arguments of `load_adapter`.

    Args:
        check: Called with model, configuration and source (arguments of `hf_hub_download`); raises ValueError.
    """
    if hasattr(PeftModel.load_adapter, "extended_by_peft_heads"):
        return
    create, load = PeftModel.from_pretrained.__func__, PeftModel.load_adapter

    @functools.wraps(create)
    def from_pretrained(cls, model: nn.Module, *args: Any, **kwargs: Any):
        given = inspect.signature(create).bind(cls, model, *args, **kwargs).arguments
        # the same default as PEFT's
        mapping = given.get("key_mapping") or getattr(model, "_checkpoint_conversion_mapping", None)
        ignore = given.get("kwargs", {}).get("ignore_mismatched_sizes", False)
        with loading_begins(Loading(mapping, ignore)) as loading:
            config = given.get("config")
            carried = getattr(config, "carried", None) if is_own(config) else None  # of an AdapterFolderConfig
            if carried is not None and carried.source is None:
                # a folder's own is checked when it is prepared; with another PEFT adds the adapter before it reads
                download_kwargs = split_download_kwargs(cls, given.get("kwargs", {}))
                check(model, config, {"path_or_repo": os.fspath(given["model_id"]), **download_kwargs}, loading)
            return create(cls, model, *args, **kwargs)

    @functools.wraps(load)
    def load_adapter(self, model_id: str, adapter_name: str, *args: Any, **kwargs: Any):
        given = inspect.signature(load).bind(self, model_id, adapter_name, *args, **kwargs).arguments
        rest = given.get("kwargs", {})
        outer, exists = current_loading(), adapter_name in self.peft_config
        own = Loading(given.get("key_mapping"), rest.get("ignore_mismatched_sizes", False))
        with loading_begins(outer or own) as loading:
            if exists and is_own(self.peft_config[adapter_name]):
                config = self.peft_config[adapter_name]
                if not any(config is other for other in loading.checked):
                    download_kwargs = split_download_kwargs(self, rest)
                    check(self, config, {"path_or_repo": os.fspath(model_id), **download_kwargs}, loading)
            try:
                return load(self, model_id, adapter_name, *args, **kwargs)
            except BaseException:
                if not exists and adapter_name in self.peft_config and is_own(self.peft_config[adapter_name]):
                    self.delete_adapter(adapter_name)
                raise

    load_adapter.extended_by_peft_heads = True
    PeftModel.from_pretrained = classmethod(from_pretrained)
    PeftModel.load_adapter = load_adapter


def announce_loading_by_transformers() -> None:
    """The same for `model.load_adapter` of transformers, which passes tuners a configuration alone.

    Its report leaves out what is no fault of our files (`no_faults`).

    Delete together with `announce_loading`.
    """
    from transformers.integrations import peft as integration
    from transformers.integrations.peft import PeftAdapterMixin

    load = PeftAdapterMixin.load_adapter
    if hasattr(load, "extended_by_peft_heads"):
        return

    @functools.wraps(load)
    def load_adapter(self, *args: Any, **kwargs: Any):
        given = inspect.signature(load).bind(self, *args, **kwargs).arguments
        if given.get("adapter_state_dict") is not None or _is_of_others(given):
            return load(self, *args, **kwargs)
        with loading_begins(Loading(getattr(self, "_checkpoint_conversion_mapping", None))):
            return load(self, *args, **kwargs)

    load_adapter.extended_by_peft_heads = True
    PeftAdapterMixin.load_adapter = load_adapter
    report = getattr(integration, "log_state_dict_report", None)
    if report is None:  # transformers 4 reports in another way
        return

    @functools.wraps(report)
    def log_state_dict_report(*args: Any, **kwargs: Any):
        info = inspect.signature(report).bind(*args, **kwargs).arguments["loading_info"]
        if current_loading() is not None:
            for kind, pattern in no_faults().items():
                keys = getattr(info, kind)
                setattr(info, kind, type(keys)(key for key in keys if not re.search(pattern, key)))
        return report(*args, **kwargs)

    integration.log_state_dict_report = log_state_dict_report


def no_faults() -> dict[str, str]:
    """Patterns of keys of our adapters that transformers would report as faults, by kind.

    A missing mask means that all heads are active. Noted settings, whose key is the tuner's prefix and "settings", have
    no place in a model, and the tuner has read them.
    """
    own = {PEFT_TYPE_TO_PREFIX_MAPPING[x] for x, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items() if cls in _OWN_CONFIGS}
    prefixes = "|".join(sorted(map(re.escape, own)))
    return {"missing_keys": r"_head_mask\..*\.off$", "unexpected_keys": rf"(^|\.)({prefixes})settings\b"}


def _is_of_others(given: dict[str, Any]) -> bool:
    """Whether `load_adapter` of transformers surely loads no adapter of ours, which of a repository nobody knows."""
    if given.get("peft_config") is not None:
        return not is_own(given["peft_config"])
    options = {
        **getattr(given.get("load_config"), "download_kwargs", {}),
        **given.get("kwargs", {}),
        **(given.get("adapter_kwargs") or {}),
    }
    folder, subfolder = given.get("peft_model_id") or "", options.get("subfolder")
    is_there = os.path.isfile(os.path.join(folder, subfolder or "", CONFIG_NAME))
    return is_there and _config_class(folder, subfolder) is None


def expand_all_linear(config: PeftConfig, model: nn.Module) -> None:
    """Replace `target_modules="all-linear"` by the names it stands for, as PEFT does a little later.

    Delete when PEFT offers this, or expands before `_prepare_adapter_config`.

    Raises:
        ValueError: The installed PEFT has no such function, which is private to it.
    """
    expand = getattr(tuners_utils, "_maybe_include_all_linear_layers", None)
    if expand is not None:
        expand(config, model)
    elif str(config.target_modules).lower() == "all-linear":
        raise ValueError(
            f"peft_heads cannot ask peft {peft.__version__} which layers target_modules='all-linear' stands for; name "
            "the modules, or leave target_modules out"
        )


def run_while_tracing(function: Callable) -> Callable:
    """Let `torch.compile` run a function once, while it traces, and put its result into the compiled code.

    As `torch.compiler.assume_constant_result` does, which imports torch's compiler, whether it is wanted or not.

    Delete when importing that does not take a second (torch 2.14).
    """
    function._dynamo_marked_constant = True
    return function


def must_be_called(module: nn.Module) -> bool:
    """Whether something waits for a call of the module itself, so that its weight must not be used without one.

    A hook, which may gather, cast or move the weight (FSDP, layerwise casting), or a `forward` in its place
    (Accelerate's offloading). The names of the hooks are private to torch; delete when it has a public way to ask.
    """
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" in vars(module) or any(getattr(module, name) for name in hooks)


def transforms_are_active() -> bool:
    """Whether a transform of `torch.func` (`vmap`, `grad`, …) is going on.

    Delete when torch has a public function for it.
    """
    return torch._C._are_functorch_transforms_active()


def tensor_version(tensor: torch.Tensor) -> int:
    """A number that changes with every write into a tensor, unless it goes through `data`.

    Delete when torch has a public name for it.
    """
    return tensor._version


def uncompiled(model: nn.Module) -> nn.Module:
    """The model that `torch.compile` has wrapped, or the model itself.

    Delete, together with `COMPILED`, when torch has a public name for it.
    """
    return getattr(model, COMPILED, model)


def forward_hooks(module: nn.Module) -> list[Callable]:
    """The forward hooks that are registered on a module.

    Delete when torch lists them.
    """
    return list(module._forward_hooks.values())


def shell_of(module: nn.Module) -> nn.Module:
    """A module of the same class with the same attributes and contents, but without hooks.

    Delete, together with `replace_contents`, when torch copies a module onto the meta device.
    """
    shell = object.__new__(type(module))
    for name, value in vars(module).items():
        # torch keeps hooks in dicts, ordered or not, whose names end so
        is_hooks = name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")) and isinstance(value, dict)
        vars(shell)[name] = OrderedDict() if is_hooks else value
    return shell


def replace_contents(module: nn.Module, new_tensor: Callable, new_child: Callable) -> None:
    """Replace what a shell holds: parameters and buffers by `new_tensor(old)`, modules by `new_child(old)`."""
    for kind, new in (("_parameters", new_tensor), ("_buffers", new_tensor), ("_modules", new_child)):
        vars(module)[kind] = {name: None if old is None else new(old) for name, old in vars(module)[kind].items()}


def forget_adapters(model: nn.Module) -> None:
    """Let a model of transformers not know that adapters were loaded into it.

    Delete when transformers keeps nothing but `peft_config`.
    """
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(name, None)


def split_download_kwargs(config_class: type[PeftConfig], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those of `from_pretrained`'s arguments that are `hf_hub_download`'s.

    Delete when PEFT has a public name for it.
    """
    download_kwargs, *_ = config_class._split_kwargs(kwargs)
    return download_kwargs


def is_partitioned_by_zero(param: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps the float32 numbers of a parameter in parts: by ZeRO 3, or by ZeRO 1 and 2.

    Delete when DeepSpeed has a public function for it.
    """
    return hasattr(param, "ds_id") or hasattr(param, "_hp_mapping")


def commit_hash(config: Any) -> str | None:
    """The revision on the Hub that a configuration of transformers was read from; None for a folder's.

    Delete when transformers has a public name for it.
    """
    return getattr(config, "_commit_hash", None)


def is_model_class(found: Any) -> bool:
    """Whether it is a model class of transformers, or one of its Auto classes.

    Delete when transformers has a public base class of its Auto classes.

    Raises:
        TypeError: It is no class.
    """
    from transformers import PreTrainedModel
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    return issubclass(found, (PreTrainedModel, _BaseAutoModelClass))


def trial_id(trial: Any) -> int:
    """The number by which an Optuna storage knows a trial.

    Delete when Optuna's trials have a public name for it.
    """
    return trial._trial_id


def silence_known_warnings() -> None:
    """Keep the command line free of warnings between Hugging Face libraries, about which a user can do nothing.

    Delete when PEFT asks for `is_activation_checkpointing` (peft 0.21 on transformers 5.23 and later).
    """
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


def trainer_has_overwrite_output_dir() -> bool:
    """Whether `TrainingArguments` has `overwrite_output_dir`, which transformers 5.0 has dropped.

    Delete when transformers 5.0 is the oldest that is supported.
    """
    from transformers import TrainingArguments

    return any(field.name == "overwrite_output_dir" for field in fields(TrainingArguments))


def is_network_error(error: BaseException) -> bool:
    """Whether an error comes from the HTTP library of the Hub's client, and is no `OSError`.

    huggingface_hub 0 uses requests, whose errors are `OSError`s; 1 uses httpx, and 2 httpx2.

    Delete when huggingface_hub raises errors of its own, or `OSError`, where no server answers.
    """
    return any(cls.__module__.partition(".")[0] in ("httpx", "httpx2") for cls in type(error).__mro__)


def load_pil_image_processor(name_or_path: str | os.PathLike, **kwargs: Any) -> BaseImageProcessor:
    """`AutoImageProcessor.from_pretrained` with the PIL backend, which needs no torchvision.

    transformers 5.1 to 5.18 replaces the name in its top module by one that only raises where torchvision is missing,
    although the class works; and before 5.1 the backend is chosen by `use_fast`.

    Delete when transformers 5.19 is the oldest that is supported.
    """
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    has_backends = importlib.util.find_spec("transformers.image_processing_backends") is not None
    choice = {"backend": "pil"} if has_backends else {"use_fast": False}
    kwargs.setdefault("trust_remote_code", False)  # not given, transformers asks on stdin
    return AutoImageProcessor.from_pretrained(name_or_path, **choice, **kwargs)


def image_suffixes() -> tuple[str, ...]:
    """Endings of the names of files that `datasets` takes as images in folders, in lower case.

    Delete when `datasets` follows linked folders and passes over those of file servers: nothing else needs them.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    return tuple(ImageFolder.EXTENSIONS)


def mismatched_keys(loading_info: dict[str, Any]) -> list[str]:
    """Names of the weights that `from_pretrained(…, output_loading_info=True)` found in another shape.

    Delete when transformers 5.0 is the oldest that is supported: before, the entries have no shapes beside the name.
    """
    return sorted(entry if isinstance(entry, str) else entry[0] for entry in loading_info["mismatched_keys"])


def support_peft_in_image_pipelines() -> None:
    """Let `pipeline("image-classification", model=peft_model)` know that a PeftModel is fine.

    It works without, after an error in the log that lists every class but PeftModel.

    Delete when transformers lists PEFT's models for this task.
    """
    from transformers.pipelines import base

    supported = getattr(base, "SUPPORTED_PEFT_TASKS", None)
    if supported is not None and "PeftModel" not in supported.setdefault("image-classification", []):
        supported["image-classification"].append("PeftModel")


def extend_model_card(extend: Callable[[PeftModel, str], None]) -> None:
    """Call `extend(peft_model, folder)` whenever PEFT has written a model's card, and once more before an upload.

    Three places write `README.md`: `PeftModel.save_pretrained`, `Trainer.create_model_card`, which starts anew and
    then calls `PeftModel.create_or_update_model_card`, and transformers' `push_to_hub`, which overwrites with the
    Hub's template of blanks the card that `save_pretrained` has written a moment before. The card of an adapter of
    ours is written again before an upload; that of another is the one which transformers uploads.

    Delete the second part when `PushToHubMixin.push_to_hub` keeps that card; delete both when PEFT has a hook for
    methods from outside.
    """
    write_card = PeftModel.create_or_update_model_card
    if hasattr(write_card, "extended_by_peft_heads"):
        return

    @functools.wraps(write_card)
    def create_or_update_model_card(self, output_dir: str, *args: Any, **kwargs: Any):
        result = write_card(self, output_dir, *args, **kwargs)
        extend(self, output_dir)
        return result

    create_or_update_model_card.extended_by_peft_heads = True
    PeftModel.create_or_update_model_card = create_or_update_model_card
    upload = getattr(PeftModel, "_upload_modified_files", None)
    if upload is None:  # private to transformers: pushing works without, with the template for a card
        return

    @functools.wraps(upload)
    def _upload_modified_files(self, working_dir, *args, **kwargs):
        if is_own(self.active_peft_config):
            self.create_or_update_model_card(str(working_dir))
        else:
            extend(self, working_dir)
        return upload(self, working_dir, *args, **kwargs)

    PeftModel._upload_modified_files = _upload_modified_files
