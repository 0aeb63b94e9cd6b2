"""Runs in processes of their own: watched and steered from here, killed, found again, and gone on with."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import pytest
from pydantic import SecretStr

from llmbot.app.live_run import LiveRun, child_environment, recipe_of, running, start_run
from llmbot.core.bot import is_bot
from llmbot.core.config import Config, DataConfig, ModelConfig, MonitoringConfig, TrainingConfig
from llmbot.core.errors import BotError, TrainingError
from llmbot.training.run_files import live_dir, read_answer


def recipe(home: Path, max_steps: int, name: str = "bot") -> Config:
    rows = [{"prompt": f"Count to {n}.", "completion": " ".join(map(str, range(1, n + 1)))} for n in range(1, 25)]
    (home / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Config(
        model=ModelConfig(preset="qwen3-0.2m", vocab_size=300, device="cpu"),
        training=TrainingConfig(max_steps=max_steps, learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0, logging_steps=1,
                                precision="fp32", per_device_batch_size=2, save_steps=10**6, output_dir=str(home / name)),
        data=DataConfig(train=[str(home / "chats.jsonl")], max_seq_length=64, cache_dir=str(home / "cache")),
    )  # fmt: skip


def until(what: Callable[[], object], seconds: float = 120) -> None:
    "Look until it is so."
    begun = monotonic()
    while not what():
        assert monotonic() - begun < seconds, "it did not come about"


def losses(entries: list[dict[str, float]]) -> list[tuple[float, float]]:
    return [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]


def test_a_run_is_steered_from_here_killed_found_again_and_finished(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, max_steps=10**6)
    run = start_run(cfg)
    assert run.status().state == "waiting"
    with pytest.raises(TrainingError, match="still on"):
        start_run(cfg, resume=True)
    run.pause()  # the command may be there before the run is
    factor = LiveRun(run.run_dir).set_learning_rate(2e-3)  # another handle; done while the run is held
    assert factor == pytest.approx(2)
    status = run.status()
    assert status.state == "paused"
    assert status.step == 1
    assert status.max_steps == 10**6
    assert status.memory_bytes > 10**8
    assert status.learning_rate == pytest.approx(2e-3)
    assert status.pid != os.getpid()
    assert os.getsid(status.pid) == status.pid
    assert isinstance(run.sample("Count to 2."), str)

    box = live_dir(run.run_dir)
    (box / "commands" / "0.json").write_text("{half")
    until(lambda: (box / "answers" / "0.json").exists())
    with pytest.raises(TrainingError, match="no command"):
        read_answer(run.run_dir, "0.json")
    with pytest.raises(TrainingError, match="no learning rate"):
        run.set_learning_rate(float("nan"))
    assert run.status().step == 1  # held all the while

    run.resume()
    until(lambda: run.status().step >= 4 and run.status().seconds_left)
    assert [one.run_dir for one in running(tmp_path)] == [run.run_dir]
    run.stop()
    status = run.wait(60)
    assert status.state == "interrupted"
    assert f"checkpoint-{status.step} is saved" in status.message
    kept = json.loads((run.run_dir / "checkpoints" / f"checkpoint-{status.step}" / "trainer_state.json").read_text())
    assert losses(run.history()) == losses(kept["log_history"])
    assert len(losses(run.history())) == status.step
    assert [e["learning_rate"] for e in run.history() if "loss" in e] == [pytest.approx(1e-3)] + [pytest.approx(2e-3)] * (status.step - 1)
    with pytest.raises(TrainingError, match="is over"):
        run.pause()

    assert recipe_of(run.run_dir) == cfg
    again, stopped_at = start_run(cfg, resume=True), status.step
    until(lambda: again.status().step > stopped_at + 2)
    os.kill(again.status().pid, signal.SIGKILL)
    status = again.wait(60)
    assert status.state == "interrupted"
    assert "killed" in status.message
    cfg.training.max_steps = stopped_at + 3
    last = start_run(cfg, resume=True, in_thread=True)
    assert last.wait(120).state == "finished"
    assert is_bot(last.bot)
    assert last.history() == json.loads((run.run_dir / "history.json").read_text())  # steps made twice are there once
    assert [step for step, _ in losses(last.history())] == list(range(1, stopped_at + 4))
    assert any("resuming from checkpoint" in line for line in last.log())
    before = last.history()
    with pytest.raises(BotError, match="exists already"):
        start_run(cfg)
    assert last.history() == before  # a start that is refused touches nothing


def test_a_run_that_cannot_begin_says_why(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, max_steps=3)
    cfg.data.train = [str(tmp_path / "none.jsonl")]
    for in_thread in (False, True):
        status = start_run(cfg, in_thread=in_thread).wait(120)
        assert status.state == "failed"
        assert "none.jsonl" in status.message
        assert [path.name for path in (tmp_path / "bot.run").iterdir()] == ["live"]  # nothing that a later start would trip over
    cfg.data.train = [str(tmp_path / "chats.jsonl")]
    assert start_run(cfg, in_thread=True).wait(120).state == "finished"


def test_a_child_gets_the_recipe_and_its_secrets_and_no_other_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBOT_TRAINING__SEED", "7")
    cfg = Config(monitoring=MonitoringConfig(sentry_dsn=SecretStr("https://key@sentry.example.org/1")))
    env = child_environment(cfg, "token")
    assert "LLMBOT_TRAINING__SEED" not in env
    assert env["LLMBOT_MONITORING__SENTRY_DSN"] == "https://key@sentry.example.org/1"
    assert env["PATH"] == os.environ["PATH"]
