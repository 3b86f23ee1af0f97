"""The Hub's HTTP API, served on the loopback interface to processes that use no other network."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from hub_server import TOKEN, running_hub
from huggingface_hub import ModelCard
from transformers import TrainerCallback


SCRIPT = Path(__file__).parent / "scripts" / "hub_round_trip.py"
HEAT_MAP = "![Responsiveness of the heads](head_scores.png)"
ADAPTER = {
    "adapter_config.json", "adapter_model.safetensors", "README.md", "labels.json", "preprocessor_config.json",
}  # fmt: skip
COMPLETE_PUSHES = hasattr(TrainerCallback, "on_push_begin")
SCORES = {"head_scores.json", "head_scores.png"}


def run(hub, command, folder):
    """Run the script in a process with a cache of its own; return its results and what it wrote to stderr."""
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(folder / command),
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "127.0.0.1,localhost",
        "OMP_NUM_THREADS": "1",
    }
    result = folder / f"{command}.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), command, str(result)], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stderr[-3000:]}\nunknown to the server: {hub.unknown}"
    return json.loads(result.read_text()), done.stderr


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with running_hub() as hub:
        pushed = run(hub, "push", folder)
        yield hub, pushed, run(hub, "load", folder)


@pytest.fixture
def hub(session):
    assert session[0].unknown == []
    return session[0]


@pytest.fixture
def pushed(session):
    return session[1][0]


@pytest.fixture
def loaded(session):
    return session[2][0]


def card_of(hub, repository, revision="main"):
    return ModelCard(hub.repos[repository].files(revision)["README.md"].decode())


def test_push_to_hub_uploads_everything(hub):
    assert set(hub.repos["me/my-adapter"].files()) == ADAPTER
    card = card_of(hub, "me/my-adapter")  # push_to_hub alone would have replaced it with an empty template
    assert "head 2 of 6 in all 4 projections" in card.text and "[More Information Needed]" not in card.text
    assert card.data["library_name"] == "peft" and "head-masked-lora" in card.data.tags
    assert card.data.base_model == "me/tiny-vit" and card.data.pipeline_tag == "image-classification"
    assert HEAT_MAP not in card.text  # the masks were set by hand


def test_every_version_has_its_card(hub):
    repo = hub.repos["me/my-adapter"]
    assert [commit.title for commit in repo.history()] == ["initial commit", "Upload model", "Upload model"]
    assert repo.tags["v1"] is repo.branches["main"].parent is repo.branches["other"].parent.parent
    for revision, head in {"v1": 1, "main": 2, "other": 3}.items():
        card = card_of(hub, "me/my-adapter", revision)
        assert f"head {head} of 6 in all 4 projections" in card.text
        assert card.text.count("## Deactivated heads") == 1


def test_stock_adapters_keep_their_card(hub):
    assert "peft_heads" not in str(card_of(hub, "me/stock"))


def test_rlrr_has_a_card_of_its_own(hub):
    assert set(hub.repos["me/rlrr"].files()) == ADAPTER
    card = card_of(hub, "me/rlrr")
    assert "# RLRR adapter for me/tiny-vit" in card.text
    assert "rlrr" in card.data.tags and "head-masked-lora" not in card.data.tags
    assert "head 4 of 6 in all 4 projections" in card.text


def test_local_base_model(hub):
    """PEFT's card names a local folder as the base model, which the Hub refuses."""
    assert card_of(hub, "me/local-base").data.base_model is None


@pytest.mark.parametrize(
    ("how", "version"),
    {
        "main": "main",
        "v1": "v1",
        "other": "other",
        "load_adapter": "v1",
        "classifier": "main",
        "classifier v1": "v1",
        "classifier rlrr": "rlrr",
        "classifier trained": "trained",
        "classifier during training": "trained",
        "classifier of a checkpoint": "trained",
    }.items(),
)
def test_another_process_loads_the_same_model(pushed, loaded, how, version):
    if how == "classifier during training" and not COMPLETE_PUSHES:
        pytest.skip("transformers before 5.0 has no on_push_begin: labels come with the last push")
    assert pushed["main"]["heads_off"] == [2]
    assert pushed["main"]["logits"] != pushed["v1"]["logits"] != pushed["other"]["logits"]
    for part in ("logits", "masks", "labels"):
        assert loaded[how][part] == pushed[version][part]
    assert loaded[how]["labels"] == {"0": "cat", "1": "dog", "2": "eel"}
    if how.startswith("classifier"):
        assert loaded[how]["image_mean"] == [0.1, 0.2, 0.3]


def test_configurations(loaded):
    configs = [value for key, value in loaded.items() if key.startswith("config")]
    assert configs == [["HeadMaskedLoraConfig", 1, "me/tiny-vit"]] * 2
    assert loaded["from_lora"] == [tiny.now(["q_proj"]), 0]
    assert loaded["stock"]["image_mean"] == [0.5, 0.5, 0.5]  # the base model's processor


@pytest.mark.parametrize("repository", ["me/trained", "me/trained-by-hand", "me/resumed"])
def test_card_shows_the_heat_map(hub, pushed, repository):
    """It does after Trainer's push, after the model's, and after that of a run resumed after the selection."""
    revision = "as-trained" if repository == "me/trained-by-hand" else "main"
    files = hub.repos[repository].files(revision)
    assert set(files) >= ADAPTER | SCORES
    assert files["head_scores.png"].startswith(b"\x89PNG")
    assert json.loads(files["head_scores.json"])["masks"] == pushed["trained"]["masks"]
    card = card_of(hub, repository, revision)
    assert HEAT_MAP in card.text
    assert f"head {pushed['trained']['heads_off'][0]} of 6 in all 4 projections" in card.text
    # Trainer's own words stand beside ours
    assert ("Training hyperparameters" in card.text) == (repository == "me/trained")


@pytest.mark.skipif(not COMPLETE_PUSHES, reason="transformers before 5.0 has no on_push_begin")
def test_every_push_during_training_is_complete(hub, session):
    """Trainer pushes each checkpoint's weights with card, labels and processor, before push_to_hub."""
    history = [c for c in hub.repos["me/trained"].history() if re.fullmatch("Training.*epoch .", c.title)]
    assert [commit.title[-1] for commit in history] == ["1", "2", "3"]
    for epoch, commit in enumerate(history, start=1):
        selected = epoch >= 2
        card = card_of(hub, "me/trained", commit.sha)
        assert set(commit.files) >= (ADAPTER | SCORES if selected else ADAPTER)
        assert ("None have been selected yet" in card.text) != selected and (HEAT_MAP in card.text) == selected
    assert "none has been selected" not in session[1][1]  # the warning would be wrong during a warm-up


def test_card_shows_no_heat_map_of_other_masks(hub):
    """The masks of a trained adapter were changed by hand, and it was pushed over the first version."""
    card = card_of(hub, "me/trained-by-hand")
    assert "heads" in card.text and HEAT_MAP not in card.text and "head_scores" not in card.text


def test_only_the_adapter_is_downloaded(hub, loaded):
    """The optimizer's state, the heat map and the checkpoint that Trainer pushed are left out."""
    assert set(loaded["downloaded"]) == ADAPTER | {"head_scores.json"}
    assert any(path.startswith("last-checkpoint/") for path in hub.repos["me/trained"].files())


@pytest.mark.parametrize(
    ("what", "kind", "name"),
    [
        ("missing", "FileNotFoundError", "me/missing"),
        ("missing revision", "FileNotFoundError", "'me/my-adapter' at revision 'v9'"),
        ("no adapter", "ValueError", "me/tiny-vit"),
        ("missing subfolder", "ValueError", "me/my-adapter/v9"),
        ("from_pretrained", "ValueError", "me/missing"),
        ("load_adapter", "ValueError", "me/missing"),
    ],
)
def test_errors_name_the_repository(loaded, what, kind, name):
    assert loaded["errors"][what].startswith(f"{kind}: ") and name in loaded["errors"][what]
