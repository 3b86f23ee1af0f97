"""Loading a saved adapter as a ready image classifier."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._compat import support_peft_in_image_pipelines
from .adapter_files import read_labels, read_settings


if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import BaseImageProcessor


def load_image_classifier(path_or_repo: str | os.PathLike, **kwargs: Any) -> tuple[PeftModel, BaseImageProcessor]:
    """Load an adapter together with its base model, labels and image processor.

    Works for any PEFT adapter of an image classifier; labels and processor are taken from the adapter's folder where
    it has them (ours does) and from the base model otherwise.

    Args:
        path_or_repo: Folder or Hub repository of the adapter.
        kwargs: `revision`, `token`, `cache_dir`, `subfolder` of the adapter's repository.

    Returns:
        The model in evaluation mode and its image processor, fit for
        `pipeline("image-classification", model=model, image_processor=image_processor)`.

    Raises:
        FileNotFoundError: There is neither a folder nor a repository of that name and revision, or it cannot be read.
        ValueError: It holds no adapter, or one that does not name its base model.
    """
    from huggingface_hub import snapshot_download
    from peft import PeftConfig, PeftModel
    from transformers import AutoModelForImageClassification

    from .data.images import load_image_processor
    from .tuners.head_masked_lora.state_dict import saved_keys

    folder = os.fspath(path_or_repo)
    subfolder = kwargs.pop("subfolder", None)
    if not os.path.isdir(folder):
        # the small files of an adapter, once; afterwards everything is local
        names = ("*.json", "*.safetensors", "README.md")
        patterns = [f"{subfolder}/{name}" for name in names] if subfolder else names
        others = None if subfolder else "*/*"  # checkpoints that Trainer has pushed as well
        try:
            folder = snapshot_download(folder, allow_patterns=list(patterns), ignore_patterns=others, **kwargs)
        except (OSError, ValueError) as error:
            revision = f" at revision {kwargs['revision']!r}" if kwargs.get("revision") else ""
            raise FileNotFoundError(
                f"no adapter {path_or_repo!r}{revision}: neither a local folder nor a repository that can be read "
                f"({type(error).__name__}: {error})"
            ) from error
    folder = os.path.join(folder, subfolder) if subfolder else folder

    if not os.path.exists(os.path.join(folder, "adapter_config.json")):
        raise ValueError(
            f"Can't find 'adapter_config.json' in {path_or_repo}{f'/{subfolder}' if subfolder else ''}: it holds no "
            "adapter"
        )
    read_settings(folder)  # errors that name the file, before anything is loaded
    saved_keys(folder)
    adapter_config = PeftConfig.from_pretrained(folder)
    base = adapter_config.base_model_name_or_path
    if not base:
        raise ValueError(
            f"the adapter in {path_or_repo} does not say which base model it belongs to; load the base model yourself "
            "and use PeftModel.from_pretrained(base_model, path)"
        )
    base_kwargs = {key: value for key, value in kwargs.items() if key in ("token", "cache_dir")}
    base_kwargs["revision"] = adapter_config.revision or "main"
    labels = read_labels(folder)
    label_kwargs = {"id2label": labels, "label2id": {label: i for i, label in labels.items()}} if labels else {}
    with quiet_loading():  # the adapter brings the trained classifier
        model = AutoModelForImageClassification.from_pretrained(
            base, ignore_mismatched_sizes=True, **label_kwargs, **base_kwargs
        )
    if os.path.exists(os.path.join(folder, "preprocessor_config.json")):
        image_processor = load_image_processor(folder)
    else:
        image_processor = load_image_processor(base, **base_kwargs)
    support_peft_in_image_pipelines()
    return PeftModel.from_pretrained(model, folder).eval(), image_processor


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
