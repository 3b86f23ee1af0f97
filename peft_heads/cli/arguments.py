"""Arguments of `peft-heads train`: from the command line, or from a YAML or JSON file that the command line overrides."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .._compat.transformers import trainer_has_overwrite_output_dir
from ..methods import MethodSettings
from .method_options import method_arguments, method_help, method_names, named_method


@dataclass
class ModelArguments:
    """The names of transformers' image-classification example."""

    _argument_group_name = "model"

    model_name_or_path: str = field(
        default="google/vit-base-patch16-224-in21k",
        metadata={"help": "Checkpoint to fine-tune: a local folder or a model of the Hub."},
    )
    config_name: str | None = field(default=None, metadata={"help": "Model config, if not the checkpoint's own."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads and prepared data are cached."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a model of the Hub."})
    image_processor_name: str | None = field(
        default=None, metadata={"help": "Image processor, if not the checkpoint's own."}
    )
    token: str | None = field(default=None, metadata={"help": "Hub token, if not the one of `hf auth login`."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the base model."})
    ignore_mismatched_sizes: bool = field(
        default=False,
        metadata={"help": "Re-initialise weights of another shape. (A classifier of another size always is.)"},
    )


@dataclass
class DataArguments:
    """The names of transformers' image-classification example, do_normalize and image_range."""

    _argument_group_name = "data"

    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset of the Hub, or a local folder written by `datasets`."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of a Hub dataset."})
    train_dir: str | None = field(default=None, metadata={"help": "Folder with one sub-folder of images per class."})
    validation_dir: str | None = field(default=None, metadata={"help": "The same kind of folder, for validation."})
    train_val_split: float | None = field(
        default=0.15,
        metadata={"help": "Share of the training images set aside if there is no validation split; 0 for none."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on that many images only."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on that many images only."})
    image_column_name: str = field(default="image", metadata={"help": "The column that holds the images."})
    label_column_name: str = field(default="label", metadata={"help": "The column that holds the labels."})
    do_normalize: bool | None = field(
        default=None,
        metadata={"help": "false leaves images in [0, 1], as in the papers. Default: as the checkpoint does."},
    )
    image_range: list[float] | None = field(
        default=None,
        metadata={
            "help": "LOW HIGH: the values that are black and white in images of more than 8 bits (CT, X-ray, satellite). "
            "Saved with the image processor."
        },
    )


@dataclass
class OutputArguments:
    """An argument that TrainingArguments has in transformers 4 only."""

    _argument_group_name = "output"

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Replace the adapter, or model, and the checkpoints of an earlier training in output_dir."},
    )


class TrainArgumentParser(HfArgumentParser):
    """Reports a fault in one line instead of printing the usage of two hundred arguments."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)

    def print_method_help(self, method: str) -> None:
        """Print the options of one method alone, and end, as `--help` does."""
        if method in method_names():
            print(method_help(method, self.prog))
            self.exit()


def build_parser(method: str | None = None) -> TrainArgumentParser:
    """The parser of all methods' options.

    Args:
        method: The method that is trained, whose types and values of an option count.
    """
    parser = TrainArgumentParser(
        (
            ModelArguments,
            DataArguments,
            method_arguments(method),
            TrainingArguments,
            *(() if trainer_has_overwrite_output_dir() else (OutputArguments,)),
        ),
        prog="peft-heads train",
        usage="peft-heads train [CONFIG.yaml|CONFIG.json] [--argument value …]",
        description="Fine-tune an image classifier. A config file holds the same names; the command line overrides it. "
        "What is shown here goes with every method; --method X --help shows the options of method X.",
        allow_abbrev=False,
    )
    # None means not given. TrainingArguments' default, False, could not be told from a `false` that was given.
    parser.set_defaults(do_train=None, do_eval=None, report_to="none")
    return parser


def parse_arguments(argv: list[str]) -> tuple[ModelArguments, DataArguments, MethodSettings, TrainingArguments]:
    """The arguments of a training; raises ValueError with a message for the user if one does not fit."""
    parser = build_parser(named_method(argv))
    if argv and not argv[0].startswith("-"):
        argv = file_arguments(argv[0], parser) + argv[1:]
        parser = build_parser(named_method(argv))
    if named_method(argv) is not None and {"-h", "--help"} & set(argv):
        parser.print_method_help(named_method(argv))
    try:
        *arguments, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, ImportError) as error:  # TrainingArguments' own checks as well
        raise ValueError(str(error)) from error
    if unknown:
        raise ValueError(
            "; ".join(_unknown(name.partition("=")[0], parser, "argument") for name in unknown if name.startswith("-"))
            or f"unused words: {' '.join(unknown)}"
        )
    model, data, method, training, *others = arguments
    for output in others:
        if isinstance(output, OutputArguments):
            training.overwrite_output_dir = output.overwrite_output_dir
    training.remove_unused_columns = False  # the images are a column that no model knows
    given = {name: value for name, value in vars(method).items() if name != "method" and value is not None}
    return model, data, MethodSettings.from_json({"name": method.method, **given}), training


def local_inputs(
    argv: list[str], model: ModelArguments, data: DataArguments, method: MethodSettings
) -> dict[str, str | None]:
    """`{argument: value}` of everything that a training reads and that may be a local file or folder."""
    groups = (
        (model, ("model_name_or_path", "config_name", "image_processor_name")),
        (data, ("dataset_name", "train_dir", "validation_dir")),
    )
    found = {f"--{name}": getattr(group, name) for group, names in groups for name in names}
    found["--peft_config"] = method.get("peft_config")
    return found | {"the config file": argv[0] if argv and not argv[0].startswith("-") else None}


def file_arguments(path: str, parser: HfArgumentParser) -> list[str]:
    """A config file as command-line arguments, so that both are checked and converted by the same code."""
    values = _read_mapping(path)
    fields = _fields(parser)
    unknown = [_unknown(str(key), parser, f"key in {path}") for key in values if key not in fields]
    if unknown:
        raise ValueError("; ".join(unknown))
    return [word for key, value in values.items() for word in _words(key, value, fields[key], path)]


def _read_mapping(path: str) -> dict:
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"no config file {path!r} (the first argument, where it is no --argument, is one)")
    try:
        text = file.read_text(encoding="utf-8")
        values = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error  # YAML's has lines
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no mapping of argument names to values")
    return values


def _words(key: str, value, argument: dataclasses.Field, path: str) -> list[str]:
    """One entry of a config file as command-line words."""
    takes_list = getattr(argument.type, "__origin__", argument.type) is list
    if value is None:
        if argument.default is None:
            return []
        raise ValueError(f"{key} in {path} cannot be null: leave it out for the default")
    if isinstance(value, list):
        if not takes_list:
            raise ValueError(f"{key} in {path} takes one value, not a list")
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        value = json.dumps(value)
    elif isinstance(value, bool) and argument.type not in (bool, bool | None):
        value = "yes" if value else "no"  # YAML reads `eval_strategy: no` as False
    return [f"--{key}={value}"]


def _fields(parser: HfArgumentParser) -> dict[str, dataclasses.Field]:
    return {f.name: f for group in parser.dataclass_types for f in dataclasses.fields(group) if f.init}


def _unknown(name: str, parser: HfArgumentParser, what: str) -> str:
    close = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), _fields(parser), n=1)
    return f"unknown {what}: {name}" + (f" (did you mean {close[0]}?)" if close else "")
