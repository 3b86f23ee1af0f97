"""The model card of an adapter: metadata, and one section of our own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..heads.neurons import describe_neurons
from ..heads.protocol import describe_masks
from .atomic import write_atomically
from .contents import FolderContents, folder_contents
from .files import CARD_FILE
from .score_files import HEAT_MAP_FILE, SCORES_FILE, led_to


SECTION_BEGIN, SECTION_END = "<!-- peft_heads: begin -->", "<!-- peft_heads: end -->"
_SECTION = re.compile(f"{SECTION_BEGIN}.*?{SECTION_END}", re.DOTALL)


@dataclass(frozen=True)
class CardText:
    """What a model card says of a method.

    Attributes:
        title: Beginning of the card's title, before "adapter for …".
        method: One sentence about the method; `{base}` stands for the base model.
        unmasked: Name of the method while no head is deactivated; of no use to a method without heads.
        settings: Fields of the configuration that are listed.
        tags: Tags for the Hub, beside `peft_heads`.
        pruning: Those of the settings that are listed only where the adapter prunes neurons.
    """

    title: str
    method: str
    unmasked: str = ""
    settings: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    pruning: tuple[str, ...] = ()


class CardedConfig(Protocol):
    """What a card needs from an adapter's configuration.

    One that deactivates heads has the properties `selection_settings` and `masks_heads` as well.
    """

    card: CardText
    base_model_name_or_path: str | None


def update_card(peft_model: Any, folder: str | os.PathLike, own_tags: tuple[str, ...]) -> None:
    """Let the card in `folder` describe the model's active adapter: with our section if it is one of ours, else without.

    The latter where an adapter of another type is saved over one of ours.

    Args:
        peft_model: The model.
        folder: The adapter's folder.
        own_tags: Tags of our methods, which the card of another adapter loses.
    """
    path = Path(folder) / CARD_FILE
    contents = folder_contents(peft_model, peft_model.active_adapter)
    if contents is None:
        if path.exists() and SECTION_BEGIN.encode() in path.read_bytes():
            card = ModelCard.load(path)
            card.text = _SECTION.sub("", card.text).lstrip()
            card.data.tags = [tag for tag in card.data.tags or [] if tag not in own_tags]
            write_atomically(path, str(card))
    elif contents.model_class:  # the weights have been collected at least once
        write_card(path, peft_model.active_peft_config, contents)


def write_card(path: Path, config: CardedConfig, contents: FolderContents) -> None:
    """Create or update the model card: metadata, and one section of our own between two comments.

    PEFT has written its card before. Where that is nothing but the Hub's template of blanks it is replaced; a card
    that a person has written keeps its text.
    """
    card = ModelCard.load(path) if path.exists() else ModelCard.from_template(ModelCardData())
    card.data.tags = sorted({*(card.data.tags or []), *config.card.tags, "peft_heads"})
    base = config.base_model_name_or_path
    if not _is_repository(base):
        base = None
    # PEFT puts a folder of this machine there, or nothing at all, which the Hub refuses
    if base is None or (isinstance(card.data.base_model, str) and not _is_repository(card.data.base_model)):
        card.data.base_model = base
        card.data.tags = [tag for tag in card.data.tags if not tag.startswith("base_model:")]
    if "ForImageClassification" in contents.model_class:
        card.data.pipeline_tag = "image-classification"

    # what another adapter's scores say, in a folder used twice, is no part of this one's card
    scores = path.parent / SCORES_FILE
    settings = selection_settings(config)
    explained = settings is not None and scores.exists() and led_to(scores.read_bytes(), settings, contents.masks)
    heat_map = HEAT_MAP_FILE if explained and (path.parent / HEAT_MAP_FILE).exists() else None
    section = f"{SECTION_BEGIN}\n{card_section(config, contents, heat_map)}\n{SECTION_END}"
    if SECTION_BEGIN in card.text:
        card.text = _SECTION.sub(lambda _: section, card.text)
    elif card.text.count("[More Information Needed]") > 20:
        versions = card.text.partition("### Framework versions")[2].strip()
        card.text = f"{section}\n\n### Framework versions\n\n{versions}\n"
    else:
        card.text = f"{section}\n\n{card.text.lstrip()}"
    write_atomically(path, str(card))


def card_section(config: CardedConfig, contents: FolderContents, heat_map: str | None = None) -> str:
    """The part of the model card about the method: deactivated heads, heat map, settings, how to install and load."""
    base = config.base_model_name_or_path or ""
    if _is_repository(base):
        base_link = f"[{base}](https://huggingface.co/{base})"
    else:
        base = Path(base).name or "a model without a name"
        base_link = f"`{base}` (a local checkpoint)"
    text = config.card
    left_out = () if getattr(config, "prunes_neurons", False) else text.pruning
    settings = "\n".join(f"| `{name}` | {getattr(config, name)} |" for name in text.settings if name not in left_out)
    version = importlib.metadata.version("peft-heads")
    return f"""# {text.title} adapter for {base}

{text.method.format(base=base_link)}
Trained with [peft_heads](https://pypi.org/project/peft-heads/) {version}.

{_about_heads(config, contents, heat_map)}{_about_neurons(contents)}## Settings

| field | value |
|---|---|
{settings}

## Use

```
pip install peft-heads
```

```python
from peft_heads import load_image_classifier

model, image_processor = load_image_classifier("FOLDER_OR_REPOSITORY")
```

{_how_to_decode(contents)}

or, on a base model of your own, `import peft_heads` and then `PeftModel.from_pretrained(base_model, …)`: importing
`peft_heads` is what makes the adapter type known to PEFT."""


def selection_settings(config: CardedConfig) -> dict[str, Any] | None:
    """How the heads of an adapter are selected, by field of its configuration; None for a method without heads."""
    return getattr(config, "selection_settings", None)


def _about_heads(config: CardedConfig, contents: FolderContents, heat_map: str | None) -> str:
    """The section about deactivated heads; empty for a method without heads."""
    if selection_settings(config) is None:
        return ""
    if not config.masks_heads and contents.neuron_masks:
        heads = "None: with `ne=0` neurons alone are pruned."
    elif not config.masks_heads:
        heads = f"None: with `ne=0` this is {config.card.unmasked}."
    elif not contents.selected:
        heads = (
            "**None have been selected yet**: this adapter was saved before the selection and is "
            f"{config.card.unmasked} so far."
        )
    else:
        heads = "- " + describe_masks(contents.masks).replace("; ", "\n- ")
    if heat_map is not None:
        heads += f"\n\n![Responsiveness of the heads]({heat_map})\n\nAll scores: [{SCORES_FILE}]({SCORES_FILE})"
    return f"## Deactivated heads\n\n{heads}\n\n"


def _about_neurons(contents: FolderContents) -> str:
    """The section about neurons that are off; empty for an adapter that prunes none."""
    if not contents.neuron_masks:
        return ""
    lines = "\n".join(f"- {line}" for line in describe_neurons(contents.neuron_masks))
    return f"## Deactivated neurons\n\n{lines}\n\n"


def _how_to_decode(contents: FolderContents) -> str:
    """For the card: a pipeline would clip images of more than 8 bits."""
    image_range = json.loads(contents.image_processor or "{}").get("image_range")
    trained, argument = "", ""
    if isinstance(image_range, list) and len(image_range) == 2:
        low, high = map(float, image_range)
        trained = f" This adapter was trained with {low:g} as black and {high:g} as white in them."
        argument = f", image_range=({low:g}, {high:g})"
    return f"""Files of more than 8 bits per channel (16-bit PNG or TIFF, floats) must be decoded before a `pipeline` gets them, which
would clip their values: `peft_heads.data.images.decode_image("FILE"{argument})`.{trained}"""


def _is_repository(base: str | None) -> bool:
    """Whether the base model's name is one of the Hub: a folder of this machine is no use to the card's readers."""
    try:
        validate_repo_id(base or "")
    except HFValidationError:
        return False
    return not Path(base).exists()
