"""What a tuner knows of each of its adapters while it is in memory, beside the settings."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...adapter_folder.contents import FolderContents
from ...heads.layout import ProjectionLayout


@dataclass
class AdapterState:
    """State of one adapter on one model: `tuner.adapter_states[adapter_name]`.

    A method that keeps more has a subclass.

    Attributes:
        contents: What `save_pretrained` writes beside the adapter's weights.
        head_layouts: `{module name: heads}` of the model's projections, targeted or not: what is injected after a state
            dict follows its keys, not the configuration. Empty for a method without heads.
    """

    contents: FolderContents = field(default_factory=FolderContents)
    head_layouts: dict[str, ProjectionLayout] = field(default_factory=dict)
