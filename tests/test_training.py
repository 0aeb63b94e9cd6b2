"""Training against independent witnesses: a hand-written loop, TRL, and a run that was never killed."""

from functools import partial
from pathlib import Path

import pytest
import recipes
import torch
from recipes import losses, talk, train, write

from llmbot.core.config import Config
from llmbot.core.errors import ConfigError, LLMBotError, TrainingError
from llmbot.training.plan import plan

recipe = partial(recipes.recipe, rows=recipes.chats(5, (1, 2, 3, 4)), **{"training.max_steps": 12})


def bare_losses(cfg: Config, tmp: Path) -> list[float]:
    "The losses of the loop one would write by hand, on the batches that the trainer's own loader gives."
    from transformers import get_scheduler

    run, trainer = recipes.built(cfg, tmp)
    t, model = run.config.training, run.model.train()
    steps, micro = t.max_steps or 0, t.gradient_accumulation_steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=t.learning_rate or 0, betas=(t.adam_beta1, t.adam_beta2), weight_decay=0.0)
    scheduler = get_scheduler("cosine", optimizer, int(-(-t.warmup_steps * steps // 1)), steps)
    found: list[float] = []
    loader = iter(trainer.get_train_dataloader())
    while len(found) < steps:
        batches = []
        for _ in range(micro):
            try:
                batches.append(next(loader))
            except StopIteration:
                break
        if not batches:
            loader = iter(trainer.get_train_dataloader())
            continue
        tokens = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
        total = 0.0
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False).logits
            flat = logits[:, :-1].reshape(-1, logits.shape[-1])
            loss = torch.nn.functional.cross_entropy(flat, batch["labels"][:, 1:].reshape(-1), ignore_index=-100, reduction="sum") / tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        found.append(total)
    return found


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_losses_equal_a_hand_written_loop(tmp_path: Path, packing: bool, accumulation: int) -> None:
    "Step by step, within one pass over the data (a second pass is shuffled by the trainer's own state)."
    changes = {"training.packing": packing, "training.gradient_accumulation_steps": accumulation, "training.logging_steps": 1}
    steps = 3 if packing else 4
    cfg = recipe(tmp_path, **changes, **{"training.max_steps": steps, "training.per_device_batch_size": 3 if packing else 8})
    expected = bare_losses(cfg, tmp_path / "bare")
    logged = losses(train(cfg))
    assert logged == pytest.approx(expected, abs=2e-4)
    assert logged[-1] < logged[0]


def test_held_out_loss_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    "Token-weighted: the same bot measured in batches of 1 and of 7."
    found = []
    for size in (1, 7):
        changes = {"training.per_device_eval_batch_size": size, "data.validation_split": 0.3, "training.max_steps": 2}
        found.append(train(recipe(tmp_path / str(size), **changes, **{"training.packing": False})).metrics["validation_loss"])
    assert found[0] == pytest.approx(found[1], abs=1e-4)


def test_learning_rate_follows_the_clock(tmp_path: Path) -> None:
    "With a budget of minutes the schedule comes down within it, whatever the number of epochs."
    changes = {"training.max_minutes": 0.05, "training.num_train_epochs": 100000, "training.max_steps": "null", "training.logging_steps": 1}
    result = train(recipe(tmp_path, **changes))
    rates = [e["learning_rate"] for e in result.history if "learning_rate" in e]
    assert max(rates) > 10 * rates[-1]
    assert result.seconds < 60


def test_resume_refuses_other_data(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, **{"training.max_steps": 4, "training.save_steps": 2})
    train(cfg)
    import shutil

    shutil.rmtree(tmp_path / "bot")
    write(tmp_path / "rows.jsonl", [*recipes.chats(5, (1, 2, 3, 4)), talk("new", "row")])
    with pytest.raises(TrainingError, match="data changed"):
        train(cfg, resume=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.method": "sfft"}, "Did you mean 'sft'"),
        ({"data.train": "[nowhere.jsonl]"}, "nowhere.jsonl"),
        ({"model.preset": "null", "model.vocab_size": 4096, "model.base": "no-such-bot"}, "No bot at 'no-such-bot'"),
        ({"monitoring.trackers": "[tensorbord]"}, "tensorbord"),
        ({"data.max_seq_length": 4096}, "context"),
    ],
)
def test_mistakes_are_told_before_training(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(LLMBotError, match=message):
        train(recipe(tmp_path, **changes))
    assert not list(tmp_path.glob("bot*")), "nothing is left of a run that never began"


@pytest.mark.parametrize(("changes", "message"), [
    ({}, r"of the 1 row that data.train gives, data.validation_split=0.05 holds back none"),
    ({"data.validation_split": 0, "data.validation": "[held.jsonl]"}, "no row of data.validation can be used"),
])
def test_an_evaluation_on_the_way_needs_rows(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    "A text that is too short to hold anything back, and held-out rows that are all lost."
    (tmp_path / "text.txt").write_text("It was a dark night.")
    held = write(tmp_path / "held.jsonl", [{"text": ""}])
    changes = {key: str(value).replace("held.jsonl", str(held)) for key, value in changes.items()}
    cfg = recipe(tmp_path, rows=tmp_path / "text.txt", **{"training.method": "scratch", "training.eval_steps": 2, **changes})
    for start in (plan, train):
        with pytest.raises(ConfigError, match=message) as error:
            start(cfg)
    assert "drop training.eval_steps" in str(error.value)
    assert not list(tmp_path.glob("bot*"))


def test_output_directory_that_cannot_be_written(tmp_path: Path) -> None:
    "A path through a file stands for every place that cannot be written, also for root."
    (tmp_path / "file").write_text("")
    with pytest.raises(LLMBotError, match="Cannot write"):
        train(recipe(tmp_path, **{"training.output_dir": tmp_path / "file" / "bot"}))


def test_answers_must_be_supervised(tmp_path: Path) -> None:
    "Rows without an assistant turn are counted as lost, and nothing is trained."
    path = tmp_path / "questions.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hello?"}]}\n')
    with pytest.raises(LLMBotError, match="Nothing is left to train on"):
        train(recipe(tmp_path, **{"data.train": f"[{path}]"}))


def test_tensorboard_holds_the_history(tmp_path: Path) -> None:
    "TensorBoard's own reader finds every loss that the trainer logged, step by step, and the held-out figures."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(recipe(tmp_path, **{"training.logging_steps": 2, "data.validation_split": 0.3, "monitoring.trackers": "[tensorboard]"}))
    events = EventAccumulator(str(result.run_dir / "tensorboard" / "bot"), size_guidance={"scalars": 0}).Reload()
    logged = [(e["step"], e["loss"]) for e in result.history if "loss" in e]
    assert [e.step for e in events.Scalars("train/loss")] == [step for step, _ in logged]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx([loss for _, loss in logged])
    assert events.Scalars("validation/loss")[-1].value == pytest.approx(result.metrics["validation_loss"])


def test_streaming_trains_for_a_number_of_steps(tmp_path: Path) -> None:
    "Data that is not held in memory has no length, so the recipe must say how long to train."
    changes = {"data.streaming": True, "data.validation_split": 0}
    result = train(recipe(tmp_path, **changes))
    assert result.steps == 12
    assert result.history[-2]["loss"] < result.history[0]["loss"]
    with pytest.raises(LLMBotError, match="max_steps"):
        train(recipe(tmp_path, **changes, **{"training.max_steps": "null", "training.output_dir": tmp_path / "endless"}))
