"""From the gradients of a training loop to the statistics of every head."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from ..functional.sharding import whole_shape
from ..heads.criterion_registry import find_criterion
from ..heads.protocol import HeadMaskable, head_layers, module_patterns, named_layouts
from ..heads.taylor import STATISTICS, all_head_statistics
from .attachment import attach, detach
from .gated_modules import KINDS, gates_of_heads, needs_gates
from .gates import GateRecorder
from .step_gradients import StepGradients


class HeadRecorder:
    """Listens to the gradients of an adapter's heads, and sums the heads' statistics over optimizer steps.

    The base of [`HeadScorer`], which turns the statistics into scores and masks. Arguments and errors are those of
    `HeadScorer`.

    Attributes:
        layers: `{module name: layer}` of the adapter's head-maskable layers.
        layouts: `{projection: HeadLayout}`. A fused projection is one layer, and one entry here per adapted part.
        config: The adapter's configuration.
        num_steps: Number of optimizer steps that count.
        num_skipped: Number of optimizer steps that do not, because a gradient was not finite.
        run: The run of a Trainer (its TrainerState) on whose behalf a callback scores; None in a plain loop.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str = "default",
        *,
        recording: bool = True,
        run: Any = None,
        gates: bool | None = None,
    ) -> None:
        model = extract_model_from_parallel(model, keep_torch_compile=False)
        self.adapter_name = adapter_name
        self.layers: dict[str, HeadMaskable] = head_layers(model, adapter_name)
        self.layouts = named_layouts(self.layers, adapter_name)
        self.config = model.peft_config[adapter_name]
        self.run = run
        self.num_steps = 0
        self.num_skipped = 0
        # float64 (3, heads of all projections side by side): a step is added in one call, however many projections
        self._sums: torch.Tensor | None = None
        self._trained = [param for param in model.parameters() if param.requires_grad]
        self._module_of = {
            key: name
            for name, layer in self.layers.items()
            for key in layer.head_layout[adapter_name].named_parts(name)
        }
        self._gradients = StepGradients(self.layers, adapter_name)
        self.model = model
        self._gates = GateRecorder(model) if (needs_gates(self.config) if gates is None else gates) else None
        self._gate_of = (
            {} if self._gates is None else gates_of_heads(self._gates.modules, self._module_of, self.layouts)
        )
        if self._gates is not None and find_criterion(self.config.criterion).needs_gates:
            self._check_head_gates()
        attach(self, self.layers.values())
        if recording:
            self.start()

    @property
    def recording(self) -> bool:
        return self._gradients.listening

    def start(self) -> None:
        """Listen to the adapter's gradients from the next backward pass on."""
        if self.recording:
            return
        self.check()
        self._gradients.listen()
        if self._gates is not None:
            self._gates.listen()

    def check(self) -> None:
        """Raise ValueError, and let another scorer have the adapter, if its heads cannot be scored."""
        try:
            check_parameters(self.layers, self.adapter_name)
        except ValueError:
            self.close()
            raise

    def stop(self) -> None:
        """Stop listening; the statistics so far stay."""
        self._gradients.stop()
        if self._gates is not None:
            self._gates.stop()

    def reset(self) -> None:
        """Stop listening, and begin the statistics anew."""
        self.stop()
        self._sums, self.num_steps, self.num_skipped = None, 0, 0
        if self._gates is not None:
            self._gates.reset()

    def close(self) -> None:
        """Stop listening and let another scorer have the adapter."""
        self.stop()
        detach(self, self.layers.values())

    @torch.no_grad()
    def update(self, loss_scale: float = 1.0) -> bool:
        """Count one optimizer step: call it after its last backward pass and before `optimizer.step()`.

        Args:
            loss_scale: Factor by which the loss was multiplied (`GradScaler.get_scale()`).

        Returns:
            Whether the step counts. A step is skipped, on every process alike, if a gradient of the heads or of
            anything else that is trained is not finite: a loss scaler skips it too.

        Raises:
            RuntimeError: No gradient has reached the adapter, or the gates, since the last update.
        """
        if not self.recording:
            raise RuntimeError("HeadScorer.update() while it is not recording; call start() before the backward pass")
        (grads, finite), values = self._gradients.over_processes(self._trained), self._gradients.values()
        # A reduction as well, which all processes take part in whether the step counts or not.
        gates = None if self._gates is None else self._gates.over_processes(loss_scale)
        finite = finite and (gates is None or gates.finite)
        if finite:
            values, grads = self._by_projection(values), self._by_projection(grads)
            self._add(all_head_statistics(values, grads, self.layouts, loss_scale))
            if gates is not None:
                self._gates.add(gates)
        else:
            self.num_skipped += 1
        self._gradients.clear()
        if self._gates is not None:
            self._gates.clear()
        return finite

    def without_gradient(self) -> list[str]:
        """Projections that no gradient has reached in the steps so far, or gradients of zero alone."""
        norms = {name: sums[STATISTICS.index("grad_norm")] for name, sums in self._sums_by_name().items()}
        return [name for name, norm in norms.items() if not norm.any()]

    @property
    def num_images(self) -> int:
        """Number of images whose gates have been summed, on all processes; 0 where none are gathered."""
        return 0 if self._gates is None else self._gates.num_images

    def gates(self, kind: str) -> dict[str, torch.Tensor]:
        """The sums over images of what gates on heads or neurons gather (`heads.gates`).

        Args:
            kind: `"head"` or `"neuron"`.

        Returns:
            `{name: float64 (3, units) on the CPU}`: `Σ |g|`, `Σ g` and `Σ g²` over `num_images` images. Heads are named
            by projection, as in `layouts`, each with the gates of its attention layer; neurons by the first layer of
            their MLP.

        Raises:
            ValueError: Gates are not gathered, or no step was counted; or the model has none of this kind.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
        sums = self._gathered().sums_by_name(kind)
        if kind == "neuron":
            return sums
        self._check_head_gates()
        return {name: sums[self._gate_of[name]] for name in self.layouts}

    def attention_gates(self) -> dict[str, torch.Tensor]:
        """The sums of `gates("head")`, each attention layer once: `{name of the block: float64 (3, num_heads)}`."""
        return self._gathered().sums_by_name("head")

    @property
    def has_head_gates(self) -> bool:
        """Whether gates of every projection's heads have been summed."""
        return bool(self.num_images) and self._gate_of.keys() == self.layouts.keys()

    def _check_head_gates(self) -> None:
        """Raise ValueError if some heads have no gates."""
        without = [name for name in self.layouts if name not in self._gate_of]
        if without:
            raise ValueError(
                f"the heads of {module_patterns(without)} have no gates: their attention layer has no output projection, "
                "or more query heads than these; choose a criterion that needs no gates (absolute, grad_norm)"
            )

    def _gathered(self) -> GateRecorder:
        if self._gates is None:
            raise ValueError(
                f"the gates of adapter {self.adapter_name!r} are not gathered: they are if its criterion needs them (as "
                "criterion='gate' does), or with HeadScorer(model, gates=True)"
            )
        if not self._gates.num_images:
            raise ValueError(
                "no optimizer step with gates was counted; call update() after the backward passes of each step"
            )
        return self._gates

    def state_dict(self) -> dict[str, Any]:
        """The statistics so far as values that JSON can hold; floats come back exactly."""
        state = {
            "num_steps": self.num_steps,
            "num_skipped": self.num_skipped,
            "sums": {name: sums.tolist() for name, sums in self._sums_by_name().items()},
        }
        return state if self._gates is None else {**state, "gates": self._gates.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`.

        Raises:
            ValueError: The state belongs to another model, or lacks the gates that are gathered here.
        """
        if self._gates is not None and state["num_steps"] and "gates" not in state:
            raise ValueError(
                f"the {state['num_steps']} saved steps were scored without gates, and the adapter's settings need them; go on "
                "with the criterion of those steps, or score from the beginning"
            )
        sums = {name: torch.tensor(values, dtype=torch.float64) for name, values in state["sums"].items()}
        shapes = {name: tuple(values.shape) for name, values in sums.items()}
        expected = {name: (len(STATISTICS), layout.num_heads) for name, layout in self.layouts.items()}
        if sums and shapes != expected:
            raise ValueError(f"the saved head scores are those of another model: they have {shapes}, not {expected}")
        if self._gates is not None and "gates" in state:
            self._gates.load_state_dict(state["gates"])
        self._sums = torch.cat([sums[name] for name in self.layouts], dim=1) if sums else None
        self.num_steps, self.num_skipped = state["num_steps"], state["num_skipped"]

    def _add(self, step: dict[str, torch.Tensor]) -> None:
        """Add the statistics of one step: `{projection: float64 (3, num_heads)}`, in the order of the layouts."""
        device = next(iter(step.values())).device  # the layers of one model may be on several
        joined = torch.cat([statistics.to(device) for statistics in step.values()], dim=1)
        self._sums = joined if self._sums is None else self._sums.to(device) + joined
        self.num_steps += 1

    def _sums_by_name(self) -> dict[str, torch.Tensor]:
        """`{projection: float64 (3, num_heads) on the CPU}`; empty before the first step."""
        if self._sums is None:
            return {}
        num_heads = [layout.num_heads for layout in self.layouts.values()]
        return dict(zip(self.layouts, self._sums.cpu().split(num_heads, dim=1), strict=True))

    def _by_projection(self, of_modules: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`{projection: (num_rows, n)}` from `{module name: (out_features, n)}`: a fused projection is divided."""
        return {name: layout.rows(of_modules[self._module_of[name]]) for name, layout in self.layouts.items()}


def check_parameters(layers: dict[str, HeadMaskable], adapter_name: str) -> None:
    """Raise ValueError if no gradient can be taken of a head-wise parameter, or its rows are not those of heads.

    Args:
        layers: `{module name: layer}` of the adapter's head-maskable layers.
        adapter_name: The adapter.
    """
    for name, layer in layers.items():
        for scored in layer.scored_parameters(adapter_name):
            problem = _problem_of(name, scored.param, layer.head_layout[adapter_name].out_features)
            if problem is not None:
                raise ValueError(f"the heads of adapter {adapter_name!r} cannot be scored: {problem}")


def _problem_of(name: str, param: nn.Parameter, num_rows: int) -> str | None:
    """What keeps a parameter of a module from being scored; None if nothing does."""
    if not param.requires_grad:
        return f"its parameters in {name} are frozen; load the adapter with is_trainable=True and make it active"
    shape = tuple(whole_shape(param))
    if shape[:1] != (num_rows,):
        return (
            f"a parameter in {name} has the shape {shape} instead of ({num_rows}, …): it was flattened, as FSDP1 does; "
            "use FSDP2 (fsdp_version 2, torch.distributed.fsdp.fully_shard), DistributedDataParallel or ZeRO"
        )
    return None
