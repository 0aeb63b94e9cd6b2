"""Runs that are killed at random moments, also while they write, end with the bits of a run that nothing happened to."""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import recipes
import torch
from recipes import losses, on, saved, talk, train, watched, write
from rich.console import Console
from safetensors.torch import load_file

from llmbot.core.config import Config
from llmbot.core.config_io import load_config
from llmbot.core.errors import TrainingError
from llmbot.training.bot_trainer import BotTrainer
from llmbot.training.checkpoints import STAGING, checkpoint_fault, checkpoints_in
from llmbot.training.control import Interrupted, Terminated, TrainingControl, TrainingStopped
from llmbot.training.run_files import process_born, read_status
from llmbot.training.self_test import (
    SelfTest,
    differences,
    kill_and_resume,
    self_test,
    start_child,
    to_the_end,
    train_child,
)
from llmbot.training.trainer import run_directory

recipe = partial(recipes.recipe, **{
    "training.max_steps": 9, "training.save_steps": 1, "training.logging_steps": 2, "training.per_device_batch_size": 4,
    "training.packing": False, "data.validation_split": 0, "data.max_seq_length": 48, "monitoring.trackers": "[tensorboard]",
})  # fmt: skip


pytestmark = pytest.mark.usefixtures("forking")


def written(home: Path, **changes: object) -> tuple[Path, Config]:
    "A recipe's file and its config."
    cfg = recipe(home, **changes)
    return saved(cfg), cfg


RECIPES: dict[str, dict[str, object]] = {
    "scratch": {"training.method": "scratch", "training.gradient_accumulation_steps": 2},
    "sft": {"training.max_steps": 20},  # two passes over the data
    "packed": {"training.packing": True, "training.per_device_batch_size": 2, "training.max_steps": 12},
    "streaming": {"data.streaming": True, "training.max_steps": 20},  # the stream ends on the way, and begins again
    "lora": {"training.method": "lora", "lora.dropout": 0.1},
    "dpo": {"training.method": "dpo", "data.max_seq_length": 128},
    "kto": {"training.method": "kto", "data.max_seq_length": 128},
    "grpo": {"training.method": "grpo", "method.reward": "llmbot.monitoring.rewards:exact_answer", "method.max_new_tokens": 4,
             "method.num_generations": 2},
}


def rows_for(method: str) -> list[dict[str, object]]:
    "Sums as pairs, as labelled answers, or as questions with a reference."
    made: list[dict[str, object]] = []
    for a in range(8):
        for b in range(8):
            ask, right, wrong = f"What is {a} + {b}?", str(a + b), str(a + b + 1)
            if method == "dpo":
                made.append({"prompt": ask, "chosen": right, "rejected": wrong})
            elif method == "kto":
                made += [{"prompt": ask, "completion": text, "label": good} for text, good in ((right, True), (wrong, False))]
            else:
                made.append({"prompt": ask, "answer": right})
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bot for the methods that start from one."
    return train(recipe(tmp_path_factory.mktemp("base"), **{"training.max_steps": 2})).bot


def test_two_starts_at_once_into_one_directory(tmp_path: Path) -> None:
    "One of two processes trains, the other is refused in one sentence and harms nothing."
    path, cfg = written(tmp_path, **{"training.max_steps": 100_000})
    command = [recipes.LLMBOT, "train", str(path)]
    both = [subprocess.Popen(command, env=recipes.ENV, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        until = time.monotonic() + 180
        while not (over := [p for p in both if p.poll() is not None]) and time.monotonic() < until:
            time.sleep(0.1)
        (refused,) = over
        (other,) = (p for p in both if p is not refused)
        assert refused.returncode == 5
        assert "Another process trains into" in " ".join(refused.communicate()[1].split())
        run_dir = run_directory(cfg.training.output_dir)
        while not ((status := read_status(run_dir)) and status.step) and time.monotonic() < until:
            time.sleep(0.1)
        other.send_signal(signal.SIGTERM)
        other.communicate(timeout=60)
        assert other.returncode == 143
        assert list((run_dir / "checkpoints").glob("checkpoint-*"))
    finally:
        for process in both:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_killed_at_ten_random_moments_is_bit_equal(tmp_path: Path, base: Path, name: str) -> None:
    "One run in peace, one killed ten times and resumed each time: equal weights, equal losses."
    changes = RECIPES[name]
    if name in ("lora", "dpo", "kto", "grpo"):
        changes = changes | on(base)
    if name in ("dpo", "kto", "grpo"):
        changes = changes | {"rows": rows_for(name)}
    whole, cfg = written(tmp_path / "whole", **changes)
    killed, _ = written(tmp_path / "killed", **changes)
    seconds = to_the_end(whole)
    seed, found = random.randrange(2**32), SelfTest()
    kill_and_resume(killed, Path(cfg.training.output_dir), seconds, 10, random.Random(seed), found)
    assert found.kills == 10
    assert found.runs >= 1
    assert found.differences == [], f"seed {seed}: {found}"


def dying_child(path: str, function: str, call: int) -> None:
    "A run that kills itself at one call of a function of `os`, which is in the middle of writing."
    real, count = getattr(os, function), [0]

    def deadly(*arguments: object, **more: object) -> object:
        count[0] += 1
        if count[0] == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **more)

    setattr(os, function, deadly)
    train_child(path)


@pytest.mark.slow
def test_killed_while_it_writes_is_bit_equal(tmp_path: Path) -> None:
    "Killed in the first flush of a checkpoint, between flush and rename, and after it; nothing half-written is ever taken."
    whole, cfg = written(tmp_path / "whole")
    killed, other = written(tmp_path / "killed")
    to_the_end(whole)
    checkpoints = run_directory(other.training.output_dir) / "checkpoints"
    staged = 0
    for function, call in (("fsync", 12), ("rename", 2), ("fsync", 30), ("rename", 1), ("rename", 3)):
        process = start_child(killed, dying_child, function, call)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        staged += (checkpoints / STAGING).exists()
        assert [checkpoint_fault(p) for p in checkpoints_in(checkpoints)] == [None] * len(checkpoints_in(checkpoints))
    assert staged >= 3, "the kills fell into the writing of checkpoints"
    to_the_end(killed)
    assert list(differences(Path(cfg.training.output_dir), Path(other.training.output_dir))) == []


def test_damaged_checkpoints_are_passed_over_and_said(tmp_path: Path) -> None:
    "A flipped bit, a missing file: the run goes on from the newest whole checkpoint, and ends as if nothing had been."
    whole = train(recipe(tmp_path / "whole"))
    cfg = recipe(tmp_path / "hurt", **{"training.save_total_limit": 9})
    hurt = train(cfg)
    shutil.rmtree(hurt.bot)
    nine, eight, *_ = checkpoints_in(hurt.run_dir / "checkpoints")
    weights = bytearray((nine / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (nine / "model.safetensors").write_bytes(weights)
    (eight / "optimizer.pt").unlink()
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
    train(cfg, resume=True, console=console)
    said = console.export_text()
    assert "passed over checkpoint-9: the content of model.safetensors is not what was written" in said
    assert "passed over checkpoint-8: optimizer.pt is missing" in said
    assert "resuming from checkpoint-7" in said
    assert list(differences(whole.bot, hurt.bot)) == []


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Terminated)])
def test_a_signal_ends_the_step_and_saves(tmp_path: Path, number: int, error: type[BaseException]) -> None:
    "From Python: the exception that one expects, handlers as before, and a run that goes on to the same bits."
    from transformers import TrainerCallback

    class Sender(TrainerCallback):
        def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
            if state.global_step == 4:  # type: ignore[attr-defined]
                os.kill(os.getpid(), number)

    whole = train(recipe(tmp_path / "whole", **{"training.save_steps": 100}))
    cfg, before = recipe(tmp_path / "stopped", **{"training.save_steps": 100}), signal.getsignal(number)
    with pytest.MonkeyPatch.context() as patch:
        watched(patch, Sender())
        with pytest.raises(error):
            train(cfg)
    assert signal.getsignal(number) is before
    assert [p.name for p in checkpoints_in(run_directory(cfg.training.output_dir) / "checkpoints")] == ["checkpoint-5"]
    resumed = train(cfg, resume=True)
    assert list(differences(whole.bot, resumed.bot)) == []


def test_control_from_another_thread(tmp_path: Path) -> None:
    "Pause, ask, change the rate, go on, stop; then the run is resumed with the changed rate."
    cfg = recipe(tmp_path, **{"training.max_steps": 100000, "training.lr_scheduler_type": "constant", "training.warmup_steps": 0,
                              "training.save_steps": 100000, "training.logging_steps": 1})
    control, seen = TrainingControl(), {}

    def steer() -> None:
        while control.step < 2:
            pass
        control.pause()
        seen["answer"] = control.sample("red fish", timeout=120)
        seen["step"] = control.step
        control.set_learning_rate(1e-5)
        control.sample("x", timeout=120)  # served after the rate, in order
        seen["held"] = control.step
        control.resume()
        while control.step < seen["held"] + 3:
            pass
        control.stop()

    thread = threading.Thread(target=steer)
    thread.start()
    with pytest.raises(TrainingStopped, match="--resume"):
        train(cfg, control=control)
    thread.join()
    assert isinstance(seen["answer"], str)
    assert seen["step"] == seen["held"], "no step while paused"
    step = control.step
    result = train(recipe(tmp_path, **{"training.max_steps": step + 2, "training.lr_scheduler_type": "constant", "training.warmup_steps": 0,
                                       "training.save_steps": 100000, "training.logging_steps": 1}), resume=True)
    rates = {e["step"]: e["learning_rate"] for e in result.history if "learning_rate" in e}
    assert rates[seen["held"]] > 1e-4
    assert rates[seen["held"] + 2] == pytest.approx(1e-5)
    assert rates[step + 2] == pytest.approx(1e-5)


def test_finish_writes_the_bot(tmp_path: Path) -> None:
    control = TrainingControl()
    control.finish()
    result = train(recipe(tmp_path), control=control)
    assert result.steps == 1
    assert (result.bot / "config.json").is_file()


def full_disk_child(path: str, limit: int, said: str) -> None:
    "A run for which no file may grow beyond a limit, as on a full disk. What ends it is kept, and the exit code is 5."
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        train(load_config(path, env={}))
    except TrainingError as error:
        Path(said).write_text(str(error))
        sys.exit(5)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [500_000, 900_000])  # model.safetensors does not fit; optimizer.pt does not
def test_full_disk_is_said(tmp_path: Path, limit: int) -> None:
    path, cfg = written(tmp_path)
    (process := start_child(path, full_disk_child, limit, str(tmp_path / "said"))).join()
    assert process.exitcode == 5
    said = (tmp_path / "said").read_text()
    assert "Cannot write a checkpoint" in said
    assert "the file would be larger than the disk or a limit allows" in said, "torch itself says 'unexpected pos'"
    assert "There is no earlier one" in said
    assert not list((run_directory(cfg.training.output_dir) / "checkpoints").glob("*"))


def test_directory_removed_while_training(tmp_path: Path) -> None:
    "The weights in memory are good, so the run goes on, and says what happened; it can be resumed as well."
    from transformers import TrainerCallback

    cfg = recipe(tmp_path)
    run_dir = run_directory(cfg.training.output_dir)

    class Remover(TrainerCallback):
        def on_step_begin(self, args: object, state: object, control: object, **kwargs: object) -> None:
            if state.global_step == 5:  # type: ignore[attr-defined]
                shutil.rmtree(run_dir)

    said = Console(record=True, width=300, file=open(os.devnull, "w"))  # noqa: SIM115
    with pytest.MonkeyPatch.context() as patch:
        watched(patch, Remover())
        first = train(cfg, console=said)
    assert "was removed while training" in said.export_text()
    shutil.rmtree(first.bot)
    assert train(cfg, resume=True).steps == 9


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, **{"data.streaming": True, "training.max_steps": 2})
    first = train(cfg)
    shutil.rmtree(first.bot)
    kept = first.run_dir / "tokenizer" / "tokenizer.json"
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(TrainingError, match="tokenizer, or its chat template, changed"):
        train(cfg, resume=True)


def test_a_streams_changed_file_is_refused(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, **{"data.streaming": True, "training.max_steps": 2})
    first = train(cfg)
    shutil.rmtree(first.bot)
    write(tmp_path / "rows.jsonl", [*recipes.chats(), talk("new", "row")])
    with pytest.raises(TrainingError, match=r"data changed since .*\(another content: .*rows\.jsonl\)"):
        train(cfg, resume=True)


def test_halved_batch_goes_on_at_the_same_global_batch(tmp_path: Path) -> None:
    "The same rows in each step, so the same losses but for rounding."
    whole = train(recipe(tmp_path / "whole", **{"training.logging_steps": 1}))
    cfg = recipe(tmp_path / "half", **{"training.logging_steps": 1, "training.save_total_limit": 9})
    first = train(cfg)
    shutil.rmtree(first.bot)
    for path in checkpoints_in(first.run_dir / "checkpoints")[:5]:
        shutil.rmtree(path)
    halved = {"training.logging_steps": 1, "training.per_device_batch_size": 2, "training.gradient_accumulation_steps": 2}
    resumed = train(recipe(tmp_path / "half", **halved, **{"training.save_total_limit": 9}), resume=True)
    both = [losses(r) for r in (whole, resumed)]
    assert both[0] == pytest.approx(both[1], abs=1e-4)
    assert len(both[0]) == 9


@pytest.mark.slow
def test_self_test_of_a_recipe(tmp_path: Path) -> None:
    seen = self_test(recipe(tmp_path), kills=2, steps=3, seed=3)
    assert seen.passed
    assert seen.kills == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_self_test_that_is_ended_leaves_nothing(tmp_path: Path, number: int) -> None:
    "Neither its directory nor the run that it had started."
    path, _ = written(tmp_path)
    command = [recipes.LLMBOT, "train", str(path), "--self-test"]
    with tempfile.TemporaryDirectory() as short:  # the path of a socket in it may have no more than 107 bytes
        place = Path(short)
        process = subprocess.Popen(command, env=recipes.ENV | {"TMPDIR": short}, stderr=subprocess.PIPE, text=True)
        try:
            while not (found := list(place.glob("llmbot-self-test-*/*/*.run/live/status.json"))) and process.poll() is None:
                time.sleep(0.05)
            run = json.loads(found[0].read_text())["pid"] if found else 0
            process.send_signal(number)
            said = process.communicate(timeout=200)[1]
        finally:
            process.kill()
        assert process.returncode == 128 + number, said
        assert "Traceback" not in said
        assert "--resume" not in said
        assert not list(place.glob("llmbot-self-test-*"))
        assert process_born(run) is None


UNSTEADY = """
import random
from llmbot.training.sft_trainer import SFT


class Unsteady(SFT):
    "A loss with noise that no seed sets."

    name = "unsteady"

    def build(self, run):
        trainer, noise = super().build(run), random.SystemRandom()
        loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, **more: loss(*args, **more) * (1 + noise.random())
        return trainer


class Forgetful(SFT):
    "A loss that grows with the starts of the run, which no checkpoint holds."

    name = "forgetful"

    def build(self, run):
        trainer, starts = super().build(run), run.run_dir / "starts"
        with starts.open("a") as file:
            file.write("x")
        loss, factor = trainer.compute_loss, starts.stat().st_size
        trainer.compute_loss = lambda *args, **more: loss(*args, **more) * factor
        return trainer
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "cause"), [("Unsteady", "no seed sets"), ("Forgetful", "its checkpoints do not hold")])
def test_self_test_finds_a_method_that_does_not_keep_the_promise(tmp_path: Path, method: str, cause: str) -> None:
    "On the command line: exit code 5, the losses that differ, and where to look."
    (tmp_path / "unsteady.py").write_text(UNSTEADY)
    path, _ = written(tmp_path, **{"training.method": f"unsteady:{method}"})
    kills = {"Unsteady": "1", "Forgetful": "6"}[method]  # one alone may come after the last step, where nothing is forgotten
    command = [sys.executable, "-m", "llmbot.app.cli", "train", str(path), "--self-test", "--kills", kills]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    said = " ".join(done.stdout.split())
    assert done.returncode == TrainingError.exit_code, done.stderr
    assert f"FAIL: {kills} kills" in said
    assert "the loss of step" in said
    assert cause in said
    assert "Traceback" not in done.stderr


class Scripted(random.Random):
    "Moments that are given: whether a kill comes early, and how long it waits."

    def __init__(self, early: list[float], waits: list[float]):
        super().__init__()
        self.early, self.waits = iter(early), iter(waits)

    def random(self) -> float:
        return next(self.early)

    def uniform(self, a: float, b: float) -> float:
        return next(self.waits)


@pytest.mark.slow
def test_every_run_that_was_killed_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Also one that ends before all kills are done. However slowly a run starts, a kill that counts finds it at its steps."
    (tmp_path / "unsteady.py").write_text(UNSTEADY)
    monkeypatch.syspath_prepend(tmp_path)
    whole, cfg = written(tmp_path / "whole", **{"training.method": "unsteady:Forgetful"})
    killed, other = written(tmp_path / "killed", **{"training.method": "unsteady:Forgetful"})
    assert to_the_end(whole) > 0
    bot, found = Path(cfg.training.output_dir), SelfTest()
    too_soon, at_its_steps, at_its_end = 0.0, 0.0, 600.0
    moments = Scripted([0.0, 1.0, 1.0, 1.0], [too_soon, at_its_steps, at_its_end, at_its_steps])
    kill_and_resume(killed, bot, 1.0, 2, moments, found)
    assert (found.kills, found.early, found.runs) == (2, 1, 2)
    assert found.differences, "what the method forgot at its one kill was seen"
    assert list(moments.waits) == []
    assert not Path(other.training.output_dir).exists()


def test_a_run_that_diverges_stops_with_a_diagnosis(tmp_path: Path) -> None:
    "Far too high a rate: the run ends, says where, keeps the rows, and no checkpoint has a weight that is no number."
    wild = {"training.learning_rate": 1e4, "training.max_grad_norm": 0, "training.optimizer": "sgd", "training.max_steps": 60}
    cfg = recipe(tmp_path, **wild, **{"training.warmup_steps": 0})
    with pytest.raises(TrainingError, match=r"Stopped at step \d+: the loss") as caught:
        train(cfg)
    run_dir = run_directory(cfg.training.output_dir)
    [path] = run_dir.glob("diverged-at-step-*.json")
    assert str(path) in str(caught.value)
    facts = json.loads(path.read_text())
    assert facts["learning_rate"] > 1000
    assert any(word in text for text in facts["batches"][0]["input_ids"] for word in ("fish", "bird", "cat", "cow", "dog"))
    for checkpoint in checkpoints_in(run_dir / "checkpoints"):
        assert all(t.isfinite().all() for t in load_file(checkpoint / "model.safetensors").values())
    assert f"{checkpoints_in(run_dir / 'checkpoints')[0].name} is from before and whole" in str(caught.value)


def test_a_run_that_diverges_before_its_first_save_says_so(tmp_path: Path) -> None:
    "There is nothing to resume, and nobody is sent to it."
    wild = {"training.learning_rate": 1e4, "training.max_grad_norm": 0, "training.optimizer": "sgd", "training.max_steps": 60}
    cfg = recipe(tmp_path, **wild, **{"training.warmup_steps": 0, "training.save_steps": 60})
    with pytest.raises(TrainingError, match="No checkpoint was saved before") as caught:
        train(cfg)
    assert "--resume" not in str(caught.value)
    assert checkpoints_in(run_directory(cfg.training.output_dir) / "checkpoints") == []


def test_a_weight_that_is_no_number_is_told_with_its_step(tmp_path: Path) -> None:
    "Found when the step is over and is to be saved; its rows, and no others, are kept."
    from transformers import TrainerCallback

    class Poison(TrainerCallback):
        def on_step_end(self, args: object, state: object, control: object, model: torch.nn.Module, **kwargs: object) -> None:
            if state.global_step == 3:  # type: ignore[attr-defined]
                next(model.parameters()).data.fill_(torch.nan)

    cfg = recipe(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        watched(patch, Poison())
        with pytest.raises(TrainingError, match=r"Stopped at step 3: a weight is no number.*checkpoint-2 is from before and whole"):
            train(cfg)
    facts = json.loads((run_directory(cfg.training.output_dir) / "diverged-at-step-3.json").read_text())
    assert len(facts["batches"]) == 1


def starve(patch: pytest.MonkeyPatch, fits: int) -> None:
    "A forward pass that fails above a number of rows, and leaves half-made gradients as a failed backward pass does."
    real = BotTrainer.compute_loss

    def compute_loss(self: BotTrainer, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *args: object, **kwargs: object) -> object:
        if len(inputs["input_ids"]) > fits:
            for p in model.parameters():
                p.grad = torch.full_like(p, 7.0) if p.grad is None else p.grad + 7.0
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried.")
        return real(self, model, inputs, *args, **kwargs)

    patch.setattr(BotTrainer, "compute_loss", compute_loss)


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "With auto_batch_size the same losses and weights but for rounding; without it, figures and three ways out."
    changes = {"training.logging_steps": 1, "training.gradient_accumulation_steps": 2, "training.max_steps": 5}
    whole = train(recipe(tmp_path / "whole", **changes))
    starve(monkeypatch, fits=1)
    less = train(recipe(tmp_path / "less", **changes, **{"training.auto_batch_size": True}))
    both = [losses(r) for r in (whole, less)]
    assert both[0] == pytest.approx(both[1], abs=1e-4)
    left, right = (load_file(r.bot / "model.safetensors") for r in (whole, less))
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=2e-3, rtol=0)
    with pytest.raises(TrainingError, match="Out of memory at step 1, with 4 rows") as caught:
        train(recipe(tmp_path / "off", **changes))
    assert str(caught.value).count("MiB less") == 3
    assert "training.per_device_batch_size=2" in str(caught.value)
