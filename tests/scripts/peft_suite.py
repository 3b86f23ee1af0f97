"""PEFT's own tests with `HeadMaskedLoraConfig` in place of `LoraConfig`, and stock LoRA as control.

    python tests/scripts/peft_suite.py [--source DIR] [--stand-in ne=0 ne=1] [--work DIR]

The script takes the tests from the source distribution of the installed peft, runs them with stock LoRA and with each
stand-in (peft_suite_plugin.py says what it adapts), and compares the outcomes test by test. It exits with 1 if a test
passes for stock LoRA, fails for ours and is not in `EXPECTED`. It needs pytest-timeout, pytest-xdist,
parameterized, scipy and diffusers, and about 12 minutes on 2 cores.

Nothing is downloaded from the Hub: the script makes the tiny models that the tests ask for, with random weights. Tests of
other models, of adapters or data sets on the Hub and of GPUs fail or are skipped in every run.
"""

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path


TEST_FILES = """
arrow auto bdlora config custom_models decoder_models encoder_decoder_models feature_extraction_models helpers
hub_features initialization integrations lora_conversion lora_ga lora_intruders lora_megatron lora_variants lorafa
loraplus low_level_api mapping mixed other randlora riemannian_lora seq_classifier target_parameters
token_classification_qa torch_compile trainable_tokens tuners_utils velora xlora
""".split()

TYPE = "asserts the literal type: names of stock LoRA's classes, or peft_type LORA"
ONLY_LORA = "PEFT itself asks for the literal type LORA"
REFUSED = "a file that does not fit its settings or the model is refused before anything is changed"
DROPOUT = "turns on every option with dropout in its name: bottleneck_dropout works on torch.nn.Linear alone"
KEYS = "a masked adapter has one more key per layer in its state dict: the mask"
# (stand-in or "" for each, pattern found in "node id | error", reason)
EXPECTED = [
    ("", r"not compatible with the `PeftMixedModel`|is not supported for mixed models", "list of PeftMixedModel"),
    ("", r"test_custom_models.*::test_repr_lora_linear ", TYPE),
    ("", r"test_initialization.*::test_modules_to_save_targets_lora_layer_raises ", TYPE),
    ("", r"test_initialization.*::test_hotswap_(different|wrong)_peft_types_raises ", TYPE),
    ("", r"test_lora_conversion.*::test_fixed_rank_lora_config ", TYPE),
    ("", r"test_velora.*::test_velora_config_alias_matches_lora_module_config ", TYPE),
    ("", r"TestModelAndLayerStatus::.*(HEA|MASKED_|HeadMasked|MaskedL|\['lo)", TYPE),
    ("", r"test_lora_conversion.*::test_converted_lora_to_lora_works_and_warns ", ONLY_LORA + ", to warn"),
    ("", r"test_lora_intruders.*not using LoRA and is therefore not supported", ONLY_LORA),
    ("", r"test_integrations.*::test_qwen3_moe_", ONLY_LORA + ", to rename the targets of mixtures of experts"),
    ("", r"::test_save_pretrained_warns_for_unsharded_state_dict ", ONLY_LORA + ", to warn"),
    ("", r"::test_merge_layers_is_deterministic_in_train_mode.*bottleneck_dropout=0.5 are not implemented", DROPOUT),
    ("", r"::test_from_pretrained_sanity_check.*missing required keys", "the same error, with the folder's name"),
    ("", r"::test_load_resized_embedding_ignore_mismatched_sizes .*lora_embedding_A has the shape", REFUSED),
    ("", r"TestHotSwapping::test_hotswap_extra_key_raises .*has no place in the model", REFUSED),
    ("", r"TestHotSwapping::test_hotswap_missing_key_works .*Found missing adapter keys", REFUSED),
    ("", r"::test_from_pretrained_missing_keys_warning .*Found missing adapter keys", REFUSED),
    (
        "",
        r"::test_key_mapping_save_new_load_old_lora .*XPASS",
        "PEFT fails, as it says; ours loads new names under old",
    ),
    ("ne=1", r"TestTunerStateDictKeyPrefixes::test_prefixes_select_correct_state_dict_keys ", KEYS),
    (
        "ne=1",
        r"fsdp_wrapped_learnable_bias\[bias_(all|peft_method_only)",
        "bias= is refused with masks, here set afterwards",
    ),
    ("ne=1", r"test_xlora.*Got unexpected keys!", KEYS + ", which X-LoRA does not take"),
]

# ruff: noqa: C408
SMALL = dict(vocab_size=1024, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
SMALL |= dict(max_position_embeddings=128, bos_token_id=0, pad_token_id=1, eos_token_id=2)
FIVE = SMALL | dict(num_hidden_layers=5)
LLAMA = SMALL | dict(num_key_value_heads=2)
MOE = LLAMA | dict(head_dim=8, num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
SLIDING = dict(head_dim=8, layer_types=["sliding_attention", "full_attention"])
DEBERTA = SMALL | dict(relative_attention=True, pos_att_type=["c2p", "p2c"])
BART = SMALL | dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64)
BART |= dict(encoder_attention_heads=4, decoder_attention_heads=4)
T5 = dict(vocab_size=1024, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
RESNET = dict(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1])
# {organisation: {name after "tiny-": (class, configuration)}}; the class is the name's last part where it is None
MODELS = {
    "peft-internal-testing": {
        "random-OPTForCausalLM": (None, FIVE | dict(ffn_dim=64, word_embed_proj_dim=32)),
        "random-GPT2LMHeadModel": (None, SMALL),
        "random-gpt2": ("GPT2LMHeadModel", SMALL),
        "random-GPTJForCausalLM": (None, SMALL | dict(rotary_dim=4)),
        "random-BloomForCausalLM": (None, FIVE),
        "random-GPTNeoXForCausalLM": (None, SMALL),
        "dummy-qwen2": ("Qwen2ForCausalLM", LLAMA),
        "random-LlamaForCausalLM": (None, LLAMA),
        "random-T5ForConditionalGeneration": (None, T5),
        "random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", T5),
        "random-t5": ("T5ForConditionalGeneration", T5),
        "random-BartForConditionalGeneration": (None, BART),
        "random-BertModel": (None, SMALL),
        "random-BertForSequenceClassification": (None, SMALL),
        "random-RobertaModel": (None, SMALL),
        "random-RobertaForSequenceClassification": (None, SMALL),
        "random-DebertaModel": (None, DEBERTA),
        "random-DebertaV2Model": (None, DEBERTA),
        "random-ResNetForImageClassification": (None, RESNET),
    },
    "hf-internal-testing": {
        "random-BertModel": (None, SMALL),
        "random-gpt2": ("GPT2LMHeadModel", SMALL),
        "random-LlamaForCausalLM": (None, LLAMA),
        "random-MistralForCausalLM": (None, LLAMA),
        "random-Gemma3ForCausalLM": (None, LLAMA | SLIDING),
    },
    "trl-internal-testing": {
        "random-LlamaForCausalLM": (None, LLAMA),
        "LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", LLAMA),
        "Llama4ForCausalLM": (None, MOE | dict(intermediate_size_mlp=64)),
        "GptOssForCausalLM": (None, MOE | SLIDING),
        "Qwen3MoeForCausalLM": (None, MOE),
    },
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="unpacked source distribution; fetched with pip without")
    parser.add_argument("--work", type=Path, help="an empty folder to work in and to keep; a temporary one without")
    parser.add_argument("--stand-in", nargs="+", choices=("ne=0", "ne=1"), default=["ne=0", "ne=1"])
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        prepare_tests(args.source or fetch_source(work), work)
        make_models(work / "hub")
        control = run_tests("none", work)
        unexpected = [key for name in args.stand_in for key in compare(name, control, run_tests(name, work))]
    sys.exit(1 if unexpected else 0)


def fetch_source(work: Path) -> Path:
    version = importlib.metadata.version("peft")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "peft"]
    subprocess.run([*pip, "--dest", work, f"peft=={version}"], check=True)
    with tarfile.open(work / f"peft-{version}.tar.gz") as archive:
        archive.extractall(work, filter="data")
    return work / f"peft-{version}"


def prepare_tests(source: Path, work: Path) -> None:
    """Copy the tests without PEFT's own sources, so that the installed peft is tested."""
    tests = work / "suite" / "tests"
    tests.mkdir(parents=True)
    for path in (source / "tests").glob("*.py"):
        (tests / path.name).write_bytes(path.read_bytes())
    (tests / "__init__.py").touch()  # the distribution lacks this file, and the tests import from each other
    (tests.parent / "pyproject.toml").write_bytes((source / "pyproject.toml").read_bytes())


def make_models(cache: Path) -> None:
    """Put tiny models with random weights, and a tokenizer of bytes, into the cache of the Hub's client."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    transformers.utils.logging.disable_progress_bar()
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    names = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), tokens, strict=False))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    for organisation, group in MODELS.items():
        for name, (class_name, config) in group.items():
            torch.manual_seed(0)
            model_class = getattr(transformers, class_name or name.rpartition("-")[2])
            repository = cache / f"models--{organisation}--tiny-{name}"
            (repository / "refs").mkdir(parents=True)
            (repository / "refs" / "main").write_text("0" * 40)
            model_class(model_class.config_class(**config)).save_pretrained(repository / "snapshots" / ("0" * 40))
            tokenizer.save_pretrained(repository / "snapshots" / ("0" * 40))


def run_tests(stand_in: str, work: Path) -> dict[str, dict]:
    command = [sys.executable, "-m", "pytest", *(f"tests/test_{name}.py" for name in TEST_FILES), "-q", "--tb=line"]
    command += ["-o", "addopts=", "-p", "no:cacheprovider", "-n", "2", "--timeout", "300"]
    command += ["-p", "peft_suite_plugin", "--stand-in", stand_in, "--outcomes", work / f"{stand_in}.json"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with open(work / f"{stand_in}.log", "w") as log:
        subprocess.run(
            command, cwd=work / "suite", env=env | {"HF_HUB_CACHE": str(work / "hub")}, stdout=log, stderr=log
        )
    return json.loads((work / f"{stand_in}.json").read_text())


def compare(stand_in: str, control: dict, ours: dict) -> list[str]:
    """Print how the outcomes differ; return the node ids of differences that `EXPECTED` does not explain."""
    missing = {"outcome": "missing", "error": "", "masked": False}
    pairs = {key: (control.get(key, missing), ours.get(key, missing)) for key in sorted({*control, *ours})}
    print(
        f"\n== {stand_in} against stock LoRA: {len(pairs)} tests, in {sum(o['masked'] for o in ours.values())} a mask"
    )
    counts = Counter((old["outcome"], new["outcome"]) for old, new in pairs.values())
    for (old, new), count in counts.most_common():
        print(f"{count:6} {old if old == new else f'{old} -> {new}'}")
    unexpected = []
    for key, (old, new) in pairs.items():
        if old["outcome"] != new["outcome"]:
            line = f"{key} | {new['error'] or old['error']}"
            reason = next(
                (why for only, pattern, why in EXPECTED if only in ("", stand_in) and re.search(pattern, line)), None
            )
            print(f"{reason or 'UNEXPECTED'}: {line[:300]}")
            unexpected += [key] if reason is None else []
    print(f"{len(unexpected)} unexpected differences")
    return unexpected


if __name__ == "__main__":
    main()
