"""Arguments of `peft-heads bench run` and `sweep`: those of every method, a recipe's, and where things are."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any

from ..benchmark.recipes import RECIPES, Recipe
from ..data.preprocessing import Preprocessing
from ..data.suites import DEFAULT_SUITE
from ..data.tasks import LIST_SEEDS, SHOTS
from ..methods import MethodSettings, all_options, effective_settings
from ..tuners.common.method_registry import get_method, registered_methods
from ..tuners.common.options import Option
from .method_options import method_names, value_in_words


def build_parser(command: str, description: str, lists: bool, method: str | None = None) -> argparse.ArgumentParser:
    """The parser of `bench run` and `bench sweep`.

    Args:
        command: `run` or `sweep`.
        description: What the command does.
        lists: Whether options of the method take several values.
        method: The method that is run, whose types and values of an option count.
    """
    parser = argparse.ArgumentParser(
        prog=f"peft-heads bench {command}",
        description=description,
        usage=f"peft-heads bench {command} --data_root DIR --output_dir DIR [--argument value …]",
        allow_abbrev=False,
    )
    _add_what(parser.add_argument_group("what"), lists)
    _add_where(parser.add_argument_group("where and how"))
    text = "as of `peft-heads train`" + ("; of several values all combinations are run" if lists else "")
    _add_method(parser.add_argument_group("method", text), lists, method)
    _add_recipe(parser.add_argument_group("recipe", "the suite's own unless given"))
    return parser


def _add_what(what: Any, lists: bool) -> None:
    what.add_argument(
        "--suite", choices=tuple(RECIPES), default=DEFAULT_SUITE, help="default: %(default)s; folder: your own"
    )
    what.add_argument("--task", nargs="+", default=[], metavar="TASK", help="default: all of the suite")
    what.add_argument(
        "--model_name_or_path",
        default="google/vit-base-patch16-224-in21k",
        help="checkpoint to fine-tune: a local folder or a model of the Hub (default: %(default)s)",
    )
    what.add_argument(
        "--seed", type=int, nargs="+", default=[0, 1, 2] if lists else [0], help="seeds of the reported runs"
    )
    few_shot = "with --suite fewshot; default: all"
    what.add_argument(
        "--shots", type=int, nargs="+", choices=SHOTS, default=list(SHOTS), help=f"images per class, {few_shot}"
    )
    what.add_argument(
        "--list_seed",
        type=int,
        nargs="+",
        choices=LIST_SEEDS,
        default=list(LIST_SEEDS),
        help=f"the published lists of images, {few_shot}",
    )


def _add_where(where: Any) -> None:
    where.add_argument("--data_root", required=True, help="folder that holds one folder per task")
    where.add_argument("--output_dir", required=True, help="results; unfinished runs go on from what lies there")
    where.add_argument("--cache_dir", help="folder of decoded images (default: see `peft-heads data info`)")
    where.add_argument("--cache_test_images", action="store_true", help="decode test images once as well (58 GB)")
    where.add_argument("--any_size", action="store_true", help="accept trees with other numbers of images")
    where.add_argument("--save_every", type=int, default=10, help="epochs between checkpoints (default 10)")
    where.add_argument("--num_workers", type=int, default=0, help="processes that load images (default 0)")
    where.add_argument("--use_cpu", action="store_true", help="leave accelerators alone")
    where.add_argument(
        "--test_every",
        type=int,
        default=0,
        help="record the best accuracy on test as well, looking every so many epochs; a labelled extra",
    )


def _add_method(group: Any, lists: bool, method: str | None) -> None:
    names = method_names()
    group.add_argument("--method", choices=names, default=names[0], help="default: %(default)s")
    defaults = _defaults()
    for option in all_options(method).values():
        choices = f" One of {', '.join(option.choices)}." if option.choices else ""
        group.add_argument(
            f"--{option.name}",
            type=_kind(option.type),
            choices=option.choices,
            nargs="+" if lists else None,
            metavar=option.name.upper(),
            help=_option_help(option, lists, defaults).replace("%", "%%") + choices,
        )


def _add_recipe(group: Any) -> None:
    kinds = typing.get_type_hints(Recipe)
    for name in _recipe_numbers():
        values = {suite: getattr(recipe, name) for suite, recipe in RECIPES.items()}
        group.add_argument(f"--{name}", type=_kind(kinds[name]), help=f"default: {_by_suite(values)}")
    for name in ("resize", "filter", "normalization"):
        values = {suite: _image_setting(recipe, name) for suite, recipe in RECIPES.items()}
        group.add_argument(
            f"--{name}",
            help=f"of training and evaluation images; see data.preprocessing (default: {_by_suite(values)})",
        )
    group.add_argument(
        "--image_range",
        type=_number,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="the values that are black and white in images of more than 8 bits (CT, X-ray, satellite)",
    )


def _option_help(option: Option, lists: bool, defaults: dict[str, dict[str, Any]]) -> str:
    """The help of `peft-heads train`, with the defaults of the benchmark in place of that command's."""
    text = option.help.rstrip(".") + "."
    if option.name == "head_select_at":
        return "When heads are selected, instead of --head_warmup_epochs: below 1 a share of the steps, else a step."
    if option.name == "head_warmup_epochs":
        values = {suite: recipe.head_warmup_epochs for suite, recipe in RECIPES.items()}
        return f"Epochs before the selection (default: the recipe's, {_by_suite(values)})."
    mine = {
        method: _words(settings[option.name], lists)
        for method, settings in defaults.items()
        if option.name in settings
    }
    if not mine:
        return text
    if len(set(mine.values())) == 1:
        return f"{text} Default: {next(iter(mine.values()))}."
    return f"{text} Default: {', '.join(f'{value} of {method}' for method, value in mine.items())}."


def _defaults() -> dict[str, dict[str, Any]]:
    """By method, what is in effect if nothing is given."""
    defaults = {}
    for method in registered_methods():
        if method.read_config is None:
            found = effective_settings(MethodSettings(method.name)) | method.grid
            replaced = {option.name for option in method.options if option.instead_of in method.grid}
            defaults[method.name] = {name: value for name, value in found.items() if name not in replaced}
    return defaults


def _words(value: Any, lists: bool) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) if lists else "none, to be given"
    return value_in_words(value)


def _by_suite(values: dict[str, Any]) -> str:
    """The first suite's value, and those of the suites that have another."""
    usual, *_ = values.values()
    others = [f"{_words(value, True)} of {suite}" for suite, value in values.items() if value != usual]
    return "; ".join([_words(usual, True), *others])


def _image_setting(recipe: Recipe, name: str) -> str:
    parts = [getattr(Preprocessing(**images), name) for images in (recipe.train_images, recipe.eval_images)]
    return " / ".join(dict.fromkeys(parts))


def read_method(args: argparse.Namespace) -> dict[str, Any]:
    """`{"name": …}` with the settings that were given and, for the rest, those that the papers try."""
    given = {name: value for name in all_options(args.method) if (value := getattr(args, name, None)) is not None}
    method = get_method(args.method)
    # a given option takes the default away of one that says the same
    replaced = {option.instead_of for option in method.options if option.name in given}
    settings = {name: value for name, value in method.grid.items() if name not in replaced} | given
    return {"name": args.method} | {
        name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in settings.items()
    }


def read_recipe(args: argparse.Namespace) -> Recipe:
    recipe = RECIPES[args.suite]
    changes = {name: value for name in _recipe_numbers() if (value := getattr(args, name)) is not None}
    images = {
        name: value
        for name in ("resize", "filter", "normalization", "image_range")
        if (value := getattr(args, name)) is not None
    }
    for name in ("train_images", "eval_images") if images else ():
        changes[name] = getattr(recipe, name) | images
    return dataclasses.replace(recipe, **changes)


def _recipe_numbers() -> list[str]:
    numbers = [name for name, kind in typing.get_type_hints(Recipe).items() if kind in (int, float, bool)]
    return [name for name in numbers if name != "head_warmup_epochs"]  # an argument of the method


def _kind(hint: Any) -> Any:
    """Reads one value of a type from text."""
    if typing.get_origin(hint) is typing.Literal:
        return str
    return _boolean if hint is bool else _number if hint is float else hint


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() == "true"


def _number(text: str) -> float:
    """A whole number stays one, so that it is written as one."""
    value = float(text)
    return int(value) if value.is_integer() else value
