"""The options of every registered method: each reaches the adapter and trains, and each is in the method's help."""

import re

import pytest
import tiny
from throwaway import registered, throwaway

from peft_heads.cli.arguments import build_parser, parse_arguments
from peft_heads.cli.bench_arguments import build_parser as build_bench_parser
from peft_heads.cli.bench_arguments import read_method
from peft_heads.cli.inspect import describe
from peft_heads.cli.method_options import method_help, method_names, named_method
from peft_heads.convert.inspect import AdapterReport
from peft_heads.methods import MethodSettings, all_options, apply_method, check_method, effective_settings
from peft_heads.tuners.common.method_registry import registered_methods
from peft_heads.tuners.common.options import HEAD_SETTINGS, SCORER_SETTINGS


# A value other than the default, for options whose type suggests none.
VALUES = {
    "adapter_bits": 1,
    "classifier_bits": 2,
    "ne": 2,
    "mask_seed": 3,
    "r": 2,
    "ratio": 0.5,
    "head_select_at": 2.0,
    "target_speed": 1.5,
}
VALUES |= {"head_warmup_epochs": 1.0, "peft_config": '{"peft_type": "RLRR", "ne": 1}'}
OPTIONS = [(method.name, option.name) for method in registered_methods() for option in method.option_table.values()]


def value_of(option):
    if option.name in VALUES:
        return VALUES[option.name]
    if option.choices:
        return next(choice for choice in option.choices if choice != option.default)
    return not option.default if option.type is bool else {int: 3, float: 0.25}[option.type]


def test_every_option_is_tried():
    assert len(OPTIONS) == 25 + 23 + 9 + 4
    assert {name for _, name in OPTIONS} == set(all_options())


@pytest.mark.parametrize(("name", "option_name"), OPTIONS)
def test_every_option_trains(name, option_name):
    """Each option leads from words on the command line to a step of the model."""
    (option,) = (
        x for method in registered_methods() if method.name == name for x in [method.option_table[option_name]]
    )
    value = value_of(option)
    words = [f"--method={name}", f"--{option_name}={str(value).lower() if value in (True, False) else value}"]
    if option_name in HEAD_SETTINGS + SCORER_SETTINGS and option_name not in ("ne", "ratio") and name != "peft":
        words.append("--ne=1")
    words += {"last_cut": ["--cuts=2"], "distill_temperature": ["--distill=1"], "teacher": ["--distill=1"]}.get(
        option_name, []
    )
    if option_name == "neuron_criterion":
        words.append("--neuron_ratio=0.5")
    if name == "peft" and option_name != "peft_config":
        words.append(f"--peft_config={VALUES['peft_config']}")
    *_, given, _ = parse_arguments([*words, "--use_cpu", "--output_dir=out"])
    assert given.name == name and given[option_name] == value and type(given[option_name]) is type(value)
    check_method(given)
    model, callbacks = apply_method(tiny.make("vit"), given)
    config = model.peft_config["default"]
    if option_name in SCORER_SETTINGS:
        (scorer,) = callbacks
        renamed = {"head_select_at": "select_at", "head_warmup_epochs": "warmup_epochs", "head_window": "window"}
        attribute = renamed.get(option_name, option_name)
        assert getattr(scorer, attribute) == value
    elif option_name == "peft_config":
        assert config.peft_type == "RLRR" and config.ne == 1
    else:
        assert (option.read(config) if option.read else getattr(config, option_name)) == pytest.approx(value)
        assert effective_settings(given)[option_name] == pytest.approx(value)
    model.train()(**tiny.batch()).loss.backward()
    trained = [param for param in model.parameters() if param.requires_grad]
    assert trained and all(param.grad is not None for param in trained)


@pytest.mark.parametrize("name", method_names())
def test_help_of_a_method_shows_its_options_alone(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(["--method", name, "--help"])
    printed = capsys.readouterr().out
    assert exit_.value.code == 0 and printed.startswith(f"usage: peft-heads train --method {name} ")
    own = [option_name for method, option_name in OPTIONS if method == name]
    assert re.findall(r"^  --(\w+)", printed, re.MULTILINE) == own
    assert ("has no options of its own" in " ".join(printed.split())) == (not own)


def test_help_has_the_defaults_of_the_method():
    text = " ".join(method_help("rlrr", "peft-heads train").split())
    assert (
        "Rank of the factors (default 1)." in text
        and "residual RESIDUAL Whether" in text
        and "(default true)." in text
    )
    assert "--init {kaiming,normal,zero,constant,uniform}" in text and "(default kaiming)." in text
    assert "Rank (default 8)." in method_help("lora", "peft-heads train")
    assert "(default 0)." in text and "(default 1)." in method_help("head-masked-lora", "peft-heads train")


def test_help_without_a_method_says_how_to_see_more(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert (
        "--model_name_or_path" in printed
        and "--learning_rate" in printed
        and "--method {head-masked-lora,rlrr" in printed
    )
    assert "--method X --help shows the options of method X" in printed
    assert not [name for name in all_options() if f"--{name} " in printed]


def test_the_method_of_a_config_file_has_its_help(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("method: rlrr\nnorms: false\n")
    with pytest.raises(SystemExit):
        parse_arguments([str(tmp_path / "c.yaml"), "-h"])
    assert "--shift_without_bias" in capsys.readouterr().out
    with pytest.raises(ValueError, match="invalid choice: 'lorra'"):
        parse_arguments(["--method=lorra", "--help"])


@pytest.mark.parametrize(
    ("words", "name"),
    [(["--method", "lora"], "lora"), (["--method=x", "--ne", "1"], "x"), (["--ne=1"], None), (["--method"], None)],
)
def test_named_method(words, name):
    assert named_method(words) == name


def test_unknown_methods_and_settings():
    with pytest.raises(ValueError, match="there is no method 'lorra' .known: head-masked-lora, "):
        check_method(MethodSettings("lorra"))
    with pytest.raises(
        ValueError, match=r"method \{'name': 'lora', 'ned': 1\}: got an unexpected keyword argument 'ned'"
    ):
        check_method(MethodSettings("lora", {"ned": 1}))


def test_settings_as_results_hold_them():
    data = {"name": "lora", "scale": 0.1, "r": 4}
    method = MethodSettings.from_json(data)
    assert method == MethodSettings("lora", {"scale": 0.1, "r": 4}) and list(method.to_json().items()) == list(
        data.items()
    )
    assert (method["r"], method.get("ne"), method.get("ne", 1)) == (4, None, 1)
    with pytest.raises(ValueError, match="method needs a name, as in {'name': 'lora'}; got {'r': 4}"):
        MethodSettings.from_json({"r": 4})
    with pytest.raises(ValueError, match="method must be dict; got str 'lora'"):
        MethodSettings.from_json("lora")


def test_a_registered_method_is_in_every_command(tmp_path):
    bench = ["--data_root=d", "--output_dir=o", "--method=throw-away"]
    with pytest.raises(ValueError, match="invalid choice: 'throw-away'"):
        parse_arguments(["--method=throw-away"])
    with registered(throwaway()):
        *_, given, _ = parse_arguments(
            ["--method=throw-away", "--gain=2", "--init=twos", "--use_cpu", "--output_dir=o"]
        )
        assert given.to_json() == {"name": "throw-away", "init": "twos", "gain": 2.0}
        check_method(given)
        assert effective_settings(given) == {"gain": 2.0, "mode": "soft", "init": "twos", "steps": 3}
        # another method's option of the same name keeps its own values
        with pytest.raises(ValueError, match="invalid choice: 'twos'"):
            parse_arguments(["--method=rlrr", "--init=twos", "--use_cpu", "--output_dir=o"])
        with pytest.raises(ValueError, match="--gain does not apply to --method lora"):
            check_method(MethodSettings("lora", {"gain": 2}))
        text = " ".join(method_help("throw-away", "peft-heads train").split())
        assert "Trains something." in text and "Factor of the update (default 1.5)." in text and "--steps" not in text
        (tmp_path / "c.yaml").write_text("method: throw-away\nmode: hard\ninit: twos\n")
        *_, given, _ = parse_arguments([str(tmp_path / "c.yaml"), "--use_cpu", "--output_dir=o"])
        assert given.to_json() == {"name": "throw-away", "mode": "hard", "init": "twos"}

        parser = build_bench_parser("sweep", "", True, "throw-away")
        assert read_method(parser.parse_args(bench)) == {"name": "throw-away", "gain": [1, 2]}
        read = read_method(parser.parse_args([*bench, "--gain", "3", "--init", "ones", "twos"]))
        assert read == {"name": "throw-away", "init": ["ones", "twos"], "gain": 3}
        assert "Factor of the update. Default: 1 2." in next(a.help for a in parser._actions if a.dest == "gain")

        report = AdapterReport(tmp_path, {"peft_type": "THROW_AWAY", "gain": 1.5, "r": 8}, {}, {}, "", {}, {}, {})
        assert "settings             gain=1.5" in describe(report)
    assert "throw-away" not in build_parser().format_help()
    with pytest.raises(SystemExit):
        build_bench_parser("sweep", "", True).parse_args(bench)
