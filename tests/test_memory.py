"""Memory that runs out anywhere in a run: what used it, and the changes that help."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import recipes
import torch
from recipes import on, sums, train
from tiny_bots import make_bot

from llmbot.core.config import Config
from llmbot.core.errors import TrainingError
from llmbot.training import bot_trainer, preference_trainer
from llmbot.training.launch import run_directory


def recipe(home: Path, **changes: object) -> Config:
    settings = {"training.max_steps": 4, "training.logging_steps": 1, "training.packing": False, "data.validation_split": 0.2}
    return recipes.recipe(home, sums() if changes.get("training.method") == "dpo" else None, **(settings | changes))


def fails(patch: pytest.MonkeyPatch, place: Any, name: str, call: int) -> None:
    "Let memory run out at one call of a function."
    real, calls = getattr(place, name), [0]

    def short(*arguments: Any, **more: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(*arguments, **more)

    patch.setattr(place, name, short)


def told(cfg: Config) -> str:
    "The diagnosis, which names what was used and three changes."
    with pytest.raises(TrainingError) as error:
        train(cfg)
    said = str(error.value)
    assert isinstance(error.value.__cause__, torch.OutOfMemoryError)
    assert "weights " in said
    assert "MiB less" in said
    return said


def test_in_the_step_of_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, torch.optim.AdamW, "step", 3)
    said = told(recipe(tmp_path, **{"training.per_device_batch_size": 4}))
    assert "Out of memory at step 3, with 4 rows" in said
    assert "training.per_device_batch_size=2" in said or "training.optimizer=adafactor" in said
    assert said.count("MiB less") == 3


@pytest.mark.parametrize(("call", "where"), [(1, "before the training, after step 0"), (2, "evaluation, after step 2"),
                                              (4, "evaluation, after step 4")])  # fmt: skip
def test_in_the_evaluation(tmp_path: Path, call: int, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "Before the training, on the way, and after it; what has not come to its first step leaves no run in the way of the next start."
    fails(monkeypatch, bot_trainer, "heldout_likelihood", call)
    said = told(cfg := recipe(tmp_path, **{"training.eval_steps": 2, "training.per_device_eval_batch_size": 6}))
    assert run_directory(cfg.training.output_dir).exists() == (call > 1)
    assert where in said
    assert "with 6 rows" in said
    assert "training.per_device_eval_batch_size=3" in said
    assert "gradient_checkpointing" not in said


def test_while_the_reference_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fails(monkeypatch, preference_trainer, "model_logps", 1)
    assert "while the reference is computed" in told(recipe(tmp_path, **{"training.method": "dpo", "data.max_seq_length": 128}))


@pytest.mark.parametrize(("method", "way"), [("sft", "training.method=lora"), ("lora", ""), ("dpo", "method.adapter=true")])
def test_an_adapter_is_proposed_where_there_can_be_one(tmp_path: Path, method: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "And batches of pairs are counted in pairs."
    base = make_bot(tmp_path, "base")
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    said = told(recipe(tmp_path, **on(base), **{"training.method": method, "training.per_device_batch_size": 4,
                                                "training.gradient_checkpointing": True, "data.max_seq_length": 128}))  # fmt: skip
    assert (way in said) if way else ("training.method=lora" not in said and "method.adapter" not in said)
    if method != "sft":
        assert "training.per_device_batch_size=2" in said or "per_device_batch_size" not in said


def test_what_a_failed_pass_computed_is_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Before the smaller micro-batches are tried, or they would have no more room than the large one had."
    held: list[Any] = []
    real = bot_trainer.BotTrainer.compute_loss

    def hungry(self: Any, model: Any, inputs: Any, *arguments: Any, **more: Any) -> Any:
        if len(inputs["input_ids"]) > 2:
            activations = torch.zeros(8)
            held.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory.")
        assert all(ref() is None for ref in held)
        return real(self, model, inputs, *arguments, **more)

    monkeypatch.setattr(bot_trainer.BotTrainer, "compute_loss", hungry)
    train(recipe(tmp_path, **{"training.auto_batch_size": True, "training.per_device_batch_size": 8}))
    assert held
