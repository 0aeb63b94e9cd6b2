"""A quickstart that is stopped inside its stages and between them ends what it does, says how to go on, and goes on from there."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from llmbot.app import quickstart, stages
from llmbot.app.cli import main
from llmbot.training import trainer as orchestrator

STEPS = 4


class Sender(TrainerCallback):
    "Sends this process a signal when it comes to a place, once; a place in training is a stage and a step."

    def __init__(self) -> None:
        self.place, self.number, self.seen = "", 0, [""]

    def at(self, place: str) -> None:
        self.seen.append(place)
        if place == self.place:
            self.place = ""
            os.kill(os.getpid(), self.number)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at(f"{Path(args.output_dir).parent.name} {state.global_step}")


@pytest.fixture
def sender(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sender:
    "Quickstarts with few rows and few steps, in an empty directory, and who sends the signals."
    sender = Sender()

    def passing(module: Any, name: str, place: str) -> None:
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: (sender.at(place), real(*args, **more))[1])

    def few(directory: Path, seed: int, write: Any = quickstart.write_demo_data) -> None:
        sender.at("data")
        for path in write(directory, seed).values():
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(lines[:: max(1, len(lines) // 40)]))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quickstart, "write_demo_data", few)
    for recipe in stages.RECIPES.values():
        monkeypatch.setitem(recipe, "training.max_steps", STEPS)
        monkeypatch.setitem(recipe, "training.per_device_batch_size", 8)
    make = orchestrator.make_callbacks
    monkeypatch.setattr(orchestrator, "make_callbacks", lambda *a: (lambda t, c: (t, [*c, sender]))(*make(*a)))
    passing(quickstart, "stream_answers", "answers")
    passing(orchestrator, "make_model", "preparation")
    passing(orchestrator, "finish", "writing")
    return sender


def start(*arguments: str) -> int:
    "The exit code of `llmbot quickstart`, in this process."
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(SystemExit) as end:
        main(["quickstart", *arguments])
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    return int(end.value.code or 0)


STOPS = [  # where a signal comes, which, and the stages that are finished then
    ("data", signal.SIGTERM, []),
    ("first-bot.run 2", signal.SIGINT, []),
    ("answers", signal.SIGTERM, ["sft"]),
    ("preparation", signal.SIGTERM, ["sft"]),
    ("skilled-bot.run 3", signal.SIGTERM, ["sft"]),
    ("answers", signal.SIGINT, ["sft", "lora"]),
    ("writing", signal.SIGINT, ["sft", "lora"]),
]


def test_stopped_wherever_it_is_and_gone_on_with(sender: Sender, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    "Ctrl-C and SIGTERM while data is written, in training, before, after, and in measuring: the bots of a quickstart left in peace."
    assert start("--dir", "whole") == 0
    home = tmp_path / "stopped"
    for i, (place, number, finished) in enumerate(STOPS):
        sender.place, sender.number, sender.seen = place, number, []
        assert start("--dir", "stopped", *(["--resume"] if i else [])) == 128 + number
        said = " ".join(capsys.readouterr().out.split())
        assert sender.place == "", f"it never came to {place}"
        assert f"Finished: {', '.join(finished) or 'no stage yet'}." in said
        assert said.count("llmbot quickstart --resume --dir stopped") == 1
        assert [stage for stage in stages.STAGES if (home / f"{stage}.json").exists()] == finished
        steps = [p for p in sender.seen if p.split()[0].endswith(".run")]
        assert len(steps) <= STEPS, "one stage at most, and its step was the last"
        if steps and place != "writing":
            done = int(steps[-1].split()[1]) + 1
            assert [p.name for p in (home / steps[-1].split()[0] / "checkpoints").glob(f"*-{done}")] == [f"checkpoint-{done}"]
    assert not (home / "report.html").exists()
    assert start("--dir", "stopped", "--resume") == 0
    assert (home / "report.html").exists()
    for stage, bot in stages.STAGES.items():
        left, right = (load_file(tmp_path / name / bot / "model.safetensors") for name in ("whole", "stopped"))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left), stage
        one, other = (json.loads((tmp_path / name / f"{stage}.json").read_text()) for name in ("whole", "stopped"))
        assert (one["correct"], one["answers"]) == (other["correct"], other["answers"])


def test_a_second_signal_does_not_wait(sender: Sender, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    "Two in the middle of writing data: it ends there, and says that there is nothing to go on with."
    monkeypatch.setattr(quickstart, "write_recipes", lambda *a: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    assert start("--dir", "stopped") == 130
    assert "Stopped before anything was begun: start it anew." in capsys.readouterr().out
    assert start("--dir", "stopped", "--resume") == 5
