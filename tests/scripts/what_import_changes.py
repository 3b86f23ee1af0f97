"""Print, as JSON, the libraries' attributes and process settings that `import peft_heads` changes."""

import json
import logging
import os
import sys
import warnings

import accelerate  # noqa: F401
import datasets
import huggingface_hub  # noqa: F401
import peft.utils.hotswap  # noqa: F401
import PIL.Image
import torch
import transformers.pipelines.base
from torch.optim.optimizer import _global_optimizer_post_hooks
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments  # noqa: F401  (made on demand)


LIBRARIES = {"accelerate", "datasets", "huggingface_hub", "peft", "PIL", "torch", "transformers"}


def content(value):
    """Return identity and size: tables grow in place."""
    return id(value), len(value) if isinstance(value, (dict, list, set)) else 0


def attributes(modules):
    found = {}
    for name in modules:
        for key, value in list(vars(sys.modules[name]).items()):
            if isinstance(value, type(sys)):
                continue  # the first import of a module does not change its package
            if isinstance(value, dict | list | set):
                found[key] = content(value)  # one table has the same name in all modules that import it
            elif getattr(value, "__module__", name) == name:
                found[f"{name}.{key}"] = content(value)
            if isinstance(value, type) and value.__module__ == name:
                members = {k: v for k, v in vars(value).items() if not k.startswith("__")}
                found |= {f"{name}.{key}.{member}": content(v) for member, v in members.items()}
    return found


def settings():
    loggers = {name: log for name, log in logging.root.manager.loggerDict.items() if isinstance(log, logging.Logger)}
    return {
        "warning filters": list(map(str, warnings.filters)),
        "loggers": {
            name: (log.level, log.propagate, log.disabled, len(log.handlers)) for name, log in loggers.items()
        },
        "root logger": (logging.root.level, len(logging.root.handlers)),
        "environment": dict(os.environ),
        "optimizer hooks": len(_global_optimizer_post_hooks),
        "module hooks": len(torch.nn.modules.module._global_forward_hooks),
        "torch": (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()),
        "random numbers": torch.get_rng_state().tolist(),
        "images": (PIL.Image.MAX_IMAGE_PIXELS, sorted(PIL.Image.OPEN), sorted(PIL.Image.EXTENSION)),
        "datasets": {key: repr(value) for key, value in vars(datasets.config).items() if key.isupper()},
        "pipelines": repr(getattr(transformers.pipelines.base, "SUPPORTED_PEFT_TASKS", None)),
        "hooks of Python": (sys.excepthook, sys.displayhook, sys.getrecursionlimit()),
    }


def differences(before, after, with_new=True):
    return [key for key in after if before.get(key) != after[key] and (with_new or key in before)]


if __name__ == "__main__":
    modules = [name for name, module in sys.modules.items() if name.partition(".")[0] in LIBRARIES and module]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # attributes that are deprecated
        before = attributes(modules)
    old = settings()
    import peft_heads  # noqa: F401

    new = settings()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        after = attributes(modules)
    new["loggers"] = {name: log for name, log in new["loggers"].items() if name in old["loggers"]}
    print(json.dumps({"attributes": differences(before, after), "settings": differences(old, new)}))
