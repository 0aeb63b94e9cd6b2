"""Rows, recipes and trainers for the tests of training; a test says what it changes."""

import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from llmbot.core.config import Config
from llmbot.core.config_io import load_config, save_config
from llmbot.training import trainer as orchestrator
from llmbot.training.methods import TrainingRun, get_method
from llmbot.training.trainer import TrainingResult, prepare_run
from llmbot.training.trainer import train as start

QUIET = Console(quiet=True)
train = partial(start, console=QUIET)
LLMBOT = str(Path(sys.executable).with_name("llmbot"))
ENV = {k: v for k, v in os.environ.items() if not k.startswith("LLMBOT_")} | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}


def write(path: Path, rows: Sequence[Any]) -> Path:
    "Rows as JSON lines."
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(question: str, answer: str) -> dict[str, Any]:
    "A conversation of two turns."
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def chats(colours: int = 4, lengths: Sequence[int] = (1, 2, 3)) -> list[dict[str, Any]]:
    "For each of some colours, of five animals, and of the lengths, a conversation whose answer is so many times as long as the shortest."
    return [
        talk(f"{a} {b}" + "?" * n, f"{b} {a}" * times)
        for a in ("red", "blue", "green", "grey", "white")[:colours] for b in ("fish", "bird", "cat", "dog", "cow")
        for n, times in enumerate(lengths)
    ]  # fmt: skip


def sums(first: int = 12, second: int = 8) -> list[dict[str, str]]:
    "Pairs of answers to sums: terse is better than talkative."
    return [{"prompt": f"What is {i} + {j}?", "chosen": f"{i + j}", "rejected": f"Well, I think it is {i + j}."}
            for i in range(first) for j in range(second)]  # fmt: skip


def recipe(home: Path, rows: Sequence[Any] | Path | None = None, **changes: object) -> Config:
    "A small SFT run in a directory, on rows that are written there (or on a file that is there); `changes` are settings by their keys."
    home.mkdir(exist_ok=True)
    data = rows if isinstance(rows, Path) else write(home / "rows.jsonl", chats() if rows is None else rows)
    settings = {
        "model.preset": "qwen3-0.2m", "model.vocab_size": 300, "model.device": "cpu", "training.method": "sft",
        "training.output_dir": home / "bot", "training.precision": "fp32", "data.train": f"[{data}]", "data.cache_dir": home / "cache",
        "data.max_seq_length": 64, "monitoring.trackers": "[]", **changes,
    }  # fmt: skip
    return load_config(None, overrides=[f"{key}={value}" for key, value in settings.items()], env={})


def on(base: Path) -> dict[str, object]:
    "The changes of a recipe that starts from a bot."
    return {"model.base": base, "model.preset": "null", "model.vocab_size": 4096}


def saved(cfg: Config) -> Path:
    "The file of a recipe, beside its bot."
    path = Path(cfg.training.output_dir).with_name("recipe.yaml")
    save_config(cfg, path)
    return path


def built(cfg: Config, home: Path) -> tuple[TrainingRun, Any]:
    "The run of a recipe and its trainer, before the first step."
    home.mkdir(parents=True, exist_ok=True)
    method = get_method(cfg.training.method)
    run = prepare_run(cfg, method, home, False, QUIET)
    return run, method.build(run)


def watched(patch: Any, *callbacks: Any) -> None:
    "Give every run that is started while `patch` holds these callbacks too."
    make = orchestrator.make_callbacks
    patch.setattr(orchestrator, "make_callbacks", lambda *a: (lambda tracker, own: (tracker, [*own, *callbacks]))(*make(*a)))


def losses(result: TrainingResult) -> list[float]:
    "What a run logged in training, in order."
    return [entry["loss"] for entry in result.history if "loss" in entry]
