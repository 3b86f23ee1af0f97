"""What an adapter folder holds beside weights and adapter configuration.

Model card, labels, image processor, and the head scores with their heat map.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from peft.utils import CONFIG_NAME

from ..heads.protocol import deactivated_heads, describe_masks
from .atomic import write_atomically
from .ordinary import check_ordinary
from .weights_file import NAMES as WEIGHTS_FILES


if TYPE_CHECKING:
    import torch

    from ..tuners.common.folder_config import SavedConfig

# Not config.json: transformers takes a folder that has one for a full checkpoint and no longer for an adapter.
LABELS_FILE = "labels.json"
SCORES_FILE, HEAT_MAP_FILE = "head_scores.json", "head_scores.png"
SECTION_BEGIN, SECTION_END = "<!-- peft_heads: begin -->", "<!-- peft_heads: end -->"
_SECTION = re.compile(f"{SECTION_BEGIN}.*?{SECTION_END}", re.DOTALL)
# What an adapter's folder holds, whatever the method.
FILES = (
    CONFIG_NAME,
    *WEIGHTS_FILES,
    LABELS_FILE,
    SCORES_FILE,
    HEAT_MAP_FILE,
    "preprocessor_config.json",
    "README.md",
)
# Small files are read whole; the largest real one, labels of 22,000 classes, has about a megabyte.
MAX_JSON_BYTES = 2**24
# Options with patterns of module names, and how long one may be: a runaway pattern takes PEFT for ever.
PATTERN_OPTIONS = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "num_heads",
)
MAX_PATTERN = 1000
_SELECTION_SETTINGS = ("ne", "ratio", "granularity", "joint", "criterion", "mask_scope")


@dataclass(frozen=True)
class CardText:
    """What a model card says of a method.

    Attributes:
        title: Begins the card's title, before "adapter for …".
        method: One sentence; `{base}` stands for the base model.
        unmasked: What the method is called while no head is deactivated.
        settings: Fields of the configuration that are listed.
        tags: The Hub's, beside `peft_heads`.
    """

    title: str
    method: str
    unmasked: str
    settings: tuple[str, ...]
    tags: tuple[str, ...]


HEAD_MASKED_LORA_CARD = CardText(
    title="Head-masked LoRA",
    method="LoRA on {base}, switched off for the attention heads that the task does not need (HEAT, Heart-LoRA).",
    unmasked="plain LoRA",
    settings=(
        *_SELECTION_SETTINGS,
        "r",
        "lora_alpha",
        "lora_dropout",
        "bottleneck_dropout",
        "adapter_bits",
        "classifier_bits",
    ),
    tags=("head-masked-lora", "lora"),
)
RLRR_CARD = CardText(
    title="RLRR",
    method="Residual low-rank rescaling of the weights of {base}.",
    unmasked="plain RLRR",
    settings=(
        "r",
        "left",
        "right",
        "residual",
        "rescale_weight",
        "norms",
        "patch_embedding",
        "init",
        "ne",
        "ratio",
        "granularity",
        "joint",
        "criterion",
    ),
    tags=("rlrr",),
)
# Of all our methods: what a card that becomes another adapter's loses. "lora" is PEFT's tag as well.
TAGS = ("head-masked-lora", "rlrr", "peft_heads")


@dataclass
class AdapterFiles:
    """Plain data, so that the configuration that carries it stays copyable and picklable.

    Attributes:
        masks: The adapter's head masks, as of the last time its weights were collected.
        model_class: Class name of the base model.
        id2label: Label names of the adapter, as of the last time its weights were collected.
        labels_in_file: Those that stand beside the weights of the file that the configuration was read from, until the
            weights are loaded.
        image_processor: `preprocessor_config.json` of the image processor as it is used.
        head_scores: Contents of `head_scores.json` and `head_scores.png`, by file name, once heads were selected by
            scores. They are written as long as the masks are those that the scores have led to.
        selection_pending: Set while a [`TaylorHeadScorer`] is going to select heads later, so that Trainer saves
            its checkpoints of the warm-up without a warning.
    """

    masks: dict[str, torch.Tensor] = field(default_factory=dict)
    model_class: str = ""
    id2label: dict[int, str] | None = None
    labels_in_file: dict[int, str] | None = None
    image_processor: str | None = None
    head_scores: dict[str, bytes] = field(default_factory=dict)
    selection_pending: bool = False

    @property
    def selected(self) -> bool:
        return any(not mask.all() for mask in self.masks.values())

    def write(self, folder: str | os.PathLike, config: SavedConfig, warn: bool = True) -> None:
        """Write the files into `folder`; an image processor, labels or scores that are not known leave what is there.

        Args:
            folder: The adapter's folder.
            config: The adapter's configuration.
            warn: Whether to say so if heads were to be selected and none is.
        """
        folder = Path(folder)
        if not self.model_class:
            return  # the configuration alone is saved, without an adapter
        # a run that broke off leaves selection_pending behind, but then it is not Trainer that saves
        # an adapter that is not named "default" lies in a folder of its own inside the checkpoint
        is_checkpoint = any(name.startswith("checkpoint-") for name in (folder.name, folder.parent.name))
        is_warm_up = self.selection_pending and is_checkpoint
        if warn and config.masks_heads and self.masks and not self.selected and not is_warm_up:
            warnings.warn(
                f"the adapter saved to {folder} is to deactivate heads ({_heads_asked_for(config)}), but none has "
                f"been selected: it is {config.card.unmasked} so far. Train with TaylorHeadScorer among the callbacks, or use "
                "HeadScorer or set_head_masks"
            )
        if self.id2label:
            write_labels(folder, self.id2label)
        if self.image_processor is not None:
            write_atomically(folder / "preprocessor_config.json", self.image_processor)
        if _led_to(self.head_scores.get(SCORES_FILE), config, self.masks):
            self.write_head_scores(folder)
        write_card(folder / "README.md", config, self)

    def write_head_scores(self, folder: str | os.PathLike) -> None:
        for name, content in self.head_scores.items():
            write_atomically(Path(folder) / name, content)

    def read_head_scores(self, folder: str | os.PathLike) -> None:
        """Take over the head scores that an earlier run has written into `folder`, unless there are some already."""
        paths = [Path(folder) / name for name in (SCORES_FILE, HEAT_MAP_FILE)]
        if not self.head_scores and all(path.exists() for path in paths):
            self.head_scores = {path.name: path.read_bytes() for path in paths}


def set_image_processor(model: Any, image_processor: Any, adapter_name: str = "default") -> None:
    """Let `save_pretrained` and `push_to_hub` store the image processor beside the adapter.

    [`TaylorHeadScorer`] does so by itself with the Trainer's `processing_class`.
    """
    files = getattr(model.peft_config[adapter_name], "adapter_files", None)
    settings = getattr(image_processor, "to_dict", dict)()
    if files is not None and "image_processor_type" in settings:  # not a tokenizer, say
        files.image_processor = image_processor.to_json_string()


def read_settings(folder: str | os.PathLike) -> dict[str, Any]:
    """`adapter_config.json` of an adapter's folder, of whatever type.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        ValueError: The file is damaged, or not PEFT's.
    """
    path = Path(folder) / CONFIG_NAME
    if not path.exists():
        raise FileNotFoundError(f"there is no adapter in {folder}: it has no {CONFIG_NAME}")
    check_ordinary(path)
    try:
        settings = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is not PEFT's: it holds no mapping of settings")
    try:
        for name in ("peft_type", "base_model_name_or_path", "revision"):
            if not isinstance(settings.get(name), (str, type(None))):
                raise ValueError(f"{name} must be text; got {str(settings[name])[:80]!r}")
        check_patterns(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return settings


def read_json(path: Path) -> Any:
    """What a small JSON file holds.

    Raises:
        ValueError: It is none, or larger or nested deeper than a file of settings can be.
    """
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise ValueError(f"it has {size:,} bytes (expected {MAX_JSON_BYTES:,} at most)")
    try:
        return json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_patterns(settings: dict[str, Any]) -> None:
    """Raise ValueError if a pattern of module names among an adapter's settings is longer than any real one.

    Args:
        settings: By the names of the configuration's fields.
    """
    for option in PATTERN_OPTIONS:
        value = settings.get(option)
        patterns = [value] if isinstance(value, str) else value if isinstance(value, (list, set, tuple, dict)) else []
        if isinstance(value, (str, dict)) or option == "layers_pattern":  # of lists the others hold names
            for pattern in patterns:
                _check_pattern(option, pattern)
        longest = max((len(pattern) for pattern in patterns if isinstance(pattern, str)), default=0)
        if longest > MAX_PATTERN:
            raise ValueError(
                f"{option} has a pattern of {longest:,} characters (expected {MAX_PATTERN:,} at most); name the "
                "modules in a list"
            )


def _check_pattern(option: str, pattern: Any) -> None:
    try:
        re.compile(pattern if len(pattern) <= MAX_PATTERN else "")
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{option} is no pattern of module names ({error}); got {str(pattern)[:80]!r}") from error


def check_folder_files(folder: str | os.PathLike) -> None:
    """Raise ValueError if an adapter's folder holds a folder in a file's place, a pipe, a device or endless settings.

    `trainer_state.json`, which lies beside the adapter in a checkpoint, may have any length.
    """
    for path in sorted(Path(folder).iterdir()):
        if path.name in FILES or not path.is_dir():
            check_ordinary(path)
        if (
            path.suffix == ".json"
            and path.name != "trainer_state.json"
            and path.is_file()
            and path.stat().st_size > MAX_JSON_BYTES
        ):
            raise ValueError(f"{path} has {path.stat().st_size:,} bytes (expected {MAX_JSON_BYTES:,} at most)")


def write_labels(folder: str | os.PathLike, id2label: dict[int, str]) -> None:
    """Store label names beside an adapter; `load_image_classifier` reads them for adapters of every type."""
    write_atomically(Path(folder) / LABELS_FILE, json.dumps({"id2label": id2label}, indent=1, ensure_ascii=False))


def read_labels(folder: str | os.PathLike) -> dict[int, str] | None:
    """The label names stored in an adapter's folder, None if there are none.

    Raises:
        ValueError: The file is not what `AdapterFiles.write` writes.
    """
    path = Path(folder) / LABELS_FILE
    if not path.exists():
        return None
    check_ordinary(path)
    try:
        labels = {int(index): str(label) for index, label in read_json(path)["id2label"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path} is not a label file, expected {{"id2label": {{"0": "name", …}}}}: {error}'
        ) from error
    missing = next((index for index in range(len(labels)) if index not in labels), None)
    if missing is not None:
        raise ValueError(
            f"{path} names no class {missing}, but others up to {max(labels)}; expected all from 0 on, without gaps"
        )
    return labels


def find_labels(path_or_repo: str, subfolder: str | None = None, **download_kwargs: Any) -> dict[int, str] | None:
    """The label names of an adapter in a folder or on the Hub; None if it has none, or only numbered ones."""
    folder = Path(path_or_repo, subfolder or "")
    if not folder.is_dir():
        try:
            folder = Path(hf_hub_download(path_or_repo, LABELS_FILE, subfolder=subfolder, **download_kwargs)).parent
        except (EntryNotFoundError, LocalEntryNotFoundError):
            return None
    labels = read_labels(folder)
    numbered = labels and all(label == f"LABEL_{index}" for index, label in labels.items())
    return None if numbered else labels


def update_card(peft_model: Any, folder: str | os.PathLike) -> None:
    """Let the card in `folder` describe the model's active adapter: with our section if it is one of ours, else without.

    The latter where an adapter of another type is saved over one of ours.
    """
    path = Path(folder) / "README.md"
    config = peft_model.active_peft_config
    files = getattr(config, "adapter_files", None)
    if files is None:
        if path.exists() and SECTION_BEGIN.encode() in path.read_bytes():
            card = ModelCard.load(path)
            card.text = _SECTION.sub("", card.text).lstrip()
            card.data.tags = [tag for tag in card.data.tags or [] if tag not in TAGS]
            write_atomically(path, str(card))
    elif files.model_class:  # the weights have been collected at least once
        write_card(path, config, files)


def write_card(path: Path, config: SavedConfig, files: AdapterFiles) -> None:
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
    if "ForImageClassification" in files.model_class:
        card.data.pipeline_tag = "image-classification"

    # what another adapter's scores say, in a folder used twice, is no part of this one's card
    scores = path.parent / SCORES_FILE
    explained = scores.exists() and _led_to(scores.read_bytes(), config, files.masks)
    heat_map = HEAT_MAP_FILE if explained and (path.parent / HEAT_MAP_FILE).exists() else None
    section = f"{SECTION_BEGIN}\n{card_section(config, files, heat_map)}\n{SECTION_END}"
    if SECTION_BEGIN in card.text:
        card.text = _SECTION.sub(lambda _: section, card.text)
    elif card.text.count("[More Information Needed]") > 20:
        versions = card.text.partition("### Framework versions")[2].strip()
        card.text = f"{section}\n\n### Framework versions\n\n{versions}\n"
    else:
        card.text = f"{section}\n\n{card.text.lstrip()}"
    write_atomically(path, str(card))


def card_section(config: SavedConfig, files: AdapterFiles, heat_map: str | None = None) -> str:
    """The part of the model card about the method: deactivated heads, heat map, settings, how to install and load."""
    base = config.base_model_name_or_path or ""
    if _is_repository(base):
        base_link = f"[{base}](https://huggingface.co/{base})"
    else:
        base = Path(base).name or "a model without a name"
        base_link = f"`{base}` (a local checkpoint)"
    text = config.card
    settings = "\n".join(f"| `{name}` | {getattr(config, name)} |" for name in text.settings)
    if not config.masks_heads:
        heads = f"None: with `ne=0` this is {text.unmasked}."
    elif not files.selected:
        heads = f"**None have been selected yet**: this adapter was saved before the selection and is {text.unmasked} so far."
    else:
        heads = describe_masks(files.masks).replace("; ", "\n- ")
        heads = f"- {heads}"
    if heat_map is not None:
        heads += f"\n\n![Responsiveness of the heads]({heat_map})\n\nAll scores: [{SCORES_FILE}]({SCORES_FILE})"
    version = importlib.metadata.version("peft-heads")
    return f"""# {text.title} adapter for {base}

{text.method.format(base=base_link)}
Trained with [peft_heads](https://pypi.org/project/peft-heads/) {version}.

## Deactivated heads

{heads}

## Settings

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

{_how_to_decode(files)}

or, on a base model of your own, `import peft_heads` and then `PeftModel.from_pretrained(base_model, …)`: importing
`peft_heads` is what makes the adapter type known to PEFT."""


def _how_to_decode(files: AdapterFiles) -> str:
    """For the card: a pipeline would clip images of more than 8 bits."""
    image_range = json.loads(files.image_processor or "{}").get("image_range")
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


def _led_to(report: bytes | None, config: SavedConfig, masks: dict[str, torch.Tensor]) -> bool:
    """Whether the scores of `head_scores.json` are those by which `masks` were selected, with these settings."""
    try:
        report = json.loads(report or "{}")
        same_settings = all(report[name] == getattr(config, name) for name in _SELECTION_SETTINGS)
        return same_settings and report["deactivated_heads"] == deactivated_heads(masks)
    except (ValueError, KeyError, TypeError):
        return False  # not a file of ours


def _heads_asked_for(config: SavedConfig) -> str:
    return f"ne={config.ne}" if config.ne is not None else f"ratio={config.ratio}"
