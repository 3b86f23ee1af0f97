"""The private methods of the hosts that classes of ours override or use: the one list of them."""

from __future__ import annotations

from typing import NamedTuple

import peft


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


def check_hooks(model_cls: type) -> None:
    """Raise ImportError if a tuner of ours extends a private method that PEFT's tuners no longer have."""
    theirs = [cls for cls in model_cls.__mro__ if cls.__module__.partition(".")[0] == "peft"]
    ours = [cls for cls in model_cls.__mro__ if cls.__module__.partition(".")[0] == "peft_heads"]
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
