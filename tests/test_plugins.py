"""Plugins: which are loaded, when, and what happens if one fails."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from peft_heads import import_plugin, loaded_plugins, plugins
from peft_heads.benchmark.records.environment import installed_versions
from peft_heads.cli import main as cli
from peft_heads.cli.interruption import resume_command
from peft_heads.heads import CRITERIA
from peft_heads.plugins import load_plugins, plugin_words, take_plugin_words


PACKAGE = [str(Path(plugins.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
CODE = """
from peft_heads import register_criterion
CALLS = []
def register():
    CALLS.append(1)
    register_criterion("{name}", lambda heads: heads.signed)
"""


@pytest.fixture(autouse=True)
def nothing_loaded(monkeypatch, forget_criteria):
    """Start as in a new process, without the plugins of this machine."""
    for name, value in {
        "_LOADED": {},
        "_IMPORTED": [],
        "_TRIED": set(plugins.entry_points(group=plugins.GROUP)),
    }.items():
        monkeypatch.setattr(plugins, name, value)
    before, path = set(sys.modules), list(sys.path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - before:
        if name.startswith("plug_"):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return `install(name, code, entry)`, which installs a distribution of one module, as pip does."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)

    def install(name, code, entry):
        (site / f"{name}.py").write_text(code)
        info = site / f"{name}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.2\n")
        (info / "entry_points.txt").write_text(f"[peft_heads.plugins]\nany = {entry}\n")
        return site

    return install


def test_a_module_and_a_function_are_loaded_once(install):
    install("plug_a", CODE.format(name="of_a") + "register()\n", "plug_a")
    install("plug_b", CODE.format(name="of_b"), "plug_b:register")
    for _ in range(2):
        load_plugins()
        assert loaded_plugins() == {"plug-a": "1.2", "plug-b": "1.2"}
        assert {"of_a", "of_b"} <= set(CRITERIA)
        assert [len(sys.modules[name].CALLS) for name in ("plug_a", "plug_b")] == [1, 1]
    assert installed_versions()["plug-a"] == "1.2" and "torch" in installed_versions()


@pytest.mark.parametrize(
    ("code", "entry", "message"),
    [
        ("import no_such_module", "plug_c", "ModuleNotFoundError: No module named 'no_such_module'"),
        (CODE.format(name="absolute"), "plug_c:register", "ValueError: there is a criterion 'absolute' already"),
        ("", "plug_c:register", "AttributeError: .*register"),
    ],
)
def test_one_that_fails_is_a_warning_and_the_others_load(install, code, entry, message):
    install("plug_c", code, entry)
    install("plug_d", CODE.format(name="of_d"), "plug_d:register")
    with pytest.warns(UserWarning, match=rf"the plugin 'plug-c' \({entry}\) is left out, since it fails: {message}"):
        load_plugins()
    assert loaded_plugins() == {"plug-d": "1.2"} and "of_d" in CRITERIA
    load_plugins()  # without a second warning


def test_a_module_of_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plug_e.py").write_text(CODE.format(name="of_e") + "register()\n__version__ = '3'\n")
    (tmp_path / "plug_f.py").write_text("")
    for _ in range(2):
        import_plugin("plug_e")
    import_plugin("plug_f")
    assert "of_e" in CRITERIA and loaded_plugins() == {"plug_e": "3", "plug_f": ""}
    assert plugin_words() == ["--plugin", "plug_e", "--plugin", "plug_f"]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    expected = "peft-heads train --plugin plug_e --plugin plug_f --ne 1 --resume_from_checkpoint c"
    assert resume_command(["--ne", "1"], "c") == expected


def test_one_that_was_asked_for_must_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plug_g.py").write_text("1 / 0")
    for name, message in (("plug_g", "ZeroDivisionError: division by zero"), ("plug_h", "No module named 'plug_h'")):
        with pytest.raises(ValueError, match=f"the plugin '{name}' cannot be imported: .*{message}"):
            import_plugin(name)
    assert loaded_plugins() == {} and plugin_words() == []


# the command line


def run_command(monkeypatch, *words):
    """Return the arguments that reach the command of `peft-heads train …`, or the exit code."""
    given = []
    monkeypatch.setattr(
        cli.importlib, "import_module", lambda name: SimpleNamespace(run=lambda argv: given.extend(argv) or 0)
    )
    return cli.main(["train", *words]) or given


def test_every_command_takes_modules(tmp_path, monkeypatch, capsys):
    imported = []
    monkeypatch.setattr(cli, "import_plugin", imported.append)
    assert run_command(monkeypatch, "--plugin", "a", "x.yaml", "--plugin=b.c", "--ne", "1") == ["x.yaml", "--ne", "1"]
    assert imported == ["a", "b.c"]
    for words in (["--plugin"], ["--plugin="], ["--plugin", "--ne"]):
        with pytest.raises(ValueError):
            take_plugin_words(words)
        assert run_command(monkeypatch, *words) == 2
        assert capsys.readouterr().err == "peft-heads train: error: --plugin needs the name of a module\n"


def test_a_module_that_is_missing_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.path", list(sys.path))
    assert cli.main(["train", "--plugin", "plug_i"]) == 2
    error = "peft-heads train: error: the plugin 'plug_i' cannot be imported: ModuleNotFoundError: No module named 'plug_i'\n"
    assert capsys.readouterr().err == error


def test_installed_plugins_are_loaded_when_a_command_needs_them(monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr(cli, "load_plugins", lambda: loaded.append(1))
    for word in ("--help", "--version", "trian"):
        with pytest.raises(SystemExit):
            cli.main([word])
    assert not loaded and "--plugin MODULE" in capsys.readouterr().out
    run_command(monkeypatch)
    assert loaded == [1]


@pytest.mark.parametrize(
    ("argv", "orig_argv", "expected"),
    [
        (["/usr/bin/peft-heads", "train"], ["python", "/usr/bin/peft-heads", "train"], True),
        (["-m", "train"], ["python", "-u", "-m", "peft_heads", "train"], True),
        (["train.py"], ["python", "train.py", "-m", "peft_heads_of_mine"], False),
        (["-m"], ["python", "-m", "pytest", "-m", "peft_heads"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_the_command_line_is_known_by_its_words(monkeypatch, argv, orig_argv, expected):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert plugins._is_command_line() is expected


@pytest.mark.slow
def test_the_import_of_the_package_loads_them_and_survives(install):
    site = install("plug_j", CODE.format(name="of_j") + "register()\n", "plug_j")
    install("plug_k", "1 / 0", "plug_k")

    def python(*words):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *PACKAGE])}
        return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=120)

    code = "import {}; from peft_heads import loaded_plugins; print(loaded_plugins())"
    for first in ("peft_heads", "plug_j"):  # a plugin that is imported by itself, too
        done = python("-c", code.format(first))
        assert done.returncode == 0, done.stderr
        assert done.stdout == "{'plug-j': '1.2'}\n"
        assert "the plugin 'plug-k' (plug_k) is left out, since it fails: ZeroDivisionError" in done.stderr
    done = python("-m", "peft_heads", "--help")
    assert done.returncode == 0 and "plug" not in done.stderr
