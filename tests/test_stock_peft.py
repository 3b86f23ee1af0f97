"""Importing peft_heads changes nothing in stock PEFT: what is written, uploaded and loaded has the same bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, running_hub
from huggingface_hub import ModelCard


SCRIPTS = Path(__file__).parent / "scripts"


def run(script, *args, hub=None, cwd=None):
    # the order of sets of names goes into the files
    env = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost"}
    if hub is not None:
        env |= {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(cwd.parent / f"{cwd.name}-cache")}
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *args], env=env, cwd=cwd, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def files_below(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """Run without and with the import; return results, files of the working directory, commits on the Hub."""
    sessions = []
    for how in ([], ["with-peft-heads"]):
        cwd = tmp_path_factory.mktemp("stock") / "work"
        cwd.mkdir()
        with running_hub() as hub:
            run("stock_round_trip.py", str(cwd.parent / "result.json"), *how, hub=hub, cwd=cwd)
            assert hub.unknown == []
            commits = {
                (name, branch): [(commit.title, {path: file.data for path, file in commit.files.items()}) for commit in repo.history(branch)]
                for name, repo in hub.repos.items()
                for branch in repo.branches
            }  # fmt: skip
        sessions.append((json.loads((cwd.parent / "result.json").read_text()), files_below(cwd), commits))
    return sessions


@pytest.mark.slow
def test_stock_adapters_load_alike(sessions):
    (stock, _, _), (extended, _, _) = sessions
    assert stock["warnings"] == extended["warnings"]
    swap, [mismatch, other_type] = stock["results"].pop("hotswap")
    extended_swap, [extended_mismatch, extended_other_type] = extended["results"].pop("hotswap")
    assert swap == extended_swap and mismatch == extended_mismatch
    # PEFT's message lists the types that can be swapped, of which ours is one
    assert extended_other_type == other_type.replace("LORA but", "LORA, HEAD_MASKED_LORA but")
    assert len(stock["results"]) == 14 and stock["results"] == extended["results"]


@pytest.mark.slow
def test_stock_adapters_are_written_alike(sessions):
    (_, stock, _), (_, extended, _) = sessions
    extended = {path: content for path, content in extended.items() if not path.startswith("ours-")}
    assert len([path for path in stock if path.endswith("adapter_model.safetensors")]) >= 28
    assert stock.keys() == extended.keys()
    assert [path for path in stock if stock[path] != extended[path]] == []


@pytest.mark.slow
def test_stock_adapters_are_uploaded_alike(sessions):
    """This includes base models without a name or in a local folder, whose names the Hub refuses in a card."""
    (_, _, stock), (_, _, extended) = sessions
    extended = {key: commits for key, commits in extended.items() if not key[0].startswith("me/ours-")}
    assert {"me/lora-unnamed", "me/lora-local", "me/lora-hub", "me/ia3-local", "me/vera-unnamed"} < {
        n for n, _ in stock
    }
    assert stock == extended


@pytest.mark.slow
def test_adapters_of_ours_are_uploaded_between_them(sessions):
    _, (_, _, commits) = sessions
    for method in ("head_masked_lora", "rlrr"):
        for base in ("unnamed", "local", "hub"):
            files = commits[f"me/ours-{method}-{base}", "main"][-1][1]
            card = ModelCard(files["README.md"].decode())
            assert card.data.base_model == ("me/tiny-vit" if base == "hub" else None)
            assert "peft_heads" in card.data.tags and "[More Information Needed]" not in card.text


@pytest.mark.slow
def test_the_import_changes_only_what_it_must():
    """Nothing else changes that other code in the process shares."""
    changed = json.loads(run("what_import_changes.py").stdout)
    assert set(changed["attributes"]) == {
        *(f"peft.utils.peft_types.PeftType.{name}" for name in ("HEAD_MASKED_LORA", "RLRR")),
        *(f"peft.utils.peft_types.PeftType.{name}" for name in ("_member_names_", "_member_map_", "_value2member_map_")),
        *(f"PEFT_TYPE_TO_{name}_MAPPING" for name in ("CONFIG", "PREFIX", "TUNER")),
        "peft.config.PeftConfig.from_pretrained",
        *(f"peft.peft_model.PeftModel.{name}" for name in ("from_pretrained", "load_adapter")),
        "peft.peft_model.PeftModel.create_or_update_model_card",
        "peft.peft_model.PeftModel._upload_modified_files",
        "CONFIG_KEYS_TO_CHECK",
        *(f"peft.utils.hotswap.{name}" for name in (
            "check_hotswap_configs_compatible", "hotswap_adapter_from_state_dict",
            "prepare_model_for_compiled_hotswap", "_pad_lora_weights",
        )),
        "transformers.integrations.peft.PeftAdapterMixin.load_adapter",
    }  # fmt: skip
    assert changed["settings"] == []
