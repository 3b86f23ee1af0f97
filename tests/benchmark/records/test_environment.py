import subprocess

import torch

import peft_heads
from peft_heads.benchmark.records.environment import describe_environment, source_state


def git(folder, *arguments):
    identity = ("-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_commit_and_dirty_flag_of_the_checkout(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "a.py").write_text("1\n")
    assert source_state(package) == (None, None)  # no checkout: installed
    git(tmp_path, "init", "-q")
    assert source_state(package) == (None, True)  # without a commit
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    commit = git(tmp_path, "rev-parse", "HEAD")
    assert source_state(package) == (commit, False)
    (tmp_path / "README.md").write_text("no code")
    assert source_state(package) == (commit, False)
    (package / "b.py").write_text("new\n")
    assert source_state(package) == (commit, True)
    (package / "b.py").unlink()
    (package / "a.py").write_text("2\n")
    assert source_state(package) == (commit, True)


def test_a_package_inside_another_checkout_is_an_installed_one(tmp_path):
    git(tmp_path, "init", "-q")
    package = tmp_path / "venv" / "site-packages" / "package"
    package.mkdir(parents=True)
    assert source_state(package) == (None, None)


def test_describe_environment():
    environment = describe_environment(
        data_fingerprint={"train": "1"}, image_format="JPEG", checkpoint_revision=None, num_processes=2
    )
    assert environment.versions["torch"] == torch.__version__
    assert {"python", "peft", "transformers", "peft-heads"} <= set(environment.versions)
    assert environment.device.startswith("cpu: ") and environment.num_processes == 2
    assert environment.data_fingerprint == {"train": "1"} and environment.image_format == "JPEG"
    assert (environment.commit, environment.dirty) == source_state(peft_heads.__path__[0])
