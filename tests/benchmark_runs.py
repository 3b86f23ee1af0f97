"""Made-up results of runs."""

from peft_heads.benchmark.records.run_record import Environment, Run, RunResult, RunSpec


def make_run(
    task="cifar",
    accuracy=0.5,
    seed=0,
    *,
    method=("lora", {}),
    suite="vtab",
    split="test",
    masks=None,
    scores=None,
    best=None,
    partial=False,
    spec=(),
    environment=(),
):
    """Make a run with the given values and few others; `method` holds a name and settings."""
    name, settings = method
    fields = {
        "suite": suite,
        "task": task,
        "method": {"name": name, **settings},
        "backbone": "google/vit-base-patch16-224-in21k",
        "seed": seed,
        "train_split": "train800val200" if split == "test" else "train800",
        "eval_split": split,
        "epochs": 100,
        "recipe": {"learning_rate": 1e-3, "drop_path": 0.1},
        "preprocessing": {"resize": "bicubic", "normalization": "none"},
    }
    return Run(
        RunSpec.from_json(fields | dict(spec)),
        RunResult(
            accuracy=accuracy,
            epoch_losses=[1.0, 0.5],
            seconds=60.0,
            peak_memory_bytes=None,
            trained_parameters=400_000,
            adapter_bytes=2**20,
            head_bytes=2**19,
            masks=masks or {},
            head_scores=scores,
            best_on_test=best,
            partial=partial,
        ),
        Environment(
            **{
                "versions": {"torch": "2.13.0"},
                "commit": "abc",
                "dirty": False,
                "data_fingerprint": {"train": "1f"},
                "image_format": "PNG",
                "checkpoint_revision": "r1",
                "device": "cpu: x86_64",
                **dict(environment),
            }
        ),
    )


def heads(ne, criterion="absolute", **settings):
    return "head-masked-lora", {"ne": ne, "criterion": criterion, **settings}
