"""`peft-heads train` into a folder that holds a training: refused, resumed, or replaced."""

import json
import shutil
from types import SimpleNamespace

import pytest

from peft_heads import last_complete_checkpoint
from peft_heads._compat.transformers import trainer_has_overwrite_output_dir
from peft_heads.adapter_folder.checkpoints import run_of, run_of_folder
from peft_heads.cli.arguments import OutputArguments, build_parser, parse_arguments
from peft_heads.cli.output_folder import check_output_folder, claim_output_folder, forget_replaced


SHORT = ("--method=lora", "--max_steps=4", "--save_steps=2", "--do_train")


def contents(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def arguments(folder, overwrite=False):
    return SimpleNamespace(output_dir=str(folder), overwrite_output_dir=overwrite)


def write_checkpoint(folder, step, run=None):
    """Write only what identifies a checkpoint's run."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    state = {"global_step": step, "stateful_callbacks": {}}
    if run is not None:
        state["stateful_callbacks"]["TrainingRun"] = {"args": {"run_id": run}, "attributes": {}}
    (path / "trainer_state.json").write_text(json.dumps(state))
    return path


def test_a_second_training_is_refused(train, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(*SHORT) == 0
    before = contents(out)
    capsys.readouterr()
    assert train(*SHORT, "--max_steps=1") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{out} holds an earlier training (adapter_config.json, " in error
    assert "--resume_from_checkpoint true" in error and "--overwrite_output_dir" in error
    assert contents(out) == before
    # evaluation does no harm
    assert train("--method=lora", "--do_eval") == 0

    # replaced: the old checkpoints, of a later step, are never taken for the new run's
    old = run_of(out / "checkpoint-4")
    assert old is not None and old == run_of_folder(out) == run_of(out / "checkpoint-2")
    assert train(*SHORT, "--max_steps=1", "--overwrite_output_dir") == 0
    assert sorted(path.name for path in out.glob("*-*")) == ["checkpoint-1"]
    assert run_of(out / "checkpoint-1") == run_of_folder(out) != old
    assert not list(out.glob("_replaced*")) and (out / "adapter_model.safetensors").exists()


def test_a_resumed_run_keeps_its_id_and_passes_over_others(train, tmp_path, capsys):
    out = tmp_path / "out"
    assert train(*SHORT, "--max_steps=6") == 0
    other = shutil.move(out, tmp_path / "other")
    assert train(*SHORT) == 0
    own = run_of_folder(out)
    shutil.copytree(other / "checkpoint-6", out / "checkpoint-6")
    with pytest.warns(UserWarning, match=f"checkpoint-6 is of another run .{run_of_folder(other)}. and skipped"):
        assert last_complete_checkpoint(out) == str(out / "checkpoint-4")
    foreign = contents(out / "checkpoint-6")
    with pytest.warns(UserWarning, match="checkpoint-6 is of another run"):
        assert train(*SHORT, "--max_steps=6", "--resume_from_checkpoint=true") == 0
    # step 6 is reached again, and its old folder is not overwritten
    assert {run_of(path) for path in out.glob("checkpoint-*")} == {own}
    assert {path.rpartition("/")[2]: data for path, data in contents(out / "_foreign" / "checkpoint-6").items()} == {
        path.rpartition("/")[2]: data for path, data in foreign.items()
    }


def test_checkpoints_without_an_id_are_one_s_own(train, tmp_path):
    """Checkpoints of earlier versions, and of scripts with a plain Trainer, are taken for one's own."""
    out = tmp_path / "out"
    assert train(*SHORT) == 0
    (out / "_run.json").unlink()
    for state in out.glob("checkpoint-*/trainer_state.json"):
        content = json.loads(state.read_text())
        del content["stateful_callbacks"]["TrainingRun"]
        state.write_text(json.dumps(content))
    assert train(*SHORT) == 2
    assert train(*SHORT, "--max_steps=5", "--resume_from_checkpoint=true") == 0
    assert run_of(out / "checkpoint-5") == run_of_folder(out) is not None
    assert last_complete_checkpoint(out) == str(out / "checkpoint-5")


def test_overwriting_is_trainer_s_argument_where_it_has_one():
    ours = OutputArguments in build_parser().dataclass_types
    assert ours is not trainer_has_overwrite_output_dir()
    for words, expected in (([], False), (["--overwrite_output_dir"], True)):
        *_, training = parse_arguments(["--use_cpu", *words])
        assert training.overwrite_output_dir is expected


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "model.safetensors", "pytorch_model.bin"]
)
def test_whatever_was_trained_is_refused(tmp_path, name):
    check_output_folder(arguments(tmp_path / "new"), None)
    (tmp_path / "notes.txt").write_text("mine")
    check_output_folder(arguments(tmp_path), None)
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=f"holds an earlier training \\({name}\\)"):
        check_output_folder(arguments(tmp_path), None)
    check_output_folder(arguments(tmp_path, overwrite=True), None)


def test_a_checkpoint_of_elsewhere(tmp_path):
    """It may be resumed into another folder, unless that holds a training not known to be of the same run."""
    there, here = write_checkpoint(tmp_path / "a", 3, "run a"), tmp_path / "b"
    check_output_folder(arguments(here), str(there))
    here.mkdir()
    (here / "adapter_model.safetensors").write_text("finished")
    unnamed = write_checkpoint(tmp_path / "c", 3)
    for run_file in (None, "run b"):
        if run_file is not None:
            (here / "_run.json").write_text(json.dumps({"run_id": run_file}))
        for checkpoint in (there, unnamed):
            with pytest.raises(ValueError, match="holds an earlier training .adapter_model.safetensors"):
                check_output_folder(arguments(here), str(checkpoint))
    (here / "_run.json").write_text('{"run_id": "run a"}')
    check_output_folder(arguments(here), str(there))
    write_checkpoint(here, 7)
    check_output_folder(arguments(here, overwrite=True), str(there))
    with pytest.raises(ValueError, match="give one of them"):
        check_output_folder(arguments(here, overwrite=True), str(here / "checkpoint-7"))


def test_a_checkpoint_on_another_disk_is_the_folder_s_own(tmp_path):
    there, here = write_checkpoint(tmp_path / "disk", 3), tmp_path / "out"
    here.mkdir()
    (here / "checkpoint-3").symlink_to(there)
    check_output_folder(arguments(here), str(here / "checkpoint-3"))
    with pytest.raises(ValueError, match="holds an earlier training"):
        check_output_folder(arguments(here), str(there))


def test_the_base_model_is_not_replaced(train, tmp_path, checkpoint, capsys):
    """Its files have the same names as a training's: `config.json`, `model.safetensors`."""
    out = tmp_path / "out"
    shutil.copytree(checkpoint, out)
    before = contents(out)
    for name in (
        "model_name_or_path",
        "config_name",
        "image_processor_name",
        "train_dir",
        "validation_dir",
        "dataset_name",
    ):
        assert train(*SHORT, "--overwrite_output_dir", f"--{name}={out}") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"--{name} {out} needs {out}/" in error
        assert "copy" in error and contents(out) == before
    adapter, words = out / "adapter_config.json", out / "all_results.json"
    adapter.write_text('{"peft_type": "IA3"}')
    words.write_text("{}")
    assert train("--overwrite_output_dir", "--method=peft", f"--peft_config={adapter}") == 2
    assert f"--peft_config {adapter} needs {adapter}, " in capsys.readouterr().err
    assert train("--overwrite_output_dir", config=[str(words)]) == 2
    assert f"the config file {words} needs {words}, " in capsys.readouterr().err


@pytest.mark.parametrize(
    "place",
    [
        "out",
        "out/checkpoint-9",
        "out/checkpoint-9/data",
        "out/config.json",
        "link",
        "base",
        "out/_replaced/checkpoint-3",
    ],
)
def test_what_a_run_reads_is_not_taken_away(tmp_path, place):
    out = tmp_path / "out"
    write_checkpoint(out, 3, "run a")
    claim_output_folder(arguments(out, overwrite=True), None)
    (write_checkpoint(out, 9, "run a") / "data").mkdir()
    (out / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(out / "checkpoint-9" / "data")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").symlink_to(out / "config.json")
    (out / "images").mkdir()
    for harmless in (out / "images", out / "none", None):
        inputs = {"--train_dir": harmless and str(harmless)}
        check_output_folder(arguments(out, overwrite=True), None, inputs)
    with pytest.raises(ValueError, match="--train_dir .* needs .*, and nothing was changed: name another"):
        check_output_folder(arguments(out, overwrite=True), None, {"--train_dir": str(tmp_path / place)})


def test_the_checkpoint_to_resume_from_is_not_taken_away(tmp_path):
    write_checkpoint(tmp_path, 9, "run a")
    inner = write_checkpoint(tmp_path / "checkpoint-9", 2, "run a")
    with pytest.raises(ValueError, match="--resume_from_checkpoint .*checkpoint-2 needs .*checkpoint-9, which"):
        check_output_folder(arguments(tmp_path, overwrite=True), str(inner))
    # of another run: moved away by one that is resumed
    own = write_checkpoint(tmp_path, 3, "run b")
    check_output_folder(arguments(tmp_path), str(own), {"--model_name_or_path": str(own)})
    with pytest.raises(ValueError, match="--model_name_or_path .* needs .*checkpoint-9, which"):
        check_output_folder(arguments(tmp_path), str(own), {"--model_name_or_path": str(tmp_path / "checkpoint-9")})


def test_the_user_s_word_for_a_checkpoint_of_another_run(tmp_path):
    named = write_checkpoint(tmp_path, 9, "run a")
    write_checkpoint(tmp_path, 5, "run b")
    (tmp_path / "_run.json").write_text('{"run_id": "run b"}')
    with pytest.warns(UserWarning, match="is of another run .run a. than"):
        assert claim_output_folder(arguments(tmp_path), str(named)) == "run a" == run_of_folder(tmp_path)
    assert [path.name for path in (tmp_path / "_foreign").iterdir()] == ["checkpoint-5"] and named.exists()


def test_replaced_files_are_kept_until_the_new_training_is_saved(tmp_path):
    """A run that is killed while it replaces another loses nothing; notes and the card stay in place."""
    for index in range(2):
        write_checkpoint(tmp_path, 9, f"run {index}")
        for name in (
            "adapter_config.json",
            "adapter_model.safetensors",
            "eval_results.json",
            "README.md",
            "notes.txt",
        ):
            (tmp_path / name).write_text(f"{name} {index}")
        claim_output_folder(arguments(tmp_path, overwrite=True), None)
    assert last_complete_checkpoint(tmp_path) is None
    for index, folder in enumerate(("_replaced", "_replaced-2")):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == [
            "adapter_config.json", "adapter_model.safetensors", "checkpoint-9", "eval_results.json",
        ]  # fmt: skip
        assert (tmp_path / folder / "adapter_config.json").read_text() == f"adapter_config.json {index}"
    forget_replaced(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "_run.json", "notes.txt"]


def test_only_what_was_moved_is_deleted(tmp_path):
    for name in ("_replaced", "_replaced_notes", "_replaced-7", "_replaced-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("mine")
    before = contents(tmp_path)
    claim_output_folder(arguments(tmp_path), None)
    forget_replaced(tmp_path)
    (tmp_path / "_run.json").unlink()
    assert contents(tmp_path) == before

    own = write_checkpoint(tmp_path, 9)
    (tmp_path / "checkpoint-10").symlink_to(tmp_path / "_replaced-7")
    run = claim_output_folder(arguments(tmp_path, overwrite=True), None)
    assert not own.exists() and (tmp_path / "_replaced-2" / "checkpoint-9").exists()
    # a run that is resumed deletes it as well; what the user has put beside stays
    (tmp_path / "_replaced-2" / "mine.txt").write_text("mine")
    assert claim_output_folder(arguments(tmp_path), str(write_checkpoint(tmp_path, 2, run))) == run
    forget_replaced(tmp_path)
    assert [path.name for path in (tmp_path / "_replaced-2").iterdir()] == ["mine.txt"]
    assert before.items() <= contents(tmp_path).items()

    # nor what lies behind a link that took the folder's place
    here, run = tmp_path / "a", write_checkpoint(tmp_path / "a", 1)
    claim_output_folder(arguments(here, overwrite=True), None)
    (here / "_replaced").rename(tmp_path / "kept")
    (here / "_replaced").symlink_to(tmp_path / "kept")
    forget_replaced(here)
    assert (tmp_path / "kept" / run.name).is_dir()


def test_another_run_leaves_what_was_replaced(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_text("a")
    claim_output_folder(arguments(tmp_path, overwrite=True), None)
    claim_output_folder(arguments(tmp_path), None)
    forget_replaced(tmp_path)
    assert (tmp_path / "_replaced" / "adapter_model.safetensors").read_text() == "a"
