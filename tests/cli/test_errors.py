"""Which errors are one line, and which are bugs that keep their traceback."""

import errno
import subprocess
import sys
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from peft_heads.cli import main as cli
from peft_heads.cli.errors import CommandError, disk_full, explain


def raised(error, cause=None):
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def run(monkeypatch, error):
    def command(argv):
        raise error

    monkeypatch.setattr(cli.importlib, "import_module", lambda name: SimpleNamespace(run=command))
    return cli.main(["export"])


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/a/b"), "the disk is full: /a/b: No space left on device"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), "[Errno 13] Permission denied: '/a/b'"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), "[Errno 21] Is a directory: '/a'"),
        (SafetensorError("header too\nlarge"), "header too large"),
        (ConnectionError("no\n  route"), "no route"),
        (CommandError("said as it is"), "said as it is"),
    ],
)  # fmt: skip
def test_what_the_machine_refuses_is_one_line(monkeypatch, capsys, error, line):
    assert run(monkeypatch, error) == 1
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith(f"peft-heads export: error: {line}")


def test_ctrl_c_anywhere(monkeypatch, capsys):
    assert run(monkeypatch, KeyboardInterrupt()) == 130
    assert capsys.readouterr().err == "peft-heads export: interrupted\n"
    assert run(monkeypatch, KeyboardInterrupt("at step 3")) == 130
    assert capsys.readouterr().err == "peft-heads export: at step 3\n"


def test_bugs_and_the_curious_get_the_traceback(monkeypatch):
    for error in (RuntimeError("shapes differ"), KeyError("x"), ValueError("theirs")):
        assert explain(raised(error)) is None
    monkeypatch.setenv("PEFT_HEADS_TRACEBACK", "1")
    with pytest.raises(OSError, match="there"):
        run(monkeypatch, OSError("there"))


def test_a_full_disk_behind_another_error():
    """The datasets library wraps the error of the full disk."""
    cause = OSError(errno.ENOSPC, "No space left on device")
    assert disk_full(raised(RuntimeError("generating the dataset"), cause)) == "[Errno 28] No space left on device"
    assert disk_full(raised(RuntimeError("shapes differ"))) is None
    loop = RuntimeError("a")
    loop.__context__ = KeyError("b")
    loop.__context__.__context__ = loop
    assert disk_full(loop) is None


@pytest.mark.slow
def test_what_the_libraries_raise_on_a_full_disk(tmp_path):
    """A limit on file sizes is the closest to a full disk that needs no special rights."""
    code = """
import resource, sys, numpy, torch
from safetensors.numpy import save_file
from peft_heads.cli.errors import disk_full
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
array = numpy.zeros(100_000, "float32")
for write in (
    lambda: save_file({"a": array}, sys.argv[1] + "/a.safetensors"),
    lambda: torch.save(torch.from_numpy(array), sys.argv[1] + "/a.pt"),
    lambda: open(sys.argv[1] + "/a.txt", "wb").write(array.tobytes()),
):
    try:
        write()
    except Exception as error:
        print(type(error).__name__, disk_full(error))
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and not any(line.endswith(" None") for line in lines), done.stdout + done.stderr
