"""Within the benchmark imports point one way: recipes, records, report, engine, offline."""

import ast
from pathlib import Path

import peft_heads.benchmark


HOME = Path(peft_heads.benchmark.__file__).parent
ORDER = ("recipes", "records", "report", "engine", "offline")


def imports():
    """Return `(room, imported room, file)` of all relative imports between rooms, also of those in functions."""
    for path in sorted(HOME.rglob("*.py")):
        room, *inside = path.relative_to(HOME).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == len(inside) + 1:
                names = [node.module] if node.module else [alias.name for alias in node.names]
                yield from ((room, name.partition(".")[0], path) for name in names)


def test_imports_point_downward():
    between = [(room, other, path) for room, other, path in imports() if room in ORDER]
    assert len(between) > 20  # otherwise this test reads the wrong folder
    assert not [(path, other) for room, other, path in between if ORDER.index(other) > ORDER.index(room)]
