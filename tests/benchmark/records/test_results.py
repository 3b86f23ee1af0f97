import json

import pytest

from peft_heads.benchmark.records.results import find_result, read_result, read_results, result_path, write_result
from peft_heads.benchmark.records.run_record import Environment, RunResult, RunSpec, describe_method


SPEC = {
    "suite": "vtab",
    "task": "cifar",
    "method": {"name": "head-masked-lora", "ne": 1, "criterion": "negative", "scale": 1.0},
    "backbone": "google/vit-base-patch16-224-in21k",
    "seed": 0,
    "train_split": "train800val200",
    "eval_split": "test",
    "epochs": 100,
    "recipe": {"learning_rate": 1e-3, "drop_path": 0.1, "betas": (0.9, 0.999)},
    "preprocessing": {"resize": "bicubic", "normalization": "none"},
}
RESULT = {
    "accuracy": 0.725,
    "epoch_losses": [1.5, float("nan")],
    "seconds": 12.5,
    "peak_memory_bytes": None,
    "trained_parameters": 300_000,
    "adapter_bytes": 140_000,
    "head_bytes": 300_000,
    "masks": {"layers.0.q": [True, False]},
    "head_scores": {"layers.0.q": [1.0, float("inf")]},
}
ENVIRONMENT = {
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "dirty": False,
    "data_fingerprint": {"train": "1f", "test": "2e"},
    "image_format": "PNG",
    "checkpoint_revision": "r1",
    "device": "cpu",
}


def write(root, spec=(), result=(), environment=()):
    parts = (SPEC | dict(spec), RESULT | dict(result), ENVIRONMENT | dict(environment))
    return write_result(root, RunSpec.from_json(parts[0]), RunResult(**parts[1]), Environment(**parts[2]))


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path)
    spec = RunSpec.from_json(SPEC)
    assert path == tmp_path / "official" / "vtab" / "cifar" / f"{spec.run_id}.json"
    (run,) = read_results(tmp_path)
    assert run.spec.to_json() == spec.to_json() and run.path == path and run.official
    assert run.spec.recipe["betas"] == [0.9, 0.999]
    assert run.environment == Environment(**ENVIRONMENT)
    # numbers that JSON does not have
    assert run.result.epoch_losses == [1.5, None] and run.result.head_scores == {"layers.0.q": [1.0, None]}
    assert run.result.accuracy == 0.725 and run.result.masks == RESULT["masks"]
    assert "NaN" not in path.read_text()


def test_the_run_id_is_readable_and_that_of_the_content():
    spec = RunSpec.from_json(SPEC)
    assert spec.run_id.startswith(
        "head-masked-lora-criterion-negative-ne-1-scale-1-vit-base-patch16-224-in21k-test-seed0-"
    )
    again = SPEC | {"method": {"scale": 1, "criterion": "negative", "ne": 1, "name": "head-masked-lora"}}
    assert RunSpec.from_json(again).run_id == spec.run_id  # the order of keys, and 1 for 1.0, change nothing
    others = [{"seed": 1}, {"task": "dtd"}, {"epochs": 99}, {"shots": 1, "list_seed": 0}, {"recipe": {}}]
    digests = {RunSpec.from_json(SPEC | other).run_id[-10:] for other in others} | {spec.run_id[-10:]}
    assert len(digests) == len(others) + 1
    assert "-4shot-list2-seed0-" in RunSpec.from_json(SPEC | {"shots": 4, "list_seed": 2}).run_id
    long = RunSpec.from_json(SPEC | {"method": {"name": "peft", "peft_config": {"target": "x" * 300}}})
    assert len(long.run_id) <= 111 and "/" not in RunSpec.from_json(SPEC | {"backbone": "a/b/c"}).run_id


def test_describe_method():
    assert describe_method({"scale": 0.1, "r": 8.0, "name": "lora", "bias": None}) == "lora r=8 scale=0.1"


def test_dirty_and_partial_runs_lie_elsewhere(tmp_path):
    paths = [
        write(tmp_path, environment={"dirty": True}),
        write(tmp_path, {"seed": 1}, {"partial": True, "accuracy": None}),
        write(tmp_path, {"seed": 2}, environment={"dirty": None, "commit": None}),  # an installed package
    ]
    assert [path.relative_to(tmp_path).parts[0] for path in paths] == ["unofficial", "unofficial", "official"]
    assert [run.spec.seed for run in read_results(tmp_path)] == [2]
    assert {run.spec.seed: run.official for run in read_results(tmp_path, unofficial=True)} == {
        0: False,
        1: False,
        2: True,
    }


def test_an_official_result_is_never_replaced(tmp_path):
    path = write(tmp_path)
    before = path.read_text()
    with pytest.raises(ValueError, match="is not replaced"):
        write(tmp_path, result={"accuracy": 0.1})
    assert path.read_text() == before
    write(tmp_path, result={"accuracy": 0.1, "partial": True})
    unofficial = write(tmp_path, result={"accuracy": 0.2, "partial": True})
    assert read_result(unofficial).result.accuracy == 0.2


def test_finished_runs_are_found(tmp_path):
    spec, environment = RunSpec.from_json(SPEC), Environment(**ENVIRONMENT)
    assert find_result(tmp_path, spec) is None
    write(tmp_path, result={"partial": True})
    assert find_result(tmp_path, spec) is None and find_result(tmp_path, spec, unofficial=True) is None
    write(tmp_path, environment={"dirty": True})
    assert find_result(tmp_path, spec) is None
    assert find_result(tmp_path, spec, environment, unofficial=True).result.accuracy == 0.725
    write(tmp_path)
    assert find_result(tmp_path, spec, environment).path == result_path(tmp_path, spec)
    assert find_result(tmp_path, RunSpec.from_json(SPEC | {"seed": 1})) is None


def test_contents_are_compared_where_both_know_them(tmp_path):
    """Results of earlier versions have only names, labels and sizes."""

    def environment(sha256, content=None):
        part = {"images": 3, "sha256": sha256} | ({} if content is None else {"content_sha256": content})
        return {"data_fingerprint": {"train": part}}

    def find(*found):
        return find_result(tmp_path, RunSpec.from_json(SPEC), Environment(**(ENVIRONMENT | environment(*found))))

    path = write(tmp_path, environment=environment("1"))
    assert find("1") and find("1", "a")
    with pytest.raises(ValueError, match="data_fingerprint"):
        find("2", "a")
    path.unlink()
    write(tmp_path, environment=environment("1", "a"))
    assert find("1") and find("1", "a")
    with pytest.raises(ValueError, match="data_fingerprint.*another folder"):
        find("1", "b")


@pytest.mark.parametrize(
    "other", [{"image_format": "JPEG"}, {"checkpoint_revision": None}, {"data_fingerprint": {"train": "00"}}]
)
def test_a_finished_run_on_other_data_is_an_error(tmp_path, other):
    write(tmp_path)
    with pytest.raises(ValueError, match=f"{next(iter(other))}.*another folder"):
        find_result(tmp_path, RunSpec.from_json(SPEC), Environment(**(ENVIRONMENT | other)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["spec"].pop("seed"), "spec: seed is missing"),
        (lambda d: d["spec"].update(seed="0"), "spec: seed must be int; got str '0'"),
        (lambda d: d["spec"].update(seed=True), "spec: seed must be int; got bool True"),
        (lambda d: d["spec"].update(seed=7), "run_id is '.*', but the spec's is"),
        (lambda d: d["spec"].update(task="../up"), "spec: task must be letters"),
        (lambda d: d["spec"].update(method={"ne": 1}), "spec: method needs a name"),
        (lambda d: d["result"].update(accuracy=72.5), r"result: accuracy must lie in \[0, 1\]; got 72.5"),
        (lambda d: d["result"].update(best_on_test=-0.1), "result: best_on_test must lie"),
        (lambda d: d["result"].update(accuracy=None), "result: accuracy is missing"),
        (lambda d: d["result"].update(masks={"q": [1]}), r"result: masks\['q'\]\[0\] must be bool; got int 1"),
        (lambda d: d["result"].update(epoch_losses=["x"]), r"result: epoch_losses\[0\] must be float"),
        (lambda d: d["result"].update(extra=1), "result: unknown field extra"),
        (lambda d: d["environment"].update(versions={"torch": 2}), r"environment: versions\['torch'\] must be str"),
        (lambda d: d.update(environment=[]), "environment: must be a mapping of fields; got list"),
        (lambda d: d.pop("result"), "result is missing"),
        (lambda d: d.update(format=2), "no result of a run .format must be 1, is 2"),
    ],
)
def test_reading_names_the_file_and_the_field(tmp_path, change, message):
    path = write(tmp_path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"{path.name}: {message}"):
        read_results(tmp_path)


def test_damaged_files_and_missing_folders(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match=path.name):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.*here"):
        read_results(tmp_path / "none" / "here")


def test_what_cannot_be_written_is_refused_before_the_run():
    with pytest.raises(ValueError, match="recipe cannot be written as JSON.*set"):
        RunSpec.from_json(SPEC | {"recipe": {"steps": {1, 2}}})
