import functools
import gc
import importlib
import sys

import optuna
import pytest
import tiny
import torch
import transformers
from optuna.trial import FixedTrial, TrialState
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import Trainer, TrainerCallback, TrainingArguments

import peft_heads.scoring.search
from peft_heads import HeadMaskedLoraConfig, RLRRConfig, TaylorHeadScorer, get_head_masks
from peft_heads.scoring.search import head_model_init, head_search_space


CONFIG = HeadMaskedLoraConfig(r=4, lora_dropout=0.1)
make_model = functools.partial(tiny.make, "vit")  # 6 heads
space = functools.partial(head_search_space, ne=(1, 2, 3))


@pytest.fixture(autouse=True)
def _quick():
    """Trainer collects garbage three times per trial, which takes longer than the training: keep it to our own."""
    gc.freeze()
    yield
    gc.unfreeze()


class Watch(TrainerCallback):
    """A callback that notes each trial's start and end, and interrupts trial `fail` in the scoring window."""

    def __init__(self, scorer, fail=None):
        self.scorer, self.fail, self.trials = scorer, fail, []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.trials.append(
            {
                "model": model,
                "learning rate": args.learning_rate,
                "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
                "scorer": (self.scorer.masks, self.scorer.progress["selected_at"], self.scorer._scorer.num_steps),
                "optimizer": {group["initial_lr"] for group in optimizer.param_groups},
            }
        )

    def on_step_end(self, args, state, control, **kwargs):
        if len(self.trials) - 1 == self.fail and state.global_step == 2:
            assert self.scorer._scorer.recording
            raise FloatingPointError("the loss is not a number")


def make_trainer(folder, model_init, callbacks, **arguments):
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=8,
        num_train_epochs=3,  # of 4 steps
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        label_names=["labels"],
        use_cpu=True,
        **arguments,
    )
    data = {"train_dataset": tiny.examples(), "eval_dataset": tiny.examples(16, seed=1)}
    return Trainer(model_init=model_init, args=args, callbacks=callbacks, **data)


def search(folder, model_init=None, hp_space=space, n_trials=4, fail=None, epochs=1, **kwargs):
    """Search; return (best run, study, what `Watch` noted, trainer)."""
    scorer = TaylorHeadScorer(warmup_epochs=epochs, window="all")
    watch = Watch(scorer, fail)
    trainer = make_trainer(folder, model_init or head_model_init(make_model, CONFIG, space), [scorer, watch])
    storage = optuna.storages.InMemoryStorage()
    kwargs = {"sampler": optuna.samplers.RandomSampler(seed=0), "storage": storage, "study_name": "heads", **kwargs}
    best = trainer.hyperparameter_search(hp_space, n_trials=n_trials, backend="optuna", **kwargs)
    return best, optuna.load_study(study_name="heads", storage=storage), watch.trials, trainer


def check_trial(params, seen):
    """Check that the trial used its settings, and started with nothing from an earlier one."""
    model = seen["model"]
    config = model.peft_config["default"]
    assert (config.ne, config.ratio, config.criterion) == (params["ne"], None, params["criterion"])
    scalings = [module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)]
    assert scalings == pytest.approx([params["scale"]] * 4)
    assert seen["learning rate"] == params["learning_rate"] and seen["optimizer"] == {params["learning_rate"]}
    assert seen["scorer"] == (None, None, 0)


def num_off(model):
    return {int((~mask).sum()) for mask in get_head_masks(model).values()}


def listened_to(model):
    return [name for name, param in model.named_parameters() if param._backward_hooks]


# A search


def test_each_trial_trains_what_it_was_given(tmp_path, caplog):
    best, study, seen, trainer = search(tmp_path)
    assert len(seen) == len(study.trials) == 4
    assert len({trial.params["ne"] for trial in study.trials}) > 1 and len({str(t.params) for t in study.trials}) == 4
    for trial, trained in zip(study.trials, seen, strict=True):
        assert trial.state == TrialState.COMPLETE
        assert set(trial.params) == {"ne", "criterion", "scale", "learning_rate"}
        check_trial(trial.params, trained)
        assert num_off(trained["model"]) == {trial.params["ne"]}
        assert not listened_to(trained["model"])
        assert trained["weights"].keys() == seen[0]["weights"].keys()
        assert all(torch.equal(tensor, seen[0]["weights"][name]) for name, tensor in trained["weights"].items())
    assert len({id(trained["model"]) for trained in seen}) == 4
    assert "no corresponding field" not in caplog.text
    assert CONFIG == HeadMaskedLoraConfig(r=4, lora_dropout=0.1)  # not changed

    # the same settings without a search, and once more as the documentation says, give the same model
    plain = HeadMaskedLoraConfig(
        ne=best.hyperparameters["ne"],
        criterion=best.hyperparameters["criterion"],
        r=4,
        lora_alpha=4 * best.hyperparameters["scale"],
        lora_dropout=0.1,
    )
    alone = make_trainer(
        tmp_path,
        lambda: get_peft_model(make_model(), plain),
        [TaylorHeadScorer(warmup_epochs=1, window="all")],
        learning_rate=best.hyperparameters["learning_rate"],
    )
    trainer.model_init = functools.partial(trainer.model_init, best.hyperparameters)
    trainer.args.learning_rate = best.hyperparameters["learning_rate"]
    expected = seen[int(best.run_id)]["model"].state_dict()
    for again in (alone, trainer):
        again.train()
        assert again.evaluate()["eval_loss"] == best.objective
        assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())
        assert num_off(again.model) == {best.hyperparameters["ne"]}


class PruneEverySecond(optuna.pruners.BasePruner):
    def prune(self, study, trial):
        return trial.number % 2 == 1


@pytest.mark.parametrize("epochs", [1, 2], ids=["masked", "not yet masked"])
@pytest.mark.filterwarnings("ignore:training ended at step 4, before the selection at step 8:UserWarning")
def test_a_pruned_trial_leaves_nothing_behind(tmp_path, epochs):
    """It is pruned in the scoring window, or after it; no other trial tidies up after the last one."""
    _, study, seen, _ = search(tmp_path, epochs=epochs, pruner=PruneEverySecond())
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED] * 2
    for trial, trained in zip(study.trials, seen, strict=True):
        check_trial(trial.params, trained)
        assert not listened_to(trained["model"])
        masked = epochs == 1 or trial.state == TrialState.COMPLETE
        assert num_off(trained["model"]) == {trial.params["ne"] if masked else 0}


@pytest.mark.skipif(Version(transformers.__version__) < Version("5"), reason="Trainer of 4.57 takes no catch=")
def test_a_failed_trial_leaves_nothing_behind(tmp_path):
    _, study, seen, _ = search(tmp_path, n_trials=3, fail=1, catch=(FloatingPointError,))
    assert [trial.state for trial in study.trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    for trial, trained in zip(study.trials, seen, strict=True):
        check_trial(trial.params, trained)
        assert not listened_to(trained["model"])
    assert [num_off(trained["model"]) for trained in seen[1:]] == [{0}, {study.trials[2].params["ne"]}]


# The search space


def test_default_search_space():
    trial = optuna.create_study().ask()
    arguments = head_search_space(trial)
    assert arguments == {"learning_rate": trial.params["learning_rate"]}
    distributions = trial.distributions
    assert distributions["ne"].choices == (1, 3, 6)
    assert distributions["criterion"].choices == ("positive", "negative", "absolute")
    assert distributions["scale"].choices == (0.01, 0.1, 1, 10, 100)
    assert distributions["learning_rate"] == optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True)


@pytest.mark.parametrize("space_first", [False, True], ids=["model first", "space first"])
def test_model_and_search_space_agree_in_either_order(space_first):
    """transformers 5 asks model_init first, 4.57 hp_space."""
    model_init = head_model_init(make_model, CONFIG, space)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    for _ in range(4):
        trial = study.ask()
        arguments = space(trial) if space_first else None
        config = model_init(trial).peft_config["default"]
        assert arguments is None or space(trial) == arguments
        assert (config.ne, config.criterion) == (trial.params["ne"], trial.params["criterion"])
        assert config.lora_alpha == 4 * trial.params["scale"]


def test_other_processes_get_the_same_trial():
    """Only rank 0 calls hp_space, and it broadcasts what has been suggested by then."""
    trial = optuna.create_study().ask()
    arguments = space(trial)
    fixed = FixedTrial(trial.params, trial.number)
    model_init = head_model_init(make_model, CONFIG, space)
    assert model_init(fixed).peft_config == model_init(trial).peft_config
    assert space(fixed) == arguments and fixed.params == trial.params


def test_a_search_space_of_ones_own(tmp_path):
    """It may have more of Trainer's arguments, and other fields of the configuration."""

    def own(trial):
        trial.suggest_categorical("r", [2])
        trial.suggest_categorical("ratio", [0.5])
        trial.suggest_categorical("scale", [3])
        return {"weight_decay": trial.suggest_float("weight_decay", 0.1, 0.2)}

    best, _, seen, trainer = search(tmp_path, head_model_init(make_model, CONFIG, own), own, n_trials=1)
    config = seen[0]["model"].peft_config["default"]
    assert (config.ne, config.ratio, config.r, config.lora_alpha) == (None, 0.5, 2, 6)
    assert num_off(seen[0]["model"]) == {3}
    assert trainer.args.weight_decay == best.hyperparameters["weight_decay"]


# The model


def test_without_a_trial_it_is_the_configuration_s():
    """Trainer's constructor calls model_init without a trial."""
    config = HeadMaskedLoraConfig(ratio=0.5, r=2, lora_alpha=3, modules_to_save=["classifier"])
    made = head_model_init(make_model, config)().peft_config["default"]
    assert made is not config and made.modules_to_save is not config.modules_to_save
    assert (made.ne, made.ratio, made.r, made.lora_alpha) == (None, 0.5, 2, 3)
    assert config.target_modules is None  # which PEFT fills in
    assert head_model_init(make_model)(None).peft_config["default"].ne == 1


def test_dict_trials():
    """Ray Tune, W&B and the best run have dicts; `ne` takes the place of a `ratio`."""
    model_init = head_model_init(make_model, HeadMaskedLoraConfig(ratio=0.5, r=2))
    trial = {"ne": 2, "criterion": "negative", "scale": 10, "learning_rate": 1e-3, "weight_decay": 0.1}
    config = model_init(trial).peft_config["default"]
    assert (config.ne, config.ratio, config.criterion, config.lora_alpha) == (2, None, "negative", 20)


# Wrong use


def test_a_value_that_does_not_fit_the_model(tmp_path):
    too_large = functools.partial(head_search_space, ne=(6,))
    with pytest.raises(ValueError, match="ne=6 applies to no group of heads: the groups have 6 heads.*smaller ne"):
        search(tmp_path, head_model_init(make_model, CONFIG, too_large), too_large)


@pytest.mark.parametrize("given", ["model_init", "hp_space"])
def test_two_search_spaces(tmp_path, given):
    """A likely mistake is that one of the two keeps the default."""
    model_init = head_model_init(make_model, CONFIG, *([space] if given == "model_init" else []))
    with pytest.raises(ValueError, match="head_model_init and hyperparameter_search need the same search space: "):
        search(tmp_path, model_init, hp_space=space if given == "hp_space" else head_search_space)


def test_a_trial_of_another_process_without_our_names():
    model_init = head_model_init(make_model, CONFIG)
    with pytest.raises(ValueError, match="need the same search space: The value of the parameter 'ne' is not found"):
        model_init(FixedTrial({"learning_rate": 1e-3}))


@pytest.mark.parametrize(
    "trial", [{"learning_rate": 1e-3}, FixedTrial({"learning_rate": 1e-3})], ids=["dict", "optuna"]
)
def test_a_search_space_without_ours(trial):
    model_init = head_model_init(make_model, CONFIG, lambda trial: trial.suggest_float("learning_rate", 1e-4, 1e-2))
    with pytest.raises(ValueError, match="nothing for the model, only learning_rate: call head_search_space"):
        model_init(trial)


def test_the_same_model_twice():
    model = make_model()
    model_init = head_model_init(lambda: model, CONFIG)
    model_init()
    with pytest.raises(ValueError, match="has an adapter already; it must make a new base model"):
        model_init()


def test_other_configurations_are_refused():
    with pytest.raises(TypeError, match="needs a HeadMaskedLoraConfig or an RLRRConfig; got"):
        head_model_init(make_model, LoraConfig())


def test_ray_and_wandb_search_spaces_are_refused():
    with pytest.raises(
        TypeError, match="for Optuna.*got the trial None. For Ray Tune or W&B write the space in their"
    ):
        head_search_space(None)


def test_the_module_does_not_need_optuna(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # not installed
    importlib.reload(peft_heads.scoring.search)


def test_rlrr():
    """RLRR's heads can be masked as well; the search space must have its own fields."""

    def space(trial):
        return {"ne": trial.suggest_int("ne", 1, 2), "r": trial.suggest_int("r", 2, 2)}

    model_init = head_model_init(lambda: tiny.make("vit"), RLRRConfig(init="zero"), space)
    config = model_init({"ne": 2, "r": 2}).peft_config["default"]
    assert (config.ne, config.r, config.init) == (2, 2, "zero")
    with pytest.raises(ValueError, match="the search space suggests scale, which RLRRConfig has not"):
        model_init({"scale": 0.1})


@pytest.mark.parametrize(
    ("settings", "params", "expected"),
    [
        ({"ne": 2}, {"target_speed": 1.5}, (None, None, None, 1.5, "head")),
        ({"target_speed": 2.0}, {"target_speed": 1.5}, (None, None, None, 1.5, "head")),
        ({"target_speed": 2.0}, {"ne": 2}, (2, None, None, None, "head")),
        ({"neuron_ratio": 0.5}, {"ne": 2}, (2, None, 0.5, None, "head")),
        ({"ratio": 0.5}, {"neuron_ratio": 0.25}, (None, 0.5, 0.25, None, "head")),
    ],
)
def test_a_trial_prunes(settings, params, expected):
    """What it suggests takes the place of what says the same thing in another way."""
    made = head_model_init(make_model, HeadMaskedLoraConfig(**settings))(params).peft_config["default"]
    assert (made.ne, made.ratio, made.neuron_ratio, made.target_speed, made.mask_scope) == expected
