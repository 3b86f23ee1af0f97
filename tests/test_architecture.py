"""Imports point one way, as docs/architecture.md draws it, and never in a circle."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "peft_heads"
PAGE = ROOT / "docs" / "architecture.md"


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
OLD_PATHS = {module for module, path in MODULES.items() if "\nmoved(" in path.read_text("utf-8")}


def imported_name(module, node):
    """What an `from … import` names, in full."""
    if not node.level:
        return node.module
    is_package = MODULES[module].name == "__init__.py"
    here = module.split(".") if is_package else module.split(".")[:-1]
    return ".".join([*here[: len(here) - node.level + 1], *([node.module] if node.module else [])])


@cache
def imports(module):
    """Modules of the package that a module imports: at its top, inside functions, and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = imported_name(module, node)
            found.update(
                name if name in MODULES else source for name in (f"{source}.{alias.name}" for alias in node.names)
            )
    return sorted(found & MODULES.keys() - {module})


def drawn_order():
    """`{module or room: floor}` of every drawing on the page: a floor may import those below it, and its own room."""
    drawings = re.findall(r"```order\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    assert len(drawings) >= 2
    floors = {}
    for drawing in drawings:
        for number, line in enumerate(reversed(drawing.strip().splitlines())):
            floors |= {f"peft_heads.{name.strip()}": (drawing, number) for name in line.split(",")}
    return floors


def pairs(one, other):
    """The ancestors of two modules that stand side by side: the rooms between which an import goes."""
    one, other = one.split("."), other.split(".")
    shared = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)
    return None if shared is None else (".".join(one[: shared + 1]), ".".join(other[: shared + 1]))


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    """From a room to those drawn below it; rooms on one floor do not import each other."""
    if module == "peft_heads" or module in OLD_PATHS:  # it gathers the public names
        return
    floors = drawn_order()
    for other in imports(module):
        if (rooms := pairs(module, other)) is None:
            continue
        here, there = (floors.get(room) for room in rooms)
        if here is None and there is None:
            continue  # side by side in a room that has no drawing
        assert here is not None and there is not None, f"docs/architecture.md places one of {rooms} and not the other"
        if here[0] == there[0]:
            assert here[1] > there[1], f"{module} imports {other}, which docs/architecture.md draws not below it"


def test_every_room_has_its_place():
    floors = drawn_order()
    rooms = {".".join(module.split(".")[:2]) for module in MODULES if module.count(".")}
    assert rooms - OLD_PATHS <= floors.keys() <= MODULES.keys()
    assert 0 < len(OLD_PATHS) < 15


def test_no_circle():
    """Among modules, with the imports inside functions and for type checkers."""
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for other in imports(module):
            visit(other)
        path.pop()
        done.add(module)

    for module in MODULES:
        visit(module)
    assert len(done) == len(MODULES) > 100


@pytest.mark.parametrize("room", ["heads", "functional"])
def test_rooms_that_need_torch_alone(room):
    """They import nothing of PEFT, of transformers, or of what reads and writes files."""
    seen = set()
    for module, path in MODULES.items():
        if module.startswith(f"peft_heads.{room}"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
                seen.update(name.partition(".")[0] for name in names)
    assert "torch" in seen
    assert not seen & {"peft", "transformers", "datasets", "huggingface_hub", "safetensors"}


def test_scoring_knows_no_tuner():
    modules = [module for module in MODULES if module.startswith("peft_heads.scoring")]
    assert len(modules) > 3
    for module in modules:
        assert not [name for name in imports(module) if name.startswith("peft_heads.tuners")], module
