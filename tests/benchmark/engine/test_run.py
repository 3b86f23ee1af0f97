"""One run: the papers' training, the evaluated split, and the same result however often it is interrupted."""

import math
import shutil
from dataclasses import replace

import PIL.Image
import pytest
import torch
from transformers import Trainer, TrainerCallback

from peft_heads import TaylorHeadScorer
from peft_heads.benchmark.engine import training
from peft_heads.benchmark.engine.run import make_spec, run
from peft_heads.benchmark.engine.training import Training
from peft_heads.benchmark.engine.trunk import train_trunk, training_key, trunk_epochs, trunk_key
from peft_heads.benchmark.offline.settings import offline_specs
from peft_heads.benchmark.records.effective import with_warmup
from peft_heads.benchmark.records.results import read_results
from peft_heads.data.tasks import find_task
from peft_heads.methods import MethodSettings


HEADS = {"name": "head-masked-lora", "ne": 1, "criterion": "absolute", "r": 4, "adapter_bits": 1, "scale": 1}
METHODS = {
    "head-masked-lora": HEADS,
    "per layer": {"name": "head-masked-lora", "ne": 1, "granularity": "layer", "r": 4, "bottleneck_dropout": 0.1},
    "lora": {"name": "lora", "r": 4, "scale": 10},
    "linear": {"name": "linear"},
    "full": {"name": "full"},
    "rlrr": {"name": "rlrr", "r": 1, "init": "zero"},
    "rlrr with heads": {"name": "rlrr", "r": 2, "ne": 1},
    "peft": {"name": "peft", "peft_config": '{"peft_type": "LOHA", "r": 2}'},
}


def spec_of(bench, method=HEADS, *, final=True, seed=0, **changes):
    return make_spec(bench.tasks[0], method, replace(bench.recipe, **changes), bench.backbone, seed, final=final)


def plain(result):
    """Leave out what differs between any two runs."""
    return {name: value for name, value in result.to_json().items() if name != "seconds"}


class Killed(RuntimeError):
    pass


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Killed


@pytest.fixture
def kill_at(monkeypatch):
    """Return `kill_at(step)`, which stops the following trainings at that step; None stops none."""

    def kill(step):
        original = Training.trainer.__wrapped__ if hasattr(Training.trainer, "__wrapped__") else Training.trainer

        def trainer(self, *args, **kwargs):
            made = original(self, *args, **kwargs)
            if step is not None:
                made.add_callback(KillAt(step))
            return made

        trainer.__wrapped__ = original
        monkeypatch.setattr(Training, "trainer", trainer)

    return kill


def test_when_heads_of_rlrr_are_selected():
    """The recipe says when, if heads are deactivated; otherwise there is nothing to select."""
    recipe = {"head_warmup_epochs": 7}
    assert with_warmup(MethodSettings("rlrr", {"ne": 1}), recipe).get("head_warmup_epochs") == 7
    assert with_warmup(MethodSettings("rlrr", {"ratio": 0.25}), recipe).get("head_warmup_epochs") == 7
    assert with_warmup(MethodSettings("rlrr", {"ne": 0}), recipe).get("head_warmup_epochs") is None
    assert (
        with_warmup(MethodSettings("rlrr", {"ne": 1, "head_select_at": 9}), recipe).get("head_warmup_epochs") is None
    )


@pytest.mark.parametrize("name", METHODS)
def test_methods(bench, name):
    done, new = run(spec_of(bench, METHODS[name]), bench.places("out"))
    result = done.result
    assert new and not result.partial and 0 <= result.accuracy <= 1
    assert len(result.epoch_losses) == 4 and result.epoch_losses[-1] < result.epoch_losses[0]
    assert result.seconds > 0 and result.best_on_test is None
    head = 4 * (100 * 24 + 100)  # cifar has a hundred classes
    assert result.head_bytes == head
    adapter = {"lora": 4 * 4 * 2 * 2 * 48, "linear": 0}
    if name in adapter:
        assert result.adapter_bytes == adapter[name]
    elif name == "head-masked-lora":
        assert result.adapter_bytes < 4 * 4 * 2 * 2 * 48 / 8  # packed
    elif name == "full":
        model = training.new_image_classifier(bench.backbone, ["a"] * 100)
        assert result.adapter_bytes == sum(p.nbytes for p in model.parameters()) - head
    if "head" in name or "layer" in name:
        assert {mask.count(False) for mask in result.masks.values()} == {1}
        assert result.head_scores.keys() == result.masks.keys()
    else:
        assert result.masks == {} and result.head_scores is None
    assert read_results(bench.root / "out", unofficial=True)[0].result == result
    assert not list((bench.root / "out" / "work").iterdir())


def test_recipe_reaches_trainer(bench):
    """Learning rates follow the recipe, read independently; only training drops incomplete batches."""
    spec = spec_of(bench, weight_decay=0.25)
    trainer = Training(spec, bench.places("out")).trainer(bench.root / "x")
    rates = []
    trainer.add_callback(type("Rates", (TrainerCallback,), {
        "on_pre_optimizer_step": lambda self, *a, **k: rates.append(k["optimizer"].param_groups[0]["lr"])
    })())  # fmt: skip
    trainer.train()
    steps = 3  # 53 images, 16 in a batch
    assert len(rates) == 4 * steps
    assert rates[0] == pytest.approx(1e-6)
    assert rates[steps - 1] == pytest.approx(1e-2)
    for index in range(steps, 4 * steps):
        progress = (index - steps + 1) / (3 * steps)
        assert rates[index] == pytest.approx(1e-3 + (1e-2 - 1e-3) * (1 + math.cos(math.pi * progress)) / 2)
    assert {group["weight_decay"] for group in trainer.optimizer.param_groups} >= {0.25}
    assert isinstance(trainer.optimizer.optimizer, torch.optim.AdamW)
    seen = []
    trainer.compute_metrics = lambda prediction: seen.append(len(prediction.label_ids)) or {"accuracy": 0.0}
    trainer.evaluate()
    assert seen == [19]  # all test images
    assert [c.warmup_epochs for c in trainer.callback_handler.callbacks if isinstance(c, TaylorHeadScorer)] == [3]


def test_few_images_are_one_batch(bench):
    assert Training(spec_of(bench, batch_size=64), bench.places("out")).steps_per_epoch == 1
    assert Training(spec_of(bench, batch_size=64), bench.places("out")).drop_last is False
    assert Training(spec_of(bench, batch_size=53), bench.places("out")).drop_last is True


def test_protocol(bench, monkeypatch):
    """The evaluation split is used once; test images are never used while settings are chosen."""
    looked_at = []
    evaluate = Trainer.evaluate
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self, *a, **k: looked_at.append(len(self.eval_dataset)) or evaluate(self, *a, **k)
    )
    for final, expected in ((False, (37, 16)), (True, (53, 19))):
        looked_at.clear()
        done, _ = run(spec_of(bench, final=final), bench.places("out"))
        assert looked_at == [expected[1]]
        assert (done.spec.train_split, done.spec.eval_split) == (
            ("train800val200", "test") if final else ("train800", "val200")
        )
    looked_at.clear()
    done, _ = run(spec_of(bench, seed=1), bench.places("out"), test_every=2)
    assert looked_at == [19, 19] and done.result.best_on_test >= done.result.accuracy


def test_what_is_evaluated_in_between_changes_nothing(bench):
    once, _ = run(spec_of(bench), bench.places("once"))
    often, _ = run(spec_of(bench), bench.places("often"), test_every=1)
    assert often.result.best_on_test is not None
    assert plain(replace(often.result, best_on_test=None)) == plain(once.result)


def test_finished_runs_are_not_repeated(bench, monkeypatch):
    first, new = run(spec_of(bench), bench.places("out"))
    assert new
    monkeypatch.setattr(Training, "trainer", lambda *args: pytest.fail("trains again"))
    again, new = run(spec_of(bench), bench.places("out"))
    assert not new and again.result == first.result


@pytest.mark.parametrize("steps", [(2,), (3, 7), (8, 9, 11)], ids=["warm-up", "twice", "late"])
@pytest.mark.slow
def test_killed_runs_go_on(bench, kill_at, steps):
    whole, _ = run(spec_of(bench), bench.places("whole"))
    for step in steps:
        kill_at(step)
        with pytest.raises(Killed):
            run(spec_of(bench), bench.places("killed"))
        assert not read_results_or_none(bench.root / "killed")
    kill_at(None)
    done, _ = run(spec_of(bench), bench.places("killed"))
    assert plain(done.result) == plain(whole.result)


def read_results_or_none(folder):
    return read_results(folder, unofficial=True) if folder.exists() else []


def test_other_data_under_an_old_result_are_refused(bench):
    run(spec_of(bench), bench.places("out"))
    (bench.root / "other").mkdir()
    data = shutil.copytree(bench.root / "data", bench.root / "other" / "data")
    path = data / "cifar" / "test.txt"
    path.write_text("\n".join(path.read_text().splitlines()[::-1]) + "\n")
    places = replace(bench.places("out"), data_root=data)
    with pytest.raises(ValueError, match="is this run with data_fingerprint"):
        run(spec_of(bench), places)


@pytest.mark.parametrize("what", ["data_fingerprint", "commit", "checkpoint_revision"])
@pytest.mark.slow
def test_checkpoints_of_other_data_or_code_are_not_gone_on_from(bench, kill_at, monkeypatch, what):
    whole, _ = run(spec_of(bench), bench.places("whole"))
    environment = Training.environment

    def other(self):
        found = environment(self)
        return replace(found, **{what: {"train": "other"} if what == "data_fingerprint" else "other"})

    monkeypatch.setattr(Training, "environment", other)
    kill_at(8)
    with pytest.raises(Killed):
        run(spec_of(bench), bench.places("out"))
    (checkpoint,) = (bench.root / "out" / "work").glob("*/checkpoint-6")
    (checkpoint / "adapter_model.safetensors").write_bytes(b"must not be read")
    monkeypatch.setattr(Training, "environment", environment)
    kill_at(None)
    done, _ = run(spec_of(bench), bench.places("out"))
    assert plain(done.result) == plain(whole.result)


def test_results_of_uncommitted_code_are_made_again(bench, monkeypatch):
    from peft_heads.benchmark.records import environment

    for state, expected in (
        ((None, True), True),
        ((None, True), False),
        (("abc", False), True),
        (("abc", False), False),
    ):
        monkeypatch.setattr(environment, "source_state", lambda state=state: state)
        done, new = run(spec_of(bench), bench.places("out"))
        assert new is expected and done.official is not state[1]


def test_one_process_at_a_time(bench):
    import filelock

    spec = spec_of(bench)
    work = bench.places("out").work
    work.mkdir(parents=True)
    with filelock.FileLock(work / f".{spec.run_id}.lock"), pytest.raises(ValueError, match="by another process"):
        run(spec, bench.places("out"))
    assert run(spec, bench.places("out"))[1]


@pytest.mark.slow
def test_precision_and_clipping_are_the_recipes(bench, monkeypatch):
    expected, _ = run(spec_of(bench), bench.places("plain"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # as a launcher does
    again, _ = run(spec_of(bench), bench.places("again"))
    assert plain(again.result) == plain(expected.result)
    for change in ({"bf16": True}, {"max_grad_norm": 0.01}):
        other = spec_of(bench, **change)
        assert other.run_id != expected.spec.run_id
        assert run(other, bench.places("other"))[0].result.epoch_losses != expected.result.epoch_losses


# The shared warm-up


VARIANTS = {
    "other criterion": {"criterion": "negative"},
    "more heads": {"ne": 3},
    "no heads": {"ne": 0},
    "per layer": {"granularity": "layer", "joint": False},
    "whole heads": {"mask_scope": "head"},
    "random": {"criterion": "random", "mask_seed": 3},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.slow
def test_a_branch_is_a_run_of_its_own(bench, name):
    variant = spec_of(bench, HEADS | VARIANTS[name] | {"bottleneck_dropout": 0.1})
    trunk = train_trunk(spec_of(bench, HEADS | {"bottleneck_dropout": 0.1}), bench.places("branch"))
    assert trunk.name == "checkpoint-6" and trunk_epochs(variant) == 2
    branch, _ = run(variant, bench.places("branch"), begin_with=trunk)
    alone, _ = run(variant, bench.places("alone"))
    assert plain(branch.result) == plain(alone.result)
    assert len(branch.result.epoch_losses) == 4
    # this would fail if the trunk were not continued at the right step
    assert train_trunk(spec_of(bench, HEADS | {"bottleneck_dropout": 0.1}), bench.places("branch")) == trunk


def test_a_branch_of_rlrr(bench):
    masked = {"name": "rlrr", "ne": 1}
    variant = spec_of(bench, masked | {"ne": 2, "criterion": "negative"})
    trunk = train_trunk(spec_of(bench, masked), bench.places("branch"))
    branch, _ = run(variant, bench.places("branch"), begin_with=trunk)
    alone, _ = run(variant, bench.places("alone"))
    assert plain(branch.result) == plain(alone.result)


def test_a_killed_trunk_goes_on(bench, kill_at):
    expected = train_trunk(spec_of(bench), bench.places("whole"))
    kill_at(4)
    with pytest.raises(Killed):
        train_trunk(spec_of(bench), bench.places("killed"))
    kill_at(None)
    trunk = train_trunk(spec_of(bench), bench.places("killed"))
    names = [name for name in ("adapter_model.safetensors", "head_scores.json") if (expected / name).exists()]
    assert names
    for name in names:
        assert (trunk / name).read_bytes() == (expected / name).read_bytes()


def test_what_runs_can_share(bench):
    base = spec_of(bench)
    assert trunk_key(base) == trunk_key(spec_of(bench, HEADS | {"ne": 3, "criterion": "front"}))
    for other in (
        spec_of(bench, HEADS | {"scale": 2}),
        spec_of(bench, HEADS | {"adapter_bits": 2}),
        spec_of(bench, seed=1),
        spec_of(bench, final=False),
        spec_of(bench, head_warmup_epochs=2),
    ):
        assert trunk_key(base) != trunk_key(other)
    rlrr = spec_of(bench, {"name": "rlrr", "ne": 1})
    assert trunk_epochs(rlrr) == 2
    assert trunk_key(rlrr) == trunk_key(spec_of(bench, {"name": "rlrr", "ratio": 0.5, "criterion": "front"}))
    for settings in ({}, {"ne": 0}):  # here no head is scored, and the file has no masks
        other = spec_of(bench, {"name": "rlrr"} | settings)
        assert trunk_epochs(other) == 0 and trunk_key(other) != trunk_key(rlrr)
    assert trunk_epochs(spec_of(bench, {"name": "lora"})) == 0
    assert trunk_epochs(spec_of(bench, HEADS | {"head_window": "all"})) == 0
    assert trunk_epochs(spec_of(bench, HEADS | {"head_select_at": 0.5})) == 0
    assert trunk_epochs(spec_of(bench, HEADS | {"head_warmup_epochs": 1})) == 0
    # a teacher that is copied at the start lies in the folder of the run that has copied it
    assert trunk_epochs(spec_of(bench, HEADS | {"distill": 1.0, "teacher": "start"})) == 0
    assert trunk_epochs(spec_of(bench, HEADS | {"distill": 1.0})) == trunk_epochs(spec_of(bench, HEADS)) > 0
    assert trunk_epochs(spec_of(bench, HEADS | {"head_warmup_epochs": 2.5})) == 2


# One training, several splits


def test_twins_are_trained_once_and_are_runs_of_their_own(bench, monkeypatch):
    test = spec_of(bench)
    twin = replace(test, eval_split="val200")
    assert training_key(test) == training_key(twin) != training_key(spec_of(bench, seed=1))
    trained = []
    original = Training.trainer
    monkeypatch.setattr(Training, "trainer", lambda self, *args: trained.append(self) or original(self, *args))
    run(test, bench.places("together"), also=(twin,))
    assert len(trained) == 1
    alone, _ = run(twin, bench.places("alone"))
    together, now = run(twin, bench.places("together"))
    assert not now and len(trained) == 2
    assert plain(together.result) == plain(alone.result)
    assert together.environment.to_json() == alone.environment.to_json()


def test_a_twin_that_fails_leaves_the_run_alone(bench, monkeypatch, caplog):
    test = spec_of(bench)
    twin = replace(test, eval_split="val200")
    original = Training.accuracy

    def accuracy(self, trainer):
        if self.spec == twin:
            raise ValueError("images/val200/000003.jpg cannot be decoded")
        return original(self, trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Training, "accuracy", accuracy)
        done, now = run(test, bench.places("out"), also=(twin,))
    assert now and done.path.exists() and "left for a training of its own: images/val200" in caplog.text
    assert [found.spec for found in read_results(bench.root / "out", unofficial=True)] == [test]
    assert run(twin, bench.places("out"))[1]


def test_a_twin_that_is_there_is_not_written_again(bench):
    """This is the state after a kill between the two files."""
    test = spec_of(bench)
    twin = replace(test, eval_split="val200")
    done, _ = run(test, bench.places("out"), also=(twin,))
    done.path.unlink()
    (there,) = read_results(bench.root / "out", unofficial=True)
    before = there.path.stat().st_mtime_ns, there.path.read_bytes()
    again, now = run(test, bench.places("out"), also=(twin,))
    assert now and plain(again.result) == plain(done.result)
    assert (there.path.stat().st_mtime_ns, there.path.read_bytes()) == before


def test_offline_tasks_must_be_whole(bench):
    images = [PIL.Image.new("L", (8, 8), level) for level in (0, 9)]
    for split in ("train", "val", "test"):
        for label, image in enumerate(images):
            (bench.root / "offline" / "count" / split / str(label)).mkdir(parents=True)
            image.save(bench.root / "offline" / "count" / split / str(label) / "0.png")
    (spec, *_) = offline_specs([{"name": "linear"}], tasks=[find_task("count", "offline")])
    with pytest.raises(ValueError, match=r"train holds 2 images \(expected 1,000\); delete the folder of the task"):
        Training(spec, replace(bench.places("out"), data_root=bench.root / "offline"))


def test_a_twin_is_a_result_of_the_code_that_trained_it(bench, monkeypatch):
    """This holds whatever is committed or edited meanwhile."""
    test = spec_of(bench)
    states = iter([("abc", True), ("abc", True), ("def", False), ("def", False)])
    monkeypatch.setattr("peft_heads.benchmark.records.environment.source_state", lambda: next(states))
    run(test, bench.places("out"), also=(replace(test, eval_split="val200"),))
    found = read_results(bench.root / "out", unofficial=True)
    assert [(run.environment.commit, run.environment.dirty) for run in found] == [("abc", True)] * 2


def test_random_masks_are_drawn_by_every_run(bench):
    drawn = HEADS | {"criterion": "random"}
    specs = [spec_of(bench, drawn, seed=seed) for seed in (0, 1, 2)]
    specs += [replace(specs[0], task="eurosat"), spec_of(bench, drawn | {"mask_seed": 1})]
    seeds = [training.random_mask_seed(spec) for spec in specs]
    assert len(set(seeds)) == 5
    # the seed of a mask depends neither on the scoring nor on the evaluated images
    assert seeds[0] == training.random_mask_seed(spec_of(bench, drawn | {"ne": 3, "mask_seed": 0}, final=False))
    model, _ = Training(specs[1], bench.places("out"))._model()
    assert model.peft_config["default"].mask_seed == seeds[1]


# Bad input


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (HEADS | {"nee": 1}, "unexpected keyword argument 'nee'"),
        ({"name": "lora", "ne": 1}, "--ne does not apply to --method lora"),
        (HEADS | {"lora_alpha": 3}, "--scale and --lora_alpha say the same thing"),
    ],
)
def test_methods_that_there_are_not(bench, method, message):
    with pytest.raises(ValueError, match=message):
        spec_of(bench, method)


def test_no_checkpoint(bench):
    with pytest.raises(ValueError, match="no checkpoint '/gone'"):
        make_spec(bench.tasks[0], HEADS, bench.recipe, "/gone", 0, final=True)


def test_no_data(bench):
    spec = make_spec(find_task("svhn", "vtab"), HEADS, bench.recipe, bench.backbone, 0, final=True)
    with pytest.raises(FileNotFoundError, match="svhn"):
        run(spec, bench.places("out"))
    with pytest.raises(ValueError, match="800|1,000|1000"):
        run(spec_of(bench), bench.places("out", check_sizes=True))
