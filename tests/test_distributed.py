"""Two processes on this machine, on CPUs with gloo: the same curve as one, one voice, and one end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import recipes
import shard_worker
import torch
import torch.distributed.checkpoint as dcp
from recipes import on, saved, talk, train, write
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmbot.core.config_io import load_config
from llmbot.core.errors import ConfigError, TrainingError
from llmbot.training.launch import free_port, rank_environment, run_directory

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


# Thirty-seven conversations of very unequal lengths: no number of processes divides them evenly.
COUNTING = [talk(f"count to {n}", " ".join(map(str, range(n)))) for n in range(1, 38)]


def recipe(home: Path, rows: Path, **changes: object) -> Path:
    "A recipe of two epochs and a bit, at a global batch of 8 in one process."
    settings = {
        "training.max_steps": 12, "training.per_device_batch_size": 8, "training.learning_rate": 3e-3, "training.logging_steps": 1,
        "training.packing": False, "data.max_seq_length": 128, "data.validation_split": 0.2, "monitoring.trackers": "[tensorboard]",
    }  # fmt: skip
    return saved(recipes.recipe(home, rows, **(settings | changes)))


def start(path: Path, *options: str, launcher: Sequence[str] = (), cwd: Path | None = None, **environment: str) -> "subprocess.Popen[str]":
    "Train in processes of their own; the recipe's name marks them."
    command = [sys.executable, *(launcher or NPROC), str(path), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | ALONE | environment, cwd=cwd, **pipes)  # type: ignore[call-overload]


def finished(process: "subprocess.Popen[str]", code: int = 0, within: float = 200) -> tuple[str, str]:
    "Standard output and error of a process that ends with `code`."
    try:
        out, err = process.communicate(timeout=within)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.terminate()  # the second signal ends the launcher's processes at once
        raise
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def history(home: Path) -> list[dict[str, float]]:
    "All that a run logged."
    return json.loads((run_directory(home / "bot") / "history.json").read_text())


def curve(home: Path) -> dict[str, list[float]]:
    "Losses and held-out losses, as they were logged."
    names = ("loss", "eval_loss", "validation_loss", "learning_rate")
    return {name: [e[name] for e in history(home) if name in e] for name in names}


def largest_difference(one: Path, other: Path) -> float:
    "Of any weight of two bots."
    a, b = (load_file(home / "bot" / "model.safetensors") for home in (one, other))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data") / "chats.jsonl", COUNTING)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> dict[bool, Path]:
    "Runs of one process, unpacked and packed, which all others are compared with."
    root = tmp_path_factory.mktemp("one")
    homes = {packing: root / str(packing) for packing in (False, True)}
    for packing, home in homes.items():
        train(load_config(recipe(home, chats, **SHAPE[packing]), env={}))
    return homes


SHAPE: dict[bool, dict[str, object]] = {
    False: {"training.eval_steps": 5},
    True: {"training.packing": True, "data.max_seq_length": 96, "training.gradient_accumulation_steps": 2, "training.max_steps": 8,
           "training.per_device_batch_size": 4},
}  # fmt: skip
SHARE = {False: {"training.per_device_batch_size": 4}, True: {"training.per_device_batch_size": 2}}


NPROC = ["-m", "llmbot.app.cli", "train", "--nproc", "2"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmbot.app.cli", "train"]
FSDP2 = str(ROOT / "deploy" / "accelerate" / "fsdp2.yaml")
ACCELERATE = ["-m", "accelerate.commands.launch", "--config_file", FSDP2, "--num_processes", "2", "-m", "llmbot.app.cli", "train"]


def test_two_processes_learn_what_one_does(tmp_path: Path, chats: Path, one: dict[bool, Path]) -> None:
    "Packed rows, accumulated, over epochs that end in the middle of a global batch; one process speaks and logs."
    home = tmp_path / "two"
    out, err = finished(start(recipe(home, chats, **SHAPE[True] | SHARE[True] | {"training.strategy": "ddp"})))
    assert_same_run(home, one[True])
    assert out.count("is trained") == 1
    assert err.count("step 1/") == 1
    (events,) = (run_directory(home / "bot") / "tensorboard").rglob("events.*")
    logged = [event.step for event in EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload().Scalars("train/loss")]
    assert logged == list(range(1, len(curve(home)["loss"]) + 1)), "each step is logged once"


def assert_same_run(home: Path, expected: Path) -> None:
    "Losses, held-out losses, learning rates and weights, within the rounding of sums in another order."
    assert len(curve(home)["loss"]) >= 8
    assert curve(home) == {name: pytest.approx(values, abs=2e-5) for name, values in curve(expected).items()}
    assert largest_difference(expected, home) < 2e-5


def test_labelled_answers_of_two_processes(tmp_path: Path) -> None:
    "KTO: the wrong prompts of the divergence, its mean and the losses are those of the whole batch, so the curve is that of one process."
    rows = [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"}
            for r in recipes.sums(5, 4) for side in ("chosen", "rejected")]  # fmt: skip
    data = write(tmp_path / "labelled.jsonl", rows)
    changes = {"training.method": "kto", "data.validation_split": 0.2, "method.beta": 0.5}
    alone, two = (recipe(tmp_path / name, data, **changes, **more) for name, more in (("one", {}), ("two", SHARE[False])))
    train(load_config(alone, env={}))
    finished(start(two))
    assert_same_run(tmp_path / "two", tmp_path / "one")
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl", "logps/chosen")
    one, other = ([[e[name] for name in names] for e in history(tmp_path / home) if "loss" in e] for home in ("one", "two"))
    assert max(row[3] for row in one) > 1e-3, "the divergence counts"
    for a, b in zip(one, other, strict=True):
        assert b == pytest.approx(a, abs=1e-4)


@pytest.mark.parametrize(
    ("method", "strategy", "message"),
    [("grpo", "auto", "'grpo' trains in one process"), ("kto", "fsdp", "'kto' trains with 'ddp' alone")],
)
def test_what_several_processes_cannot_learn_together(
    tmp_path: Path, method: str, strategy: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    "Refused before data or weights are read, in every process."
    data = write(tmp_path / "rows.jsonl", [{"prompt": "1 + 1", "answer": "2"}])
    changes = {"training.method": method, "training.strategy": strategy, **on(tmp_path)}
    changes |= {"method.reward": "llmbot.monitoring.rewards:exact_answer"} if method == "grpo" else {}
    cfg = load_config(recipe(tmp_path / "two", data, **changes), env={})
    for name, value in rank_environment(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train(cfg)


def the_shards_are_the_bots_weights(home: Path) -> None:
    "The last FSDP2 checkpoint of a run of two processes, read here in one, holds the weights of the bot."
    (parts,) = (run_directory(home / "bot") / "checkpoints").glob("checkpoint-12/pytorch_model_fsdp_0")
    assert len(list(parts.glob("*.distcp"))) == 2
    bot = load_file(home / "bot" / "model.safetensors")
    whole = {"model": {name: torch.empty_like(tensor) for name, tensor in bot.items()}}
    dcp.load(whole, checkpoint_id=parts, no_dist=True)
    for name, tensor in bot.items():
        assert torch.equal(whole["model"][name], tensor)


def test_the_comparison_can_fail(tmp_path: Path, chats: Path, one: dict[bool, Path]) -> None:
    "Another order of rows is seen in the curve and in the weights."
    train(load_config(recipe(tmp_path / "other", chats, **SHAPE[False], **{"training.seed": 7}), env={}))
    assert curve(tmp_path / "other")["loss"] != pytest.approx(curve(one[False])["loss"], abs=1e-3)
    assert largest_difference(one[False], tmp_path / "other") > 1e-3


FAULTY = '''
import os, signal
from transformers import Trainer, TrainerCallback, TrainingArguments
from llmbot.core.errors import DataError
from llmbot.core.packing import Collator
from llmbot.training.methods import training_arguments
from llmbot.training.sft_trainer import SFT


class Fault(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 7 and os.environ.get("RANK") == "1":
            if os.environ.get("FAULT") == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if os.environ.get("FAULT") == "raise":
                raise DataError("a row of the second shard is broken")


class Faulty(SFT):
    name = "faulty"

    def build(self, run):
        trainer = super().build(run)
        trainer.add_callback(Fault())
        return trainer


class Plain(SFT):
    name = "plain"

    def build(self, run):
        args = TrainingArguments(**training_arguments(run))
        return Trainer(model=run.model, args=args, train_dataset=run.data.train, data_collator=Collator(0))
'''


def left_over(path: Path) -> list[int]:
    "Processes that still work on a recipe."
    return [p.pid for p in psutil.process_iter(["cmdline"]) if str(path) in (p.info["cmdline"] or [])]


@pytest.mark.parametrize(
    ("fault", "strategy", "code", "message", "launcher"),
    [
        ("kill", "auto", 5, "Rank 1 of 2 was killed (SIGKILL", TORCHRUN),
        ("raise", "fsdp", 3, "Rank 1 of 2 failed: a row of the second shard is broken", ACCELERATE),
    ],
    ids=["killed-ddp-torchrun", "broken-fsdp2-accelerate"],
)
def test_a_dead_rank_ends_the_run_and_the_run_goes_on(
    tmp_path: Path, chats: Path, one: dict[bool, Path], fault: str, strategy: str, code: int, message: str, launcher: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    "One message, no process left; resumed, by another launcher, the run ends as a run of one process that nothing happened to."
    home = tmp_path / "two"
    changes = {"training.method": "faulty:Faulty", "training.strategy": strategy, "training.save_steps": 5}
    path = recipe(home, chats, **SHAPE[False] | SHARE[False] | changes)
    (home / "faulty.py").write_text(FAULTY)
    _, err = finished(start(path, cwd=home, FAULT=fault), code)
    assert (err.count(message), err.count("error:"), err.count("Traceback")) == (1, 1, 0), err
    assert "with the same command and --resume" in err
    assert not left_over(path)
    assert not (home / "bot").exists()
    if strategy == "auto":
        shutil.copytree(home, tmp_path / "copy")
        one_process_takes_it_over(path, monkeypatch)
        assert_same_run(home, one[False])
        shutil.rmtree(home)
        (tmp_path / "copy").rename(home)
    finished(start(path, "--resume", launcher=launcher, cwd=home))
    assert_same_run(home, one[False])
    if strategy == "fsdp":
        the_shards_are_the_bots_weights(home)


def one_process_takes_it_over(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Go on in one process with a run of two: refused with other rows in a step, and the same run with the same."
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(TrainingError, match="8 rows"):
        train(load_config(path, env={}), resume=True)
    train(load_config(path, overrides=["training.per_device_batch_size=8"], env={}), resume=True)


def test_a_strategy_that_was_dropped_is_told(tmp_path: Path, chats: Path) -> None:
    "transformers' own trainer on CPUs, where Accelerate ignores FSDP2: refused at the start, once, and nothing is left."
    home = tmp_path / "two"
    path = recipe(home, chats, **SHARE[False], **{"training.method": "faulty:Plain", "training.strategy": "fsdp"})
    (home / "faulty.py").write_text(FAULTY)
    _, err = finished(start(path, cwd=home), TrainingError.exit_code)
    assert err.count("asked for is 'fsdp', and Accelerate made it 'ddp'") == 1, err
    assert not list(home.glob("bot*"))


MEETING = """
from pathlib import Path
from llmbot.core.processes import add_up, join_processes, leave_processes

def speaking():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name or "tcpstore" in name]

join_processes("cpu")
assert add_up([1.0]) == [2.0]
assert speaking(), "threads of a meeting have names of their own"
leave_processes()
assert not speaking(), speaking()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_no_thread_outlives_the_meeting() -> None:
    "A thread of C++ that still speaks to others when the interpreter ends would abort a run that is done."
    port = free_port()
    both = [
        subprocess.Popen([sys.executable, "-c", MEETING], env=os.environ | ALONE | rank_environment(number, 2, port))
        for number in range(2)
    ]  # fmt: skip
    assert [process.wait(timeout=120) for process in both] == [0, 0]


def test_interrupted_run_stops_in_every_process(tmp_path: Path, chats: Path) -> None:
    "Ctrl-C reaches the launcher alone, as in a terminal where its processes have sessions of their own."
    path = recipe(tmp_path / "two", chats, **{"training.max_steps": 100_000, "training.save_steps": 2, "training.per_device_batch_size": 1})
    process = start(path)
    checkpoints = run_directory(tmp_path / "two" / "bot") / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("checkpoint-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = finished(process, 130)
    assert err.count("--resume") == 1, err
    assert "Traceback" not in err
    assert not left_over(path)
    assert not (tmp_path / "two" / "bot").exists()


def test_sharded_checkpoint_reloads_elsewhere(tmp_path: Path) -> None:
    "Saved by two processes under `fully_shard`, it loads in one and in two, and the next step is the same in both."
    torch.multiprocessing.spawn(shard_worker.work, args=(2, tmp_path), nprocs=2)
    shard_worker.work(0, 1, tmp_path)
    saved, one, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("saved", "loaded-1", "loaded-2"))
    whole = {"model": {name: torch.empty_like(tensor) for name, tensor in saved.items()}}
    dcp.load(whole, checkpoint_id=tmp_path / "parts", no_dist=True)  # here, without any process group
    for name in saved:
        assert torch.equal(whole["model"][name], saved[name])
        assert not torch.equal(one[name], saved[name]), "a step was taken"
        torch.testing.assert_close(one[name], two[name])
