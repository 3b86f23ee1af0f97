"""Loads image classifiers: a checkpoint to train, or a saved adapter on its base model."""

from __future__ import annotations

import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._compat.peft import is_own
from ._compat.transformers import mismatched_keys, support_peft_in_image_pipelines
from .adapter_folder.base_model import base_model_class
from .adapter_folder.files import check_folder_files
from .adapter_folder.labels import read_labels
from .adapter_folder.settings import read_settings


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BaseImageProcessor, PreTrainedModel


def load_image_classifier(
    path_or_repo: str | os.PathLike, trust_remote_code: bool = False, **kwargs: Any
) -> tuple[PeftModel, BaseImageProcessor]:
    """Load an adapter together with its base model, labels and image processor.

    This works for any PEFT adapter of an image classifier. Labels and processor are taken from the adapter's folder
    where it has them, as ours has, and from the base model otherwise.

    A pipeline clips files of more than 8 bits per channel (16-bit PNG or TIFF, floats) to white. Decode them first, as
    in training, and pass the pipeline the result: `peft_heads.data.images.decode_image(path)`, with
    `image_range=image_processor.image_range` where the adapter was trained with one, of which a warning reminds.

    Args:
        path_or_repo: Folder or Hub repository of the adapter.
        trust_remote_code: Whether code in the base model's repository may run; code in the adapter's never does.
        kwargs: `revision`, `token`, `cache_dir`, `subfolder` of the adapter's repository.

    Returns:
        The model in evaluation mode and its image processor, fit for
        `pipeline("image-classification", model=model, image_processor=image_processor)`.

    Raises:
        FileNotFoundError: There is neither a folder nor a repository of that name and revision, or it cannot be read.
        ValueError: It holds no adapter, or one that does not name its base model, or an invalid `image_range`.
    """
    from .data.images import image_range_of

    folder = fetch_adapter(path_or_repo, **kwargs)
    base_kwargs = {key: value for key, value in kwargs.items() if key in ("token", "cache_dir")}
    base_kwargs["trust_remote_code"] = trust_remote_code
    model, _ = load_adapter(folder, **base_kwargs)
    image_processor = processor_of(folder, **base_kwargs)
    if image_range_of(image_processor) is not None:
        low, high = image_processor.image_range
        warnings.warn(
            f"{path_or_repo} was trained on images of more than 8 bits with {low:g} as black and {high:g} as white. A "
            "pipeline would clip such files: decode them first, by peft_heads.data.images.decode_image(path, "
            f"image_range=({low:g}, {high:g}))"
        )
    support_peft_in_image_pipelines()
    return model, image_processor


def processor_of(folder: Path, base_model: str | os.PathLike | None = None, **base_kwargs: Any) -> BaseImageProcessor:
    """The image processor in an adapter's folder, else that of its base model, for which `base_kwargs` are."""
    from .data.images import load_image_processor

    if (folder / "preprocessor_config.json").exists():
        return load_image_processor(folder)
    if base_model is None:
        settings = read_settings(folder)
        base_model, base_kwargs["revision"] = settings["base_model_name_or_path"], settings.get("revision") or "main"
    return load_image_processor(base_model, **base_kwargs)


def load_checkpoint(folder: Path) -> PreTrainedModel:
    """The image classifier in a folder of transformers, as `export --to merged` writes it, in float32 and evaluation mode.

    Raises:
        ValueError: It cannot be read, or lacks weights, which would be random.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForImageClassification

    from .adapter_folder.checkpoints import read_error

    try:
        with quiet_loading():
            model, info = AutoModelForImageClassification.from_pretrained(
                folder,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        faults = [f"{file.name} ({fault})" for file in folder.glob("*.safetensors") if (fault := read_error(file))]
        reason = ", ".join(faults) or " ".join(str(error).split())
        raise ValueError(f"{folder} holds no image classifier that can be read: {reason}") from error
    random = sorted({*info["missing_keys"], *mismatched_keys(info)})
    if random:
        raise ValueError(
            f"{folder} is no complete image classifier: {', '.join(random)} are missing, or of another shape, and would "
            "be random"
        )
    return model.eval()


def fetch_adapter(path_or_repo: str | os.PathLike, subfolder: str | None = None, **kwargs: Any) -> Path:
    """The local folder of an adapter, downloaded if a repository holds it, after checking that its files can be read.

    Arguments and errors are those of [`load_image_classifier`].
    """
    from .adapter_folder.download import local_folder
    from .adapter_folder.weights_file import NAMES, find_weights, read_infos
    from .tuners.common.method_registry import is_own_type
    from .tuners.common.saved_settings import check_foreign

    folder = local_folder(path_or_repo, subfolder, **kwargs)
    check_folder_files(folder)
    settings = read_settings(folder)  # before anything is loaded: its errors name the file
    weights = find_weights(folder)
    if weights is None:
        raise FileNotFoundError(f"{folder} has no weights of an adapter: neither {' nor '.join(NAMES)} is there")
    if is_own_type(settings.get("peft_type")):
        read_infos(weights)
    else:
        check_foreign(settings, weights)
    return Path(folder)


def load_adapter(
    folder: str | os.PathLike, base_model: str | os.PathLike | None = None, **base_kwargs: Any
) -> tuple[PeftModel, list[str]]:
    """An adapter on its base model, in evaluation mode, with the adapter's labels.

    Args:
        folder: The adapter's folder.
        base_model: Folder or repository of the base model; what the adapter names if None.
        base_kwargs: Arguments of the base model's `from_pretrained`.

    Returns:
        The model, and the names of the weights that neither the base model's checkpoint nor the adapter holds.

    Raises:
        FileNotFoundError: There is no such base model.
        ValueError: The adapter does not name its base model, or its files contradict each other.
    """
    from peft import PeftConfig, PeftModel
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    from .tuners.common.saved_keys import is_adapter_key, module_of, saved_keys
    from .tuners.common.setting_types import refusal

    settings = read_settings(folder)
    if settings.get("peft_type") not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{folder} holds an adapter of type {settings.get('peft_type')!r}, which PEFT does not know")
    adapter_config = PeftConfig.from_pretrained(os.fspath(folder))
    base = base_model or adapter_config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"the adapter in {folder} does not say which base model it belongs to; load the base model yourself "
            "and use PeftModel.from_pretrained(base_model, path), or name it for a command (--base_model)"
        )
    base_kwargs.setdefault("trust_remote_code", False)
    if base_model is None:
        base_kwargs["revision"] = adapter_config.revision or "main"
    labels = read_labels(folder)
    label_kwargs = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}} if labels else {}
    try:
        with quiet_loading():  # the adapter brings the trained classifier
            model, info = base_model_class(settings, folder).from_pretrained(
                base, ignore_mismatched_sizes=True, output_loading_info=True, **label_kwargs, **base_kwargs
            )
    except OSError as error:
        raise FileNotFoundError(
            f"{folder}: its base model {os.fspath(base)!r} cannot be loaded: {' '.join(str(error).split())}"
        ) from error
    trained = {module_of(key) + "." for key in saved_keys(folder) if not is_adapter_key(key)}
    untrained = sorted({*info["missing_keys"], *mismatched_keys(info)})
    try:
        model = PeftModel.from_pretrained(model, os.fspath(folder)).eval()
    except OSError:
        raise
    except Exception as error:
        if is_own(adapter_config):  # its folder was checked before, and is not at fault
            raise
        raise refusal(folder, error) from error
    return model, [name for name in untrained if not name.startswith(tuple(trained))]


def new_image_classifier(
    path: str | os.PathLike,
    names: list[str],
    *,
    config_name: str | None = None,
    config_changes: dict[str, Any] | None = None,
    ignore_mismatched_sizes: bool = False,
    **hub_arguments: Any,
) -> PreTrainedModel:
    """A checkpoint to train for these classes, in float32.

    A classifier of another size is re-initialised; nothing else is.

    Args:
        path: Folder or Hub repository of the checkpoint.
        names: The class names.
        config_name: Folder or repository of the model's configuration, if not the checkpoint's own.
        config_changes: Values for fields of the configuration, set before the model is built.
        ignore_mismatched_sizes: Whether other weights of a wrong shape are re-initialised as well.
        hub_arguments: Arguments of `from_pretrained` (`revision`, `token`, `cache_dir`, …). Without
            `trust_remote_code` among them it is False.

    Raises:
        ValueError: There is no such checkpoint, it cannot be read, or it does not fit its configuration.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForImageClassification

    from .adapter_folder.checkpoints import read_error
    from .backbones.classifier import classifier_names

    if os.path.isfile(os.path.join(path, "adapter_config.json")):
        raise ValueError(
            f"{path} is an adapter: name its base model as --model_name_or_path; --resume_from_checkpoint goes on "
            "training, peft_heads.load_image_classifier loads it"
        )
    hub_arguments.setdefault("trust_remote_code", False)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    try:
        config = AutoConfig.from_pretrained(config_name or path, **labels, **hub_arguments)
    except (OSError, ValueError, AttributeError, TypeError) as error:  # the last two for JSON that is no mapping
        raise ValueError(
            f"no image classifier in {config_name or path!r}, config.json is missing or cannot be read: {error}"
        ) from error
    for name, value in (config_changes or {}).items():
        setattr(config, name, value)
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **hub_arguments,
        )
    except (OSError, ValueError, SafetensorError) as error:
        faults = [f"{file.name} ({fault})" for file in Path(path).glob("*.safetensors") if (fault := read_error(file))]
        raise ValueError(f"no image classifier in {path!r}: {', '.join(faults) or error}") from error
    classifiers = tuple(f"{name}." for name in classifier_names(model))
    mismatched = [key for key in mismatched_keys(info) if not key.startswith(classifiers)]
    if mismatched and not ignore_mismatched_sizes:
        raise ValueError(
            f"weights of {path} have other shapes than the config says: {', '.join(mismatched)}; "
            "--ignore_mismatched_sizes re-initialises them"
        )
    return model


@contextmanager
def quiet_loading():
    """Silence transformers' progress bars and its report of a newly initialised classifier inside the block."""
    from transformers.utils import logging

    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()
