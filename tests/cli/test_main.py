import subprocess
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest

from peft_heads.cli import main as cli


def run_command(monkeypatch, run):
    """Run `peft-heads train a b` with `run` in place of the command's own function."""
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(run=run))
    return cli.main(["train", "a", "b"])


def test_version_and_help(capsys):
    for argument, expected in (("--version", version("peft-heads")), ("--help", "demo"), ("-h", "train")):
        with pytest.raises(SystemExit) as exit_:
            cli.main([argument])
        assert exit_.value.code == 0
        assert expected in capsys.readouterr().out


def test_no_command_and_unknown_command(capsys):
    assert cli.main([]) == 2
    assert "train" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        cli.main(["trian"])
    assert exit_.value.code == 2
    assert "trian" in capsys.readouterr().err


def test_arguments_and_exit_code_are_the_command_s(monkeypatch):
    assert run_command(monkeypatch, lambda argv: 7 if argv == ["a", "b"] else 0) == 7


def namespace_of(package):
    """Return functions as if they were defined in a module of `package`."""
    code = """
def check(error):
    raise error
"""
    space = {"__name__": f"{package}.module"}
    exec(code, space)
    return SimpleNamespace(**space)


@pytest.mark.parametrize("error", [ValueError("no such column"), FileNotFoundError("no such column")])
def test_own_checks_are_one_line(monkeypatch, capsys, error):
    check = namespace_of("peft_heads").check
    assert run_command(monkeypatch, lambda argv: check(error)) == 2
    assert capsys.readouterr().err == "peft-heads train: error: no such column\n"


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (namespace_of("somewhere").check, ValueError("theirs")),
        (namespace_of("peft_heads").check, KeyError("ours")),
    ],
)
def test_bugs_keep_their_traceback(monkeypatch, run, error):
    with pytest.raises(type(error)):
        run_command(monkeypatch, lambda argv: run(error))


@pytest.mark.slow
def test_python_m():
    result = subprocess.run([sys.executable, "-m", "peft_heads", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip()) == (0, f"peft-heads {version('peft-heads')}")
