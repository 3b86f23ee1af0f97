"""The help, the dry run and the start of `peft-heads bench` say what is in effect."""

import re

import pytest
import tiny
import trees

from peft_heads.cli.bench_arguments import build_parser, read_method
from peft_heads.cli.main import main
from peft_heads.tuners.common.method_registry import registered_methods


def help_of(argument, lists=True):
    (action,) = [a for a in build_parser("sweep", "", lists)._actions if f"--{argument}" in a.option_strings]
    return action.help


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("r", "Rank. Default: 32 of head-masked-lora, 1 of rlrr, 8 of lora."),
        ("adapter_bits", "not quantised. Default: 1."),
        ("bottleneck_dropout", "Default: 0.1."),
        ("ne", "Default: 0 1 3 6 of head-masked-lora, 0 of rlrr."),
        ("scale", "Default: 0.01 0.1 1 10 100."),
        ("learning_rate", "default: 0.001; 0.005 of fewshot; 0.01 of offline"),
        ("head_warmup_epochs", "(default: the recipe's, 10; 3 of offline)"),
        ("granularity", "Default: global. One of global, layer."),
        ("normalization", "(default: none; imagenet of fewshot; imagenet of fgvc; half of offline)"),
    ],
)
def test_help_says_what_the_benchmark_uses(argument, expected):
    assert expected in help_of(argument)


def test_help_never_contradicts():
    """The help shows every default that a method is given."""
    grids = {method.name: method.grid for method in registered_methods() if method.grid}
    assert {"head-masked-lora", "lora", "rlrr"} <= set(grids)
    for method, grid in grids.items():
        args = build_parser("sweep", "", True).parse_args(["--data_root=d", "--output_dir=o", f"--method={method}"])
        assert read_method(args) == {"name": method} | grid
        for name, value in grid.items():
            words = " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}"
            assert re.search(rf"Default:.* ?{re.escape(words)}( of|\.)", help_of(name)), (method, name)
    assert "none, to be given" in help_of("scale", lists=False)
    assert "Default" not in help_of("lora_alpha") and "default" not in help_of("lora_alpha")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    sizes = {"train800": 37, "val200": 16, "train800val200": 53, "test": 19}
    trees.write_vtab(root / "vtab", trees.small("cifar", "vtab", sizes=sizes))
    tiny.make("vit").save_pretrained(root / "vit")
    words = f"--data_root {root}/vtab --cache_dir {root}/cache --model_name_or_path {root}/vit --task cifar --epochs 2"
    return [*words.split(), *"--batch_size 16 --warmup_epochs 1 --any_size --use_cpu".split()]


def test_dry_run_and_start(arguments, tmp_path, capsys):
    sweep = ["bench", "sweep", *arguments, "--output_dir", str(tmp_path / "out"), "--ne", "0", "1", "--dry_run"]
    assert main([*sweep, "--criterion", "absolute"]) == 0
    printed = capsys.readouterr().out
    for words in (
        "head-masked-lora: ne=0|1, r=32, ",
        "scale=0.01|0.1|1|10|100, bottleneck_dropout=0.1, adapter_bits=1",
        "vtab: epochs=2, batch_size=16, learning_rate=0.001",
        "departs from the recipe of vtab: epochs 2 (recipe: 100); batch_size 16 (recipe: 64)",
        "images: size 16 (recipe: 224); trees with any number of images (--any_size)",
    ):
        assert words in printed
    assert not (tmp_path / "out").exists()
    assert main(["bench", "run", *arguments, "--output_dir", str(tmp_path / "out"), "--method", "linear"]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.startswith("in effect\n  method      linear:")
        and "departs from the recipe of vtab: epochs 2" in printed
    )


def test_ctrl_c(arguments, tmp_path, capsys, monkeypatch):
    from transformers.trainer_callback import CallbackHandler

    original = CallbackHandler.on_step_end

    def on_step_end(self, args, state, control):
        if state.global_step == 2 and "seed1" in args.output_dir:
            raise KeyboardInterrupt
        return original(self, args, state, control)

    words = [
        "bench",
        "run",
        *arguments,
        "--output_dir",
        str(tmp_path / "out"),
        "--method",
        "linear",
        "--seed",
        "0",
        "1",
    ]
    with monkeypatch.context() as patched:
        patched.setattr(CallbackHandler, "on_step_end", on_step_end)
        assert main(words) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"peft-heads bench: interrupted at step 2 of 6 of linear-\S*seed1\S*; 1 runs of this command are", last
    )
    assert main(words) == 0
