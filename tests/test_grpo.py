"""GRPO: a bot taught by a careless teacher learns from being checked; what it may get wrong is said in one message."""

import json
import math
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from recipes import built, on, recipe, talk, train, write
from safetensors.torch import load_file

from llmbot.core.chat import ChatFormat
from llmbot.core.config import Config
from llmbot.core.errors import ConfigError, TrainingError
from llmbot.core.model_manager import load_bot
from llmbot.training import grpo_trainer
from llmbot.training.grpo_trainer import GreedyEvaluation
from llmbot.training.trainer import TrainingResult

PAIRS = [(a, b) for a in (1, 2, 3) for b in (1, 3, 5)]
WORDINGS = ("What is {} + {}?", "Add {} and {}.", "{} + {}")
EXACT = "llmbot.monitoring.rewards:exact_answer"
ALONE = {"data.validation": "[]", "data.validation_split": 0}  # nothing is held out
REWARDS = """\
def short(completions): return [1.0]
def nan(completions): return [float("nan")] * len(completions)
def text(completions): return ["good"] * len(completions)
def fails(completions, reference): return [1 / int(wanted != "4") for wanted in reference]
def constant(completions): return [0.5] * len(completions)
def brief(completions, level): return [-float(len(text)) for text in completions]
def needs(completions, difficulty): return [0.0] * len(completions)
NOT_A_FUNCTION = 1
"""


def rows(wordings: tuple[str, ...], off: int | None = None) -> list[dict[str, Any]]:
    "Sums with their answers: as conversations that are `off` by so much, or as questions with a reference."
    each = [(wording.format(a, b), str(a + b + (off or 0)), a) for a, b in PAIRS for wording in wordings]
    return [{"prompt": asked, "answer": said, "level": a} if off is None else talk(asked, said) for asked, said, a in each]


def judged(home: Path, **changes: object) -> Config:
    "A short run of GRPO on the bot of `taught`."
    small = {"training.method": "grpo", "training.output_dir": home / "out", "data.validation": home / "heldout.jsonl",
             "data.max_seq_length": "null", "method.reward": EXACT, "method.max_new_tokens": 4,
             "training.logging_steps": 1, "training.per_device_batch_size": 4, "method.num_generations": 2,
             "training.learning_rate": 1e-3, "training.max_steps": 3}  # fmt: skip
    return recipe(home, home / "ask.jsonl", **(on(home / "careless") | small | changes))


def run(home: Path, resume: bool = False, **changes: object) -> TrainingResult:
    return train(judged(home, **changes), resume=resume)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A directory with a bot that heard the wrong answer of each sum twice as often as the right one."
    home = tmp_path_factory.mktemp("grpo")
    torch.set_num_threads(1)
    right, wrong = write(home / "right.jsonl", rows(WORDINGS, 0)), write(home / "wrong.jsonl", rows(WORDINGS, 1))
    write(home / "ask.jsonl", rows(WORDINGS[:2]))
    write(home / "heldout.jsonl", rows(WORDINGS[2:]))
    (home / "own_rewards.py").write_text(REWARDS)
    train(recipe(home, right, **{
        "model.preset": "null", "model.hidden_size": 64, "model.num_hidden_layers": 2, "model.num_attention_heads": 4,
        "model.max_position_embeddings": 64, "training.output_dir": home / "careless", "training.max_steps": 120,
        "training.per_device_batch_size": 27, "training.packing": False, "data.validation_split": 0,
        "data.train": f"[{right}, {wrong}]", "data.weights": [1, 2],
    }))
    return home


@pytest.fixture
def home(taught: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "The same, in which the test works; what it trains is taken away."
    monkeypatch.chdir(taught)
    sys.modules.pop("own_rewards", None)
    for name in ("out", "out.run"):
        shutil.rmtree(taught / name, ignore_errors=True)
    return taught


def test_it_learns_from_being_checked(home: Path) -> None:
    "Greedy answers to held-out wordings: wrong before, mostly right after, with no answer ever shown."
    result = run(home, **{"training.per_device_batch_size": 72, "method.num_generations": 8, "training.max_steps": 40,
                          "training.learning_rate": 3e-3})
    assert result.metrics["validation_exact_match_before"] <= 0.2
    assert result.metrics["validation_exact_match"] >= 0.6
    assert result.metrics["validation_reward"] == result.metrics["validation_exact_match"]
    first, last = (h for h in (result.history[0], [h for h in result.history if "reward" in h][-1]))
    assert last["reward"] > first["reward"] + 0.15
    for name in ("reward_std", "completions/mean_length", "completions/clipped_ratio", "clip_ratio/region_mean", "frac_reward_zero_std"):
        assert math.isfinite(first[name])


def test_prompts_and_stop_tokens_are_those_that_are_served(home: Path) -> None:
    _, trainer = built(judged(home), home / "out.run")
    trainer.model.train()
    bot = load_bot(home / "careless", device="cpu")
    asked = [dict(row) for row in trainer.train_dataset][:4]
    found = trainer._generate_and_score_completions(asked)
    for row, ids, mask in zip(asked, found["prompt_ids"], found["prompt_mask"], strict=True):
        ours = ids[mask.bool()].tolist()
        assert ours == bot.chat.prompt_ids(row["prompt"])
        assert ours == bot.tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert trainer.eos_token_ids == ChatFormat(bot.tokenizer).stop_token_ids
    for ids, mask in zip(found["completion_ids"], found["completion_mask"], strict=True):
        said = ids[mask.bool()].tolist()
        assert said[-1] in trainer.eos_token_ids or len(said) == 4
        assert not set(said[:-1]) & set(trainer.eos_token_ids)


def test_greedy_answers_in_a_batch_are_those_alone(home: Path) -> None:
    _, trainer = built(judged(home), home / "out.run")
    prompts = [list(ids) for ids in trainer.eval_dataset["prompt_ids"]] + [list(trainer.train_dataset[0]["prompt_ids"])]
    assert len({len(p) for p in prompts}) > 1, "the batch is padded"
    assert trainer.greedy(prompts) == [trainer.greedy([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize(("adapter", "merge"), [(False, False), (True, False), (True, True)])
def test_kl_begins_at_zero_and_grows(adapter: bool, merge: bool, home: Path) -> None:
    "The reference is the bot as it was: no divergence before the first step, some after it."
    result = run(home, **{"method.beta": 0.05, "training.warmup_steps": 0, "training.max_steps": 4, "method.adapter": adapter,
                          "lora.merge": merge, "training.per_device_batch_size": 16})
    kl = [entry["kl"] for entry in result.history if "kl" in entry]
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert max(kl[1:]) > 1e-6
    assert (result.bot / "adapter_config.json").exists() == (adapter and not merge)
    assert json.loads((result.bot / "llmbot.json").read_text())["method"] == "grpo"


@pytest.mark.parametrize(("place", "name", "where"), [
    (torch.optim.AdamW, "step", "at step 1"), (grpo_trainer, "greedy_ids", "in the evaluation before"),
    (GreedyEvaluation, "evaluate", "in the evaluation"), (trl.GRPOTrainer, "_generate_and_score_completions", "at step 1"),
])  # fmt: skip
def test_out_of_memory_counts_the_answers(place: Any, name: str, where: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "The tokens that the diagnosis reckons with are those of the longest prompt and of the longest answer that may be sampled."
    monkeypatch.setattr(place, name, lambda *a, **k: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    cfg = judged(home, **{"method.max_new_tokens": 21, "method.adapter": True, "training.eval_steps": 1})
    with pytest.raises(TrainingError, match=f"Out of memory {where}") as error:
        train(cfg)
    chat = load_bot(home / "careless", device="cpu").chat
    asked = [len(chat.prompt_ids([{"role": "user", "content": row["prompt"]}])) for row in rows(WORDINGS)]
    rows_told, told = re.search(r"with (\d+) rows of (\d+) tokens", str(error.value)).groups()  # type: ignore[union-attr]
    assert min(asked) + 21 <= int(told) <= max(asked) + 21
    assert int(rows_told) >= 4
    assert "method.max_new_tokens=10" in str(error.value)


def test_resumed_in_the_middle_of_a_batch_of_answers(home: Path) -> None:
    "Three steps on each batch of answers, a checkpoint after the fourth, the second epoch begun: bit-equal weights, equal logs."
    more = {"method.num_iterations": 3, "training.max_steps": 16, "training.save_steps": 5, "training.save_total_limit": 9,
            "training.logging_steps": 2, "training.per_device_batch_size": 8}
    whole = run(home, **more)
    weights = load_file(whole.bot / "model.safetensors")
    for at in (5, 15):  # before and after the end of the first epoch, which has 4 batches of 4 prompts: 12 steps
        shutil.rmtree(whole.bot)
        for path in (whole.run_dir / "checkpoints").glob("checkpoint-*"):
            if int(path.name.rsplit("-", 1)[1]) > at:
                shutil.rmtree(path)
        again = run(home, resume=True, **more)
        assert all(torch.equal(value, weights[name]) for name, value in load_file(again.bot / "model.safetensors").items()), at
        pairs = zip(whole.history, again.history, strict=True)
        assert all(a.get("reward") == b.get("reward") and a.get("kl") == b.get("kl") for a, b in pairs)


MISTAKES = {
    "no such module": ({"method.reward": "own_reward:short"}, ["there is no module 'own_reward'"]),
    "no such function": ({"method.reward": "own_rewards:shrot"}, ["the module 'own_rewards' has no 'shrot'"]),
    "no function": ({"method.reward": "own_rewards:NOT_A_FUNCTION"}, ["no function"]),
    "not a name": ({"method.reward": "exact_answer"}, ["MODULE:NAME"]),
    "a column that is not there": ({"method.reward": "own_rewards:needs"}, ["needs 'difficulty'", "level", "reference"]),
    "torn groups": ({"method.num_generations": 3}, ["A step has 4 answers", "num_generations=3", "3 or 6"]),
    "too few prompts": ({"training.per_device_batch_size": 128}, ["18 prompts", "one step takes 64"]),
    "no room for an answer": ({"method.max_new_tokens": 60}, ["method.max_new_tokens is 60", "context of 64"]),
    "no base": ({"model.base": "null", "model.preset": "qwen3-0.2m"}, ["model.base is unset"]),
    "grouped by length": ({"training.group_by_length": "true", "training.packing": "false"}, ["training.group_by_length", "grpo"]),
    "weights without rewards": ({"method.reward_weights": "[1, 2]"}, ["2 weights for 1 rewards"]),
    "no reward": ({"method.reward": "[]"}, ["method.reward"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_recipe_that_cannot_work(name: str, home: Path) -> None:
    changes, words = MISTAKES[name]
    with pytest.raises(ConfigError) as error:
        run(home, **changes)
    for word in words:
        assert word in str(error.value)
    assert not (home / "out.run").exists()


@pytest.mark.parametrize(("reward", "words"), [
    ("short", ["returned 1 numbers for 4 answers"]),
    ("nan", ["returned nan, which is no finite number", "The prompt was"]),
    ("text", ["returned 'good', which is no finite number", "The prompt was"]),
    ("fails", ["ZeroDivisionError", "The prompt was", "3"]),
])
def test_a_reward_that_does_not_keep_its_word(reward: str, words: list[str], home: Path) -> None:
    with pytest.raises(TrainingError) as error:
        run(home, **ALONE, **{"method.reward": f"own_rewards:{reward}", "training.max_steps": 9})
    for word in ["own_rewards:" + reward, *words]:
        assert word in str(error.value)


def test_no_signal_is_said(home: Path) -> None:
    with pytest.warns(UserWarning, match=r"3 batches in a row all 2 answers to each prompt got the same reward \(0\.5"):
        run(home, **ALONE, **{"method.reward": "own_rewards:constant"})


def test_several_rewards_are_weighted(home: Path) -> None:
    "Right is worth 10, each character costs 1; columns of the row come along."
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        result = run(home, **{"method.reward": f"[{EXACT}, own_rewards:brief]", "method.reward_weights": [10, 1],
                              "training.max_steps": 2, "training.per_device_batch_size": 16})
    logged = result.history[0]
    expected = 10 * logged[f"rewards/{EXACT}/mean"] + logged["rewards/own_rewards:brief/mean"]
    assert logged["reward"] == pytest.approx(expected, abs=1e-5)
    assert result.metrics["validation_reward"] == pytest.approx(
        10 * result.metrics["validation_exact_match"] - (result.metrics["validation_answer_tokens"] - 1), abs=1.01)
