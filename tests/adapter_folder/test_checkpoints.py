import hashlib
import json
import shutil

import pytest
import tiny
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from peft_heads import HeadMaskedLoraConfig, last_complete_checkpoint
from peft_heads.adapter_folder.checkpoints import checkpoint_fault


FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "rng_state.pth",
    "scheduler.pt",
    "trainer_state.json",
]


def make(method):
    model = tiny.make("vit")
    if method == "full":
        return model
    if method == "linear":
        model.vit.requires_grad_(False)
        return model
    targets = {"target_modules": tiny.now(["q_proj"]), "modules_to_save": ["classifier"]}
    return get_peft_model(model, LoraConfig(**targets) if method == "lora" else HeadMaskedLoraConfig(ne=0))


def train(folder, method="lora", **arguments):
    """Train three steps, with checkpoints 1, 2 and 3."""
    args = TrainingArguments(
        str(folder),
        max_steps=3,
        save_steps=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    Trainer(make(method), args, train_dataset=tiny.examples(8)).train()
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(finished, tmp_path):
    """A run's output folder, which a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


def truncate(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files]


def assert_skipped(run, what):
    """Check that the second checkpoint is returned, with a warning that names the third; nothing changes."""
    before = digest(run)
    with pytest.warns(UserWarning) as record:
        found = last_complete_checkpoint(run)
    assert found == str(run / "checkpoint-2")
    (warning,) = record
    assert str(warning.message).startswith(f"checkpoint {run / 'checkpoint-3'} is incomplete and skipped: {what}")
    assert digest(run) == before


# Complete ones


@pytest.mark.parametrize("method", ["head-masked", "lora", "linear", "full"])
def test_the_newest_complete_checkpoint(tmp_path, method):
    train(tmp_path, method)
    assert last_complete_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    assert_skipped(tmp_path, "optimizer.pt is missing")


def test_numbers_are_compared_as_numbers(run):
    for number in (9, 10):
        shutil.copytree(run / "checkpoint-3", run / f"checkpoint-{number}")
        (run / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps({"global_step": number}))
    assert last_complete_checkpoint(run) == str(run / "checkpoint-10")


def test_none(tmp_path, finished):
    assert last_complete_checkpoint(tmp_path / "nowhere") is None
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-4").touch()
    shutil.copytree(finished / "checkpoint-3", tmp_path / "checkpoint-best")
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.warns(UserWarning, match="checkpoint-5 is incomplete"):
        assert last_complete_checkpoint(tmp_path) is None


def test_other_names_of_the_folder(run):
    """The folder may have any name if it is passed itself."""
    assert checkpoint_fault((run / "checkpoint-3").rename(run / "best")) is None


def test_save_only_model(tmp_path):
    train(tmp_path, save_only_model=True)
    assert last_complete_checkpoint(tmp_path, save_only_model=True) == str(tmp_path / "checkpoint-3")
    assert checkpoint_fault(tmp_path / "checkpoint-3") == "optimizer.pt is missing"


def test_files_that_are_not_trainer_s_are_left_alone(run):
    (run / "checkpoint-3" / "notes.txt").write_text("{")
    (run / "checkpoint-3" / "_README.md.k3j4h5").write_text("")  # what a killed write_atomically leaves behind
    assert last_complete_checkpoint(run) == str(run / "checkpoint-3")


# Damaged ones


@pytest.mark.parametrize("share", [0, 0.5, 0.98])
@pytest.mark.parametrize("name", [*FILES, "training_args.bin"])
def test_half_written(run, name, share):
    truncate(run / "checkpoint-3" / name, share)
    assert_skipped(run, f"{name} cannot be read (")


@pytest.mark.parametrize("name", FILES)
def test_missing(run, name):
    (run / "checkpoint-3" / name).unlink()
    what = "adapter_model.safetensors or model.safetensors" if name == "adapter_model.safetensors" else name
    assert_skipped(run, f"{what} is missing")


@pytest.mark.parametrize("name", FILES)
def test_overwritten_with_zeros(run, name):
    """A file system may leave a file like this after a power cut."""
    path = run / "checkpoint-3" / name
    path.write_bytes(bytes(path.stat().st_size))
    assert_skipped(run, f"{name} cannot be read (")


def test_corrupted_directory_of_a_torch_file(run):
    path = run / "checkpoint-3" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 6] = 255  # the version of zip that is needed to read an entry
    path.write_bytes(data)
    assert_skipped(run, "optimizer.pt cannot be read (zip file version 25.5)")


def test_empty_folder(run):
    shutil.rmtree(run / "checkpoint-3")
    (run / "checkpoint-3").mkdir()
    assert_skipped(run, "adapter_model.safetensors or model.safetensors is missing")


@pytest.mark.parametrize("content", ["{}", "[3]", '{"global_step": "3"}', "null"])
def test_foreign_trainer_state(run, content):
    (run / "checkpoint-3" / "trainer_state.json").write_text(content)
    assert_skipped(run, "trainer_state.json is not Trainer's (it has no global_step)")


def test_another_checkpoint_s_trainer_state(run):
    shutil.copy(run / "checkpoint-1" / "trainer_state.json", run / "checkpoint-3")
    assert_skipped(run, "trainer_state.json is that of step 1")


def test_several_are_skipped(run):
    for number in (2, 3):
        truncate(run / f"checkpoint-{number}" / "optimizer.pt")
    with (
        pytest.warns(UserWarning, match="checkpoint-3.*optimizer.pt"),
        pytest.warns(UserWarning, match="checkpoint-2"),
    ):
        assert last_complete_checkpoint(run) == str(run / "checkpoint-1")


# Several files of a kind


@pytest.mark.parametrize(
    ("ranks", "missing"),
    [([0, 1], None), ([0, 1, 2, 3], None), ([0], 1), ([1], 0), ([0, 2], 1), (["", 0], None)],
)
def test_one_random_state_per_process(run, ranks, missing):
    folder = run / "checkpoint-3"
    state = (folder / "rng_state.pth").rename(folder / "state")
    for rank in ranks:
        shutil.copy(state, folder / (f"rng_state_{rank}.pth" if rank != "" else "rng_state.pth"))
    assert checkpoint_fault(folder) == (None if missing is None else f"rng_state_{missing}.pth is missing")


def test_sharded_weights(run):
    folder = run / "checkpoint-3"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).unlink()
    tiny.make("vit").save_pretrained(folder, max_shard_size="20KB")
    parts = sorted(folder.glob("model-*.safetensors"))
    assert len(parts) > 1 and last_complete_checkpoint(run) == str(folder)
    parts[1].unlink()
    assert_skipped(run, f"{parts[1].name} is missing")
    (folder / "model.safetensors.index.json").unlink()
    assert_skipped(run, "adapter_model.safetensors or model.safetensors is missing")


@pytest.mark.parametrize("name", ["optimizer.bin", "optimizer_0/__0_0.distcp"])
def test_fsdp_s_optimizer(run, name):
    folder = run / "checkpoint-3"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "optimizer.pt").rename(folder / name)
    assert last_complete_checkpoint(run) == str(folder)
    (folder / "scheduler.pt").unlink()
    assert_skipped(run, "scheduler.pt is missing")


@pytest.mark.parametrize("name", ["pytorch_model_fsdp.bin", "pytorch_model_fsdp_0/__0_0.distcp"])
def test_fsdp_s_weights(run, name):
    folder = run / "checkpoint-3"
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "training_args.bin", folder / name)
    (folder / "adapter_model.safetensors").unlink()
    assert last_complete_checkpoint(run) == str(folder)


def test_deepspeed(run):
    """`latest` names the folder of the optimizer's shards, which may hold the scheduler's state."""
    folder = run / "checkpoint-3"
    (folder / "global_step3").mkdir()
    (folder / "latest").write_text("global_step3")
    (folder / "scheduler.pt").unlink()
    shard = (folder / "optimizer.pt").rename(folder / "global_step3" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert last_complete_checkpoint(run) == str(folder)
    truncate(shard)
    assert_skipped(run, f"global_step3/{shard.name} cannot be read (")


def test_adapters_in_folders_of_their_own(run):
    """PEFT's place for adapters that are not called "default"."""
    other = run / "checkpoint-3" / "other"
    other.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run / "checkpoint-3" / name).rename(other / name)
    assert last_complete_checkpoint(run) == str(run / "checkpoint-3")
    truncate(other / "adapter_model.safetensors")
    assert_skipped(run, "other/adapter_model.safetensors cannot be read (")
    (other / "adapter_config.json").unlink()
    (other / "adapter_model.safetensors").unlink()
    assert_skipped(run, "adapter_model.safetensors or model.safetensors is missing")


@pytest.mark.parametrize(
    "content", ["{}", "[1]", "null", '{"weight_map": [1]}', '{"weight_map": {"a": 3}}', '{"weight_map": {}}']
)
def test_foreign_index(tmp_path, content):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    assert "weight_map" in checkpoint_fault(tmp_path) and path.name in checkpoint_fault(tmp_path)


@pytest.mark.parametrize("listed", [False, True])
def test_a_teacher_that_the_state_mentions_is_missing(run, listed):
    """It is written after the state: a run that was killed in between leaves a checkpoint without it."""
    state = json.loads((run / "checkpoint-3" / "trainer_state.json").read_text())
    entry = {"args": {}, "attributes": {"progress": {"teacher": "0123"}}}
    state["stateful_callbacks"]["TaylorHeadScorer"] = [{"attributes": {}}, entry] if listed else entry
    (run / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state))
    assert checkpoint_fault(run / "checkpoint-3") == "teacher.safetensors is missing"
    with pytest.warns(UserWarning, match="teacher.safetensors is missing"):
        assert last_complete_checkpoint(run) == str(run / "checkpoint-2")
    (run / "checkpoint-3" / "teacher.safetensors").write_bytes((run / "checkpoint-3" / FILES[1]).read_bytes())
    assert checkpoint_fault(run / "checkpoint-3") is None
    entry["attributes"]["progress"]["teacher"] = None
    (run / "checkpoint-3" / "trainer_state.json").write_text(json.dumps(state))
    (run / "checkpoint-3" / "teacher.safetensors").unlink()
    assert checkpoint_fault(run / "checkpoint-3") is None
