"""Use stock PEFT alone, or after `import peft_heads`: `stock_round_trip.py RESULT.json [with-peft-heads]`.

The script saves, pushes and reloads adapters of PEFT's types in the working directory and on the server that HF_ENDPOINT
names. The bytes must be the same both times. With the import, our own adapters are saved and pushed in between.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from peft.utils import hotswap
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)


OURS = sys.argv[2:] == ["with-peft-heads"]
if OURS:
    import peft_heads


def unnamed_base():  # the tests' own helpers import peft_heads
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=4, num_labels=3))


torch.set_num_threads(1)
IS_NEW = any(name.endswith("q_proj") for name, _ in unnamed_base().named_modules())  # transformers 5.9
Q, V = (["q_proj"], ["v_proj"]) if IS_NEW else (["query"], ["value"])
CONFIGS = {
    "lora": lambda: LoraConfig(target_modules=Q + V, init_lora_weights=False),
    "classifier": lambda: LoraConfig(target_modules=Q, modules_to_save=["classifier"]),
    "dora": lambda: LoraConfig(target_modules=Q, use_dora=True, init_lora_weights=False),
    "adalora": lambda: AdaLoraConfig(target_modules=Q, total_step=9, init_lora_weights=False),
    "loha": lambda: LoHaConfig(target_modules=Q, init_weights=False),
    "lokr": lambda: LoKrConfig(target_modules=Q, init_weights=False),
    "ia3": lambda: IA3Config(target_modules=Q, feedforward_modules=[], init_ia3_weights=False),
    "vera": lambda: VeraConfig(target_modules=Q, init_weights=False),
    "fourierft": lambda: FourierFTConfig(target_modules=Q, n_frequency=9),
    "ln_tuning": lambda: LNTuningConfig(target_modules=["layernorm_before"]),
}


def hub_base():
    return AutoModelForImageClassification.from_pretrained("me/tiny-vit")


def local_base():
    return AutoModelForImageClassification.from_pretrained("./local-base")


BASES = {"unnamed": unnamed_base, "local": local_base, "hub": hub_base}


def main():
    unnamed_base().save_pretrained("local-base")
    local_base().push_to_hub("me/tiny-vit")
    results = {}
    for name, make_config in CONFIGS.items():
        for base, make_base in BASES.items():
            if base != "unnamed" and name not in ("lora", "ia3"):
                continue
            if OURS:
                push_ours(base, make_base)
            torch.manual_seed(1)
            results[f"{name}-{base}"] = round_trip(f"{name}-{base}", make_config(), make_base)
    results["hotswap"] = swap()
    trainer_card()
    return results


def round_trip(name, config, make_base):
    model = get_peft_model(make_base(), config)
    model.save_pretrained(name)
    model.create_or_update_model_card(name)  # a second time, over the first
    model.push_to_hub(f"me/{name}")
    model.push_to_hub(f"me/{name}", revision="again")  # over the card that is there
    loaded = PeftModel.from_pretrained(make_base(), f"me/{name}")
    loaded.load_adapter(name, "second")
    outputs = [output(model), output(loaded)]
    loaded.set_adapter("second")
    loaded.save_pretrained(f"{name}-reloaded")
    configs = [PeftConfig.from_pretrained(place) for place in (name, f"me/{name}")]
    return [*outputs, output(loaded), [f"{type(config).__name__} {config.to_dict()}" for config in configs]]


def push_ours(base, make_base):
    for config in (peft_heads.HeadMaskedLoraConfig(ne=0), peft_heads.RLRRConfig(ne=0)):
        name = f"ours-{config.peft_type.value.lower()}-{base}"
        model = get_peft_model(make_base(), config)
        model.save_pretrained(name)
        model.push_to_hub(f"me/{name}")
        PeftModel.from_pretrained(make_base(), f"me/{name}")


def swap():
    """Swap an adapter that fits, one that does not, and one of a type that cannot be swapped."""
    model = PeftModel.from_pretrained(unnamed_base(), "lora-unnamed")
    hotswap.hotswap_adapter(model, "lora-local", "default")
    errors = []
    for folder in ("dora-unnamed", "ia3-unnamed"):
        try:
            hotswap.hotswap_adapter(model, folder, "default")
        except ValueError as error:
            errors.append(str(error))
    return [output(model), errors]


def trainer_card():
    model = get_peft_model(unnamed_base(), CONFIGS["lora"]())
    args = TrainingArguments("trainer", report_to="none", use_cpu=True)
    trainer = Trainer(model, args, train_dataset=[])
    trainer.save_model()
    trainer.create_model_card()
    Path("trainer/training_args.bin").unlink()  # transformers 4.57 notes the time there


def output(model):
    with torch.no_grad():
        return model.eval()(torch.linspace(-1, 1, 768).view(1, 3, 16, 16)).logits.tolist()


if __name__ == "__main__":
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = main()
    # the origin of Python's own warnings, such as a thread that ends late, is random
    messages = sorted({str(w.message) for w in caught if not issubclass(w.category, ResourceWarning)})
    Path(sys.argv[1]).write_text(json.dumps({"results": result, "warnings": messages}))
