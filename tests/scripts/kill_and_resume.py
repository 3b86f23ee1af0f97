"""Kill training runs with SIGKILL at random moments, resume them, and compare them with the undisturbed run.

    python tests/scripts/kill_and_resume.py --runs 50 --seed 0

Every run of a tiny ViT is killed several times, at a random time, in the middle of a random optimizer step or in a
random one of its writes (before it, with a part of it done, after it), and resumed from `last_complete_checkpoint`
until it ends. A first run is killed once in every phase and once in every file of a checkpoint. Masks, head scores and
trained weights must be those of the undisturbed run, bit for bit, and no complete checkpoint may be passed over: exit
code 1 if not.

Importing torch and transformers takes several seconds, such a run one. So this process imports them once, and forks
the processes that train and are killed. It never computes with torch itself: threads would not survive the fork.
"""

import argparse
import ctypes
import functools
import gc
import itertools
import math
import mmap
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path


os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import matplotlib.backends.backend_agg
import matplotlib.figure  # noqa: F401  both for the heat map, here rather than in every process
import peft
import safetensors.numpy
import safetensors.torch
import tiny
import torch
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from peft_heads import HeadMaskedLoraConfig, TaylorHeadScorer, get_head_masks, last_complete_checkpoint
from peft_heads.adapter_folder.atomic import write_atomically


STEPS, WINDOW = 32, range(9, 17)  # 4 epochs of 8 steps; the heads are selected after the second
WRITES_PER_CHECKPOINT = 11
# elsewhere: in the files of the selection, or after training
PHASES = ("start-up", "before the window", "in the window", "after the window", "in a checkpoint", "elsewhere")


@dataclass(frozen=True)
class Kill:
    """When a process dies; without any value it survives."""

    step: int | None = None  # in the middle of that optimizer step, or …
    seconds: float | None = None  # … this long after its beginning (for step 0: the process's)
    write: int | None = None  # number of the write to its output folder
    done: float = 1.0  # share of that write that is done


class Place(ctypes.Structure):
    """What a process is doing, in memory shared with its parent, who can still read it after the kill."""

    _fields_ = (("step", ctypes.c_int), ("last_saved", ctypes.c_int), ("doing", ctypes.c_char * 100))

    @property
    def file(self) -> str:
        """Of a checkpoint, what was being written."""
        folder, _, name = self.doing.decode().partition("/")
        return f"in {name}" if name else "between files" if folder == "checkpoint" else "while an old one was deleted"

    @property
    def phase(self) -> str:
        doing = self.doing.decode()
        if doing.startswith("checkpoint"):
            return "in a checkpoint"
        if doing != "training":
            return doing if doing in PHASES else "elsewhere"
        when = "before" if self.step < WINDOW.start else "in" if self.step in WINDOW else "after"
        return f"{when} the window"


# The process that trains


def train(folder: Path, result: Path, checkpoint: str | None, kill: Kill, place: Place, **arguments) -> None:
    count_writes(folder, kill, place)
    model = peft.get_peft_model(tiny.make("vit"), HeadMaskedLoraConfig(ne=1, lora_dropout=0.1))
    args = TrainingArguments(
        str(folder),
        num_train_epochs=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        **arguments,
    )
    callbacks = [TaylorHeadScorer(warmup_epochs=2), Report(kill, place)]
    Trainer(model, args, train_dataset=tiny.examples(), callbacks=callbacks).train(resume_from_checkpoint=checkpoint)
    weights = {f"weight {name}": p.detach() for name, p in model.named_parameters() if p.requires_grad}
    masks = {f"mask {name}": mask for name, mask in get_head_masks(model).items()}
    write_atomically(result, safetensors.torch.save(weights | masks))


class Report(TrainerCallback):
    def __init__(self, kill, place):
        self.kill, self.place = kill, place

    def on_step_begin(self, args, state, control, **kwargs):
        self.place.step, self.place.doing = state.global_step + 1, b"training"

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.kill.seconds is None and self.kill.step == self.place.step:
            die()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            self.place.doing = b"checkpoint"

    def on_save(self, args, state, control, **kwargs):
        self.place.last_saved, self.place.doing = state.global_step, b"training"

    def on_train_end(self, args, state, control, **kwargs):
        self.place.doing = b"elsewhere"


def count_writes(folder: Path, kill: Kill, place: Place) -> None:
    """Let this process die in its `kill.write`-th write to `folder`."""
    count = itertools.count(1)

    def patch(owner, name: str, path_of: Callable, do_a_part: Callable) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def patched(*args, **kwargs):
            path = Path(path_of(*args))
            if folder not in path.parents:
                return original(*args, **kwargs)
            doing = place.doing
            place.doing = str(path.relative_to(folder)).encode()
            write = functools.partial(original, *args, **kwargs)
            if next(count) == kill.write:
                if 0 < kill.done < 1:
                    do_a_part(write, kill.done, path)
                elif kill.done == 1:
                    write()
                die()
            result = write()
            place.doing = doing
            return result

        setattr(owner, name, patched)

    patch(torch, "save", lambda content, path, *_: path, write_a_part)
    patch(peft.peft_model, "safe_save_file", lambda tensors, path, *_: path, write_a_part)
    patch(peft.PeftConfig, "save_pretrained", lambda config, path: Path(path, "adapter_config.json"), write_a_part)
    patch(TrainerState, "save_to_json", lambda state, path: path, write_a_part)
    patch(os, "replace", lambda temporary, path: path, replace_nothing)
    patch(shutil, "rmtree", lambda path, *_, **__: path, remove_a_part)


def write_a_part(write: Callable, share: float, path: Path) -> None:
    write()
    os.truncate(path, int(share * path.stat().st_size))


def replace_nothing(write: Callable, share: float, path: Path) -> None:
    """Die before renaming; the temporary file stays behind, since a renaming cannot be half done."""


def remove_a_part(write: Callable, share: float, path: Path) -> None:
    files = list(path.iterdir())
    for file in files[: math.ceil(share * len(files))]:
        file.unlink()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# The process that kills


def fork(kill: Kill, place: Place, log: Path, **arguments) -> bool:
    """Train in a process of its own; return whether it finished."""
    place.step, place.doing = 0, b"start-up"
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for stream in (1, 2):
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            train(kill=kill, place=place, **arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if kill.seconds is not None:
        while place.step < kill.step and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        time.sleep(kill.seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        sys.exit(f"a training process has failed:\n{log.read_text()[-5000:]}")
    return os.WIFEXITED(status)


def run(folder: Path, kills: Callable[[int], Kill], place: Place, counts: Counter, **arguments) -> dict:
    """Train, be killed and resume until the end; return the outcome. `kills` returns the next kill from a step on."""
    place.last_saved = 0
    result = folder.with_suffix(".safetensors")
    while True:
        with warnings.catch_warnings(record=True) as skipped:
            warnings.simplefilter("always")
            checkpoint = last_complete_checkpoint(folder)
        counts["checkpoints skipped as incomplete"] += len(skipped)
        step = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
        counts["complete checkpoints passed over"] += step < place.last_saved
        kill = kills(step)
        log = folder.with_suffix(".log")
        if fork(kill, place, log, folder=folder, result=result, checkpoint=checkpoint, **arguments):
            break
        counts["kills"] += 1
        counts["kills at a random time"] += kill.seconds is not None
        counts[f"kills {place.phase}"] += 1
        if place.phase == "in a checkpoint":
            counts[f"kills {place.file}"] += 1
    tensors = {name: array.tobytes() for name, array in safetensors.numpy.load_file(result).items()}
    return {
        "masks": {name: value for name, value in tensors.items() if name.startswith("mask ")},
        "weights": {name: value for name, value in tensors.items() if name.startswith("weight ")},
        "head scores": (folder / "head_scores.json").read_bytes(),
    }


def one_after_another(kills: Iterable[Kill]) -> Callable[[int], Kill]:
    kills = iter(kills)
    return lambda step: next(kills, Kill())


def at_random(rng: random.Random, seconds: float, save_steps: int) -> Callable[[int], Kill]:
    """Return one to eight kills, each soon after the step of resumption; a step takes about `seconds`."""
    left = iter(range(rng.randint(1, 8)))

    def kills(resumed: int) -> Kill:
        if next(left, None) is None:
            return Kill()
        steps = rng.randint(1, 10)
        writes = WRITES_PER_CHECKPOINT * math.ceil(steps / save_steps)
        return rng.choice(
            [
                Kill(step=0, seconds=rng.uniform(0, 4 * seconds)),
                Kill(step=min(resumed + steps, STEPS), seconds=rng.uniform(0, 2 * seconds)),
                Kill(step=min(resumed + steps, STEPS)),
                Kill(write=rng.randint(1, writes), done=rng.choice([0, rng.random(), 1])),
            ]
        )

    return kills


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=50, help="how many runs are killed at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="a new folder for the runs, which is kept; default: a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return interrupt(options, options.work or Path(temporary, "runs"))


def interrupt(options: argparse.Namespace, work: Path) -> int:
    torch.set_num_threads(1)
    work.mkdir(parents=True)
    gc.freeze()  # keeps imported objects from being collected, and so copied, in every process
    rng, counts = random.Random(options.seed), Counter()
    place = Place.from_buffer(mmap.mmap(-1, ctypes.sizeof(Place)))
    every_step = {"save_steps": 1, "save_total_limit": 2}
    start = time.monotonic()
    expected = run(work / "undisturbed", one_after_another([]), place, counts, **every_step)
    seconds = (time.monotonic() - start) / STEPS

    everywhere = [Kill(step=4), Kill(step=12)]
    everywhere += [Kill(write=number, done=0.5) for number in range(1, WRITES_PER_CHECKPOINT + 2)]
    everywhere += [Kill(step=20)]
    jobs = [(one_after_another(everywhere), every_step)]
    for _ in range(options.runs):
        save = {"save_steps": rng.randint(1, 4), "save_total_limit": rng.choice([1, 2, None])}
        jobs.append((at_random(rng, seconds, save["save_steps"]), save))
    for number, (kills, save) in enumerate(jobs):
        actual = run(work / f"run-{number}", kills, place, counts, **save)
        for name, value in expected.items():
            counts[f"runs with other {name}"] += actual[name] != value

    print(f"  {'runs':45} {len(jobs):5}")
    for name in ("kills", *(f"kills {phase}" for phase in PHASES)):
        print(f"  {name:45} {counts.pop(name, 0):5}")
    for name, count in sorted(counts.items()):
        print(f"  {name:45} {count:5}")
    return int(any(count for name, count in counts.items() if "other" in name or "passed over" in name))


if __name__ == "__main__":
    sys.exit(main())
