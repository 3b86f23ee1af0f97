"""Private names of the hosts: outside `_compat` only the overridden methods that it lists are used."""

import ast
import functools
import importlib
import inspect
import pkgutil
import re
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, Trainer

import peft_heads
from peft_heads._compat.overrides import INHERITED, OVERRIDDEN


HOSTS = {"peft", "transformers", "torch", "accelerate", "datasets", "huggingface_hub", "optuna"}
ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for path in (ROOT / "peft_heads").rglob("*.py") if path.parent.name != "_compat")
PRIVATE = re.compile(r"_(?!_)\w+")
OF_PYTHON = {"_replace", "_asdict", "_fields"}  # public, of named tuples
OF_ABC = {"_abc_impl"}  # written by Python into every abstract class
OF_AUTOGRAD = {"_backward_cls"}  # written by torch into every function of autograd's
LISTED = {path.rpartition(".")[2] for path in (*OVERRIDDEN, *INHERITED)}


def is_host(cls):
    return cls.__module__.partition(".")[0] in HOSTS


@functools.cache
def own_classes():
    """Return all classes of the package whose modules can be imported here."""
    classes, unknown = set(), []
    for info in pkgutil.walk_packages(peft_heads.__path__, "peft_heads."):
        if info.name.endswith("__main__"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of old paths
            try:
                module = importlib.import_module(info.name)
            except ModuleNotFoundError as error:  # for another transformers
                assert not error.name.startswith("peft_heads")
                unknown.append(info.name)
                continue
        classes |= {c for c in vars(module).values() if inspect.isclass(c) and c.__module__.startswith("peft_heads.")}
    assert len(classes) > 50 and len(unknown) < 3
    return classes


def overridden():
    """Return `{path of the host's method: our classes that override it}`."""
    found = {}
    for cls in own_classes():
        hosts = [base for base in cls.__mro__ if is_host(base)]
        for base in cls.__mro__:
            if not base.__module__.startswith("peft_heads."):
                continue
            for name in vars(base).keys() - OF_ABC - OF_AUTOGRAD:
                origins = [host for host in hosts if name in vars(host)]
                if PRIVATE.fullmatch(name) and origins:
                    found.setdefault(f"{path_of(origins[-1])}.{name}", set()).add(base.__name__)
    return found


def path_of(cls):
    return "torch.nn.Module" if cls is torch.nn.Module else f"{cls.__module__}.{cls.__name__}"


def resolve(path):
    module, cls, name = path.rsplit(".", 2)
    return inspect.getattr_static(getattr(importlib.import_module(module), cls), name)


def test_every_overridden_private_method_is_listed():
    found = overridden()
    assert found.keys() == OVERRIDDEN.keys(), {path: found.get(path) for path in found.keys() ^ OVERRIDDEN.keys()}


@pytest.mark.parametrize("path", OVERRIDDEN)
def test_the_host_still_has_what_is_overridden(path):
    method = resolve(path)
    parameters = inspect.signature(getattr(method, "__func__", method)).parameters
    missing = [name for name in OVERRIDDEN[path].parameters if name not in parameters]
    assert OVERRIDDEN[path].parameters and not missing, f"{path}{tuple(parameters)} has no {missing}"


@pytest.mark.parametrize("path", INHERITED)
def test_the_host_still_has_what_is_inherited(path):
    resolve(path)


@pytest.mark.parametrize("path", OVERRIDDEN)
def test_the_test_that_notices_a_change_exists(path):
    file, _, name = OVERRIDDEN[path].test.partition("::")
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)


# No other private name


@functools.cache
def host_names():
    """Return the private names of the hosts' classes and objects that our code meets."""
    met = [
        torch.nn.Module(),
        torch.Tensor,
        torch.optim.Optimizer,
        PretrainedConfig(),
        PreTrainedModel,
        PeftModel,
        Trainer,
    ]
    met += [base for cls in own_classes() for base in cls.__mro__ if is_host(base)]
    return {name for each in met for name in dir(each) if PRIVATE.fullmatch(name)}


def private_uses(tree):
    """Return `(line, name)` of every name that is read as an attribute, by an import, or by its string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom):
            for name in (node.module or "").split(".") + [alias.name for alias in node.names]:
                yield node.lineno, name
        elif isinstance(node, ast.Import):
            for name in ".".join(alias.name for alias in node.names).split("."):
                yield node.lineno, name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


def own_names(tree):
    """Return the private names that the package defines: functions, classes, variables, attributes, modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr


def foreign_uses(tree, own, hosts):
    """Return the private names in the source that appear to be a host's."""
    is_string = {(node.lineno, node.value) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    of_self = {
        (node.lineno, node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("self", "cls")
    }
    for line, name in private_uses(tree):
        if not PRIVATE.fullmatch(name) or name in LISTED | OF_PYTHON:
            continue
        if name in own and (line, name) in of_self:  # tests above compare our classes with the hosts'
            continue
        if name in hosts or (name not in own and (line, name) not in is_string):
            yield line, name
    for node in ast.walk(tree):  # a string that is handed to getattr is a name, whether or not it is known as a host's
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr", "setattr", "delattr"):
            value = getattr(node.args[1], "value", None)
            if isinstance(value, str) and PRIVATE.fullmatch(value) and value not in own | LISTED | hosts:
                yield node.lineno, value


def test_no_private_name_of_a_host_outside_compat():
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
    own = {name for tree in trees.values() for name in own_names(tree)} | {"_compat", "_moved"}
    hosts, num_uses, found = host_names() - {"_compat"}, 0, []
    for path, tree in trees.items():
        num_uses += sum(1 for _, name in private_uses(tree) if PRIVATE.fullmatch(name))
        found += [f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in foreign_uses(tree, own, hosts)]
    assert num_uses > 100 and len(hosts) > 100
    assert not found, "move it into peft_heads/_compat, with the condition for deleting it:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "trial._trial_id",
        "from torch.nn.modules.conv import _ConvNd",
        "from peft._private import name",
        "import torch._dynamo",
        "torch._C.function()",
        "getattr(config, '_commit_hash', None)",
        "hasattr(param, '_hp_mapping')",
        "any(getattr(module, name) for name in ('_forward_hooks', '_backward_hooks'))",
        "layer._padding_of_a_host = layer._forward_hooks",
        "config_class._split_kwargs(kwargs)",
    ],
)
def test_the_scan_sees(source):
    tree = ast.parse(source)
    assert list(foreign_uses(tree, set(own_names(tree)), host_names()))


@pytest.mark.parametrize("source", ["self._own = 1; x._own", "def _own(): x.y._own", "x._replace(y=1)", "'_file' + x"])
def test_the_scan_leaves_alone(source):
    tree = ast.parse(source)
    assert not list(foreign_uses(tree, set(own_names(tree)), host_names()))
