"""Ctrl-C, a full disk, no Hub: one line says how to continue, and nothing is lost."""

import errno
import json
import shlex

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from transformers import Trainer
from transformers.trainer_callback import CallbackHandler

import peft_heads
from peft_heads.cli import hub, interruption
from peft_heads.cli.main import main


SHORT = ("--method=lora", "--max_steps=6", "--save_steps=2", "--do_train", "--dataloader_num_workers=0")


@pytest.fixture
def stop_at(monkeypatch):
    """Return `stop_at(step, error)`, which raises the error at the end of a step."""

    def arrange(step, error):
        original = CallbackHandler.on_step_end

        def on_step_end(self, args, state, control):
            if state.global_step == step:
                raise error
            return original(self, args, state, control)

        monkeypatch.setattr(CallbackHandler, "on_step_end", on_step_end)

    return arrange


def last_line(capsys):
    lines = capsys.readouterr().err.rstrip().split("\n")
    assert "Traceback" not in "".join(lines)
    return lines[-1].rpartition("\r")[2]


def test_ctrl_c_says_how_to_resume(train, tmp_path, stop_at, capsys, monkeypatch):
    assert train(*SHORT) == 0
    undisturbed = load_file(tmp_path / "out" / "adapter_model.safetensors")
    stop_at(5, KeyboardInterrupt())
    assert train(*SHORT, "--overwrite_output_dir", "--hub_token=hf_secret") == 130
    line = last_line(capsys)
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert "peft-heads train: interrupted at step 5 of 6; resume with: peft-heads train" in line.replace("\n", " ")
    assert "hf_secret" not in line
    monkeypatch.undo()
    # the words are those of the command, ready to be pasted into a shell
    command = shlex.split(line.partition("resume with: ")[2])
    assert command[:2] == ["peft-heads", "train"] and str(checkpoint) in command
    assert main(command[1:]) == 0
    resumed = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(value, resumed[name]) for name, value in undisturbed.items())
    assert not list((tmp_path / "out").glob("_replaced*"))


def test_ctrl_c_before_the_first_checkpoint(train, stop_at, capsys):
    stop_at(1, KeyboardInterrupt())
    assert train(*SHORT) == 130
    assert "interrupted at step 1 of 6; there is no checkpoint to resume from" in last_line(capsys)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/disk/optimizer.pt"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing file data/4"),
    ],
)
def test_a_full_disk_while_a_checkpoint_is_written(train, tmp_path, capsys, monkeypatch, error):
    """Half a checkpoint stays behind, and the message names the one before."""
    original = Trainer._save_optimizer_and_scheduler

    def save(self, output_dir):
        if self.state.global_step == 4:
            raise error
        original(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_optimizer_and_scheduler", save)
    assert train(*SHORT) == 1
    line = last_line(capsys)
    assert "error: the disk is full (" in line and "at step 4 of 6; resume with: peft-heads train" in line
    assert f"--resume_from_checkpoint {tmp_path / 'out' / 'checkpoint-2'}" in line


def test_a_full_disk_at_the_very_end_leaves_no_half_adapter(train, tmp_path, capsys, monkeypatch):
    original = Trainer.save_model

    def save_model(self, output_dir=None, _internal_call=False):
        original(self, output_dir, _internal_call)
        if output_dir is None:
            path = tmp_path / "out" / "adapter_model.safetensors"
            path.write_bytes(path.read_bytes()[:2000])
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Trainer, "save_model", save_model)
    assert train(*SHORT) == 1
    assert f"--resume_from_checkpoint {tmp_path / 'out' / 'checkpoint-6'}" in last_line(capsys)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
    monkeypatch.undo()
    assert train(*SHORT, "--resume_from_checkpoint=true") == 0
    peft_heads.load_image_classifier(tmp_path / "out")


@pytest.mark.parametrize("words", [[], ["--token", "hf_a"], ["--token=hf_a", "--overwrite_output_dir", "true"]])
def test_the_command_that_resumes(words, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    argv = ["config.yaml", *words, "--output_dir", "my out"]
    command = interruption.resume_command(argv, "my out/checkpoint-3")
    assert command.startswith("peft-heads train config.yaml ") and "hf_a" not in command
    assert "--output_dir 'my out' --resume_from_checkpoint 'my out/checkpoint-3'" in command
    assert ("--overwrite_output_dir=false" in command) is ("--overwrite_output_dir" in words)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert interruption.resume_command(argv, "out/checkpoint-3").startswith("the same command and --resume")


# --push_to_hub


def test_the_hub_is_asked_for_before_the_training(train, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert train("--push_to_hub", "--hub_model_id=me/mine") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "HF_HUB_OFFLINE is set. Nothing was trained" in error
    assert f"hf upload me/mine {tmp_path / 'out'}" in error and not (tmp_path / "out").exists()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert train("--push_to_hub") == 2
    assert "--push_to_hub needs a token: log in with `hf auth login`" in capsys.readouterr().err


def test_no_hub_when_the_repository_is_made(train, capsys, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def init(self, **kwargs):
        raise ConnectionError("[Errno 111]\nConnection refused")

    monkeypatch.setattr(Trainer, "init_hf_repo", init)
    assert train("--push_to_hub", "--hub_token=hf_secret") == 2
    line = last_line(capsys)
    assert "error: --push_to_hub: [Errno 111] Connection refused. Nothing was trained" in line and "secret" not in line


def test_no_hub_after_the_training(train, tmp_path, capsys, monkeypatch):
    """The training is saved, evaluated and summarised, and a message says how to upload it."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, **kwargs: None)

    def push(self, **kwargs):
        assert (tmp_path / "out" / "labels.json").exists()
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Trainer, "push_to_hub", push)
    words = ["--push_to_hub", "--hub_token=hf_secret", "--hub_model_id=me/mine", "--hub_strategy=end"]
    assert train("--method=lora", "--max_steps=2", "--save_strategy=no", *words) == 1
    printed = capsys.readouterr()
    assert f"adapter             {tmp_path / 'out'}" in printed.out
    assert (
        f"no route to host. Nothing is lost: all that was trained lies in {tmp_path / 'out'}; upload it later: hf "
        in (printed.err)
    )
    assert "eval_accuracy" in json.loads((tmp_path / "out" / "all_results.json").read_text())
    peft_heads.load_image_classifier(tmp_path / "out")
