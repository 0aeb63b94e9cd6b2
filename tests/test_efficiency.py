"""Settings of speed and of the weights that a bot gets, each against an oracle of its own."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import TrainerCallback

from llmbot.core.config import Config
from llmbot.core.config_io import load_config
from llmbot.core.errors import ConfigError
from llmbot.training.bot_trainer import BotTrainer
from llmbot.training.checkpoints import latest_checkpoint
from llmbot.training.methods import get_method
from llmbot.training.trainer import TrainingResult, prepare_run, run_directory, train

QUIET = Console(quiet=True)
Weights = dict[str, torch.Tensor]


def write_chats(path: Path) -> Path:
    "Eighty conversations in lengths that vary."
    rows = [
        {"messages": [{"role": "user", "content": f"{a} {b}"}, {"role": "assistant", "content": f"{b} {a} " * (1 + n * n)}]}
        for a in ("red", "blue", "green", "grey") for b in ("fish", "bird", "cat", "dog", "cow") for n in range(4)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def recipe(tmp: Path, **changes: object) -> Config:
    settings = {
        "model.preset": "qwen3-0.2m",
        "model.vocab_size": 300,
        "training.method": "sft",
        "training.output_dir": tmp / "bot",
        "training.max_steps": 8,
        "training.learning_rate": 3e-3,
        "training.precision": "fp32",
        "training.logging_steps": 1,
        "data.train": f"[{write_chats(tmp / 'chats.jsonl')}]",
        "data.cache_dir": tmp / "cache",
        "data.max_seq_length": 96,
        **changes,
    }
    return load_config(None, overrides=[f"{k}={v}" for k, v in settings.items()], env={})


def make_trainer(cfg: Config, home: Path) -> BotTrainer:
    "The trainer of a recipe, before training."
    home.mkdir(exist_ok=True)
    method = get_method(cfg.training.method)
    trainer = method.build(prepare_run(cfg, method, home, False, QUIET))
    assert isinstance(trainer, BotTrainer)
    trainer.model.config.use_cache = False
    return trainer


def weights_of(result: TrainingResult) -> Weights:
    return load_file(result.bot / "model.safetensors")


def equal(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Recorder(TrainerCallback):
    "Copies of the trained weights after each step."

    def __init__(self) -> None:
        self.seen: list[Weights] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in model.named_parameters()})


def interrupted(cfg: Config, at: int) -> TrainingResult:
    "The run of `cfg`, stopped and thrown away after the checkpoint of step `at`, and resumed."
    run_dir = run_directory(cfg.training.output_dir)
    whole = train(cfg, console=QUIET)
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if int(checkpoint.name.rsplit("-", 1)[1]) > at:
            shutil.rmtree(checkpoint)
    shutil.rmtree(whole.bot)
    found = latest_checkpoint(run_dir / "checkpoints")
    assert found
    assert found.name == f"checkpoint-{at}"
    return train(cfg, resume=True, console=QUIET)


def test_frozen_weights_stay_bit_equal(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, **{"training.freeze": "['*embed_tokens*', model.layers.0.*]"})
    before = {n: p.detach().clone() for n, p in make_trainer(cfg, tmp_path / "start").model.named_parameters()}
    after = weights_of(train(cfg, console=QUIET))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "embed_tokens" in name or name.startswith("model.layers.0.")}


@pytest.mark.parametrize(
    ("patterns", "message"), [("['*embed_token.*']", "matches no parameter.*model.embed_tokens.weight"), ("['*']", "leave no parameter")]
)
def test_freeze_refuses(tmp_path: Path, patterns: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(recipe(tmp_path, **{"training.freeze": patterns}), console=QUIET)


def test_average_is_the_formula(tmp_path: Path) -> None:
    "The bot gets decay * average + (1 - decay) * weights, over the weights after each step."
    cfg = recipe(tmp_path, **{"training.ema_decay": 0.7})
    trainer, recorder = make_trainer(cfg, tmp_path / "run"), Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    assert len(recorder.seen) == 8
    expected = recorder.seen[0]
    for now in recorder.seen[1:]:
        expected = {name: 0.7 * expected[name] + 0.3 * now[name] for name in now}
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-5, atol=1e-7)
        assert p.ndim == 1 or not torch.equal(p.detach(), recorder.seen[-1][name])


def test_average_survives_a_resume(tmp_path: Path) -> None:
    "Bit-equal to the run that was not interrupted; and a checkpoint that lost its average is passed over."
    changes = {"training.ema_decay": 0.7, "training.save_steps": 3, "training.save_total_limit": 9}
    (tmp_path / "whole").mkdir()
    whole = train(recipe(tmp_path / "whole", **changes), console=QUIET)
    resumed = interrupted(recipe(tmp_path, **changes), at=3)
    assert equal(weights_of(whole), weights_of(resumed))
    [missing] = (resumed.run_dir / "checkpoints").glob("checkpoint-6/average.safetensors")
    missing.unlink()
    shutil.rmtree(resumed.bot)
    shutil.rmtree(resumed.run_dir / "checkpoints" / "checkpoint-8")
    again = train(recipe(tmp_path, **changes), resume=True, console=QUIET)
    assert (again.run_dir / "checkpoints" / "damaged-checkpoint-6").is_dir()
    assert equal(weights_of(whole), weights_of(again))


EVALUATED = {"training.eval_steps": 2, "data.validation_split": 0.3}


def test_evaluation_sees_the_average(tmp_path: Path) -> None:
    "The last evaluation on the way is that of the finished bot."
    result = train(recipe(tmp_path, **EVALUATED, **{"training.ema_decay": 0.5}), console=QUIET)
    losses = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    assert losses[-1] == pytest.approx(result.metrics["validation_loss"], abs=1e-6)


DIVERGING = {**EVALUATED, "training.max_steps": 4, "training.lr_scheduler_type": "constant", "training.warmup_steps": 0,
             "training.learning_rate": 0.1, "training.stop_on_divergence": False, "training.packing": False}  # fmt: skip


def test_bot_gets_the_best_evaluation(tmp_path: Path) -> None:
    "With a rate that climbs out of the valley again, and checkpoints that are long rotated away."
    cfg = recipe(tmp_path, **DIVERGING, **{"training.keep_best": True, "training.save_steps": 1, "training.save_total_limit": 1})
    result = train(cfg, console=QUIET)
    losses = {e["step"]: e["eval_loss"] for e in result.history if "eval_loss" in e}
    best = min(losses, key=lambda step: losses[step])
    assert best < max(losses), "the oracle wants a run whose last evaluation is not its best"
    assert result.metrics["validation_loss"] == pytest.approx(losses[best], abs=1e-6)
    (tmp_path / "short").mkdir()
    short = train(recipe(tmp_path / "short", **(DIVERGING | {"training.max_steps": best})), console=QUIET)
    assert equal(weights_of(result), weights_of(short)), "a run that ends at the best step has the same weights"


def test_best_counts_the_last_weights_too(tmp_path: Path) -> None:
    "A run that only gets better, and ends between two evaluations."
    cfg = recipe(tmp_path, **EVALUATED, **{"training.keep_best": True, "training.max_steps": 5})
    result = train(cfg, console=QUIET)
    steps = [e["step"] for e in result.history if "eval_loss" in e]
    assert steps == [2, 4, 5]
    assert result.metrics["validation_loss"] == min(e["eval_loss"] for e in result.history if "eval_loss" in e)


@pytest.mark.parametrize("patience", [1, 2])
def test_stops_early(tmp_path: Path, patience: int) -> None:
    "After as many evaluations without a new best as the recipe says, counted here by hand."
    cfg = recipe(tmp_path, **(DIVERGING | {"training.early_stopping_patience": patience, "training.max_steps": 60}))
    result = train(cfg, console=QUIET)
    losses = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    best, bad = float("inf"), 0
    for i, loss in enumerate(losses):
        best, bad = (loss, 0) if loss < best else (best, bad + 1)
        assert (bad == patience) == (i == len(losses) - 1)
    assert result.steps == 2 * len(losses) < 60


def test_patience_survives_a_resume(tmp_path: Path) -> None:
    changes = {**DIVERGING, "training.early_stopping_patience": 2, "training.max_steps": 60, "training.save_steps": 1,
               "training.save_total_limit": 99}  # fmt: skip
    (tmp_path / "whole").mkdir()
    whole = train(recipe(tmp_path / "whole", **changes), console=QUIET)
    resumed = interrupted(recipe(tmp_path, **changes), at=whole.steps - 1)
    assert resumed.steps == whole.steps
    assert equal(weights_of(whole), weights_of(resumed))


def test_waiting_for_data_is_measured(tmp_path: Path) -> None:
    "A loader that takes its time shows up, one that does not stays small; evaluation is no training."
    shares = []
    for slow in (False, True):
        cfg = recipe(tmp_path, **{"training.overwrite": True})
        trainer = make_trainer(cfg, tmp_path / f"run-{slow}")
        collate = trainer.data_collator
        spent: list[float] = []

        def slowly(features: Any, collate: Any = collate, spent: list[float] = spent) -> Any:
            import time

            began = time.monotonic()
            while time.monotonic() - began < 0.2:  # busy, as a tokenizer would be
                pass
            spent.append(time.monotonic() - began)
            return collate(features)

        if slow:
            trainer.data_collator = slowly
        trainer.train()
        shares.append(trainer.data_wait_share)
        if slow:
            assert trainer.pace.waited >= 0.2 * 8
        logged = [e["data_wait_share"] for e in trainer.state.log_history if "loss" in e]
        assert len(logged) == 8
        assert all(0 <= share <= 1 for share in logged)
    assert shares[1] > shares[0]
    assert "data_wait_share" in TrainingResult.__dataclass_fields__
