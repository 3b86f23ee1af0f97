"""What tuners have in common whose layers are the method's own, not those of a tuner of PEFT's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from ...heads.traversal import own_modules
from .model import VisionTuner


class _MixedBatches:
    """Batches of several adapters, for tuners whose layers take `adapter_names`; see PEFT's LoRA."""

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            yield
            return
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        unknown = set(adapter_names) - {"__base__"} - set(self.peft_config)
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
        hook = partial(_pass_adapter_names, adapter_names=adapter_names)
        handles = [
            module.register_forward_pre_hook(hook, with_kwargs=True)
            for _, module in own_modules(self.model)
            if isinstance(module, (self.tuner_layer_cls, AuxiliaryTrainingWrapper))
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class StandaloneTuner(VisionTuner, _MixedBatches, BaseTuner):
    """A [`VisionTuner`] on PEFT's `BaseTuner`. A method gives `prefix`, `tuner_layer_cls` and `create_layer`."""

    target_module_mapping: ClassVar[dict[str, list[str]]] = {}  # modules are found by role

    def create_layer(self, peft_config: PeftConfig, adapter_name: str, target: nn.Module, name: str) -> BaseTunerLayer:
        """The layer in the place of a module, with the adapter in it.

        Args:
            peft_config: The adapter's configuration.
            adapter_name: The adapter.
            target: The module, or the layer of an earlier adapter, which gets the new one as well and is returned.
            name: Its name in the base model.
        """
        raise NotImplementedError

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        layer = self.create_layer(peft_config, adapter_name, target, current_key)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # as PEFT's, without giving a trained classifier (which may be any module) the weight of what it replaces
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT makes new, trainable parameters, also of an adapter that is not active
        holders = [
            getattr(layer, name)
            for _, layer in own_modules(self.model)
            if isinstance(layer, self.tuner_layer_cls)
            for name in layer.adapter_layer_names
        ]
        trained = [
            (params, params[adapter_name].requires_grad)
            for params in holders
            if isinstance(params, nn.ParameterDict) and adapter_name in params
        ]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        for params, requires_grad in trained:
            params[adapter_name].requires_grad_(requires_grad)


def _pass_adapter_names(target: nn.Module, args: tuple, kwargs: dict[str, Any], adapter_names: list[str]):
    kwargs["adapter_names"] = adapter_names
    return args, kwargs
