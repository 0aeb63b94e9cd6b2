"""Settings of speed and of the weights that a bot gets, each against an oracle of its own."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import recipes
import torch
from accelerate.data_loader import BatchSamplerShard
from recipes import train
from safetensors.torch import load_file
from torch.utils.data import BatchSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from llmbot.core.batching import LengthGroupedRows
from llmbot.core.config import Config
from llmbot.core.errors import ConfigError
from llmbot.core.losses import chunk_loss
from llmbot.core.packing import Collator
from llmbot.training import methods
from llmbot.training.bot_trainer import BotTrainer, Pace
from llmbot.training.checkpoints import latest_checkpoint
from llmbot.training.methods import register_method, training_arguments
from llmbot.training.trainer import TrainingResult, run_directory

Weights = dict[str, torch.Tensor]
recipe = partial(recipes.recipe, rows=recipes.chats(4, (1, 2, 5, 8)), **{
    "training.max_steps": 8, "training.learning_rate": 3e-3, "training.logging_steps": 1, "data.max_seq_length": 96,
})  # fmt: skip


def make_trainer(cfg: Config, home: Path) -> BotTrainer:
    "The trainer of a recipe, before training."
    _, trainer = recipes.built(cfg, home)
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
    whole = train(cfg)
    for checkpoint in (run_dir / "checkpoints").iterdir():
        if int(checkpoint.name.rsplit("-", 1)[1]) > at:
            shutil.rmtree(checkpoint)
    shutil.rmtree(whole.bot)
    found = latest_checkpoint(run_dir / "checkpoints")
    assert found
    assert found.name == f"checkpoint-{at}"
    return train(cfg, resume=True)


def test_frozen_weights_stay_bit_equal(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, **{"training.freeze": "['*embed_tokens*', model.layers.0.*]"})
    before = {n: p.detach().clone() for n, p in make_trainer(cfg, tmp_path / "start").model.named_parameters()}
    after = weights_of(train(cfg))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == {name for name in before if "embed_tokens" in name or name.startswith("model.layers.0.")}


@pytest.mark.parametrize(
    ("patterns", "message"), [("['*embed_token.*']", "matches no parameter.*model.embed_tokens.weight"), ("['*']", "leave no parameter")]
)
def test_freeze_refuses(tmp_path: Path, patterns: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train(recipe(tmp_path, **{"training.freeze": patterns}))


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
    whole = train(recipe(tmp_path / "whole", **changes))
    resumed = interrupted(recipe(tmp_path, **changes), at=3)
    assert equal(weights_of(whole), weights_of(resumed))
    [missing] = (resumed.run_dir / "checkpoints").glob("checkpoint-6/average.safetensors")
    missing.unlink()
    shutil.rmtree(resumed.bot)
    shutil.rmtree(resumed.run_dir / "checkpoints" / "checkpoint-8")
    again = train(recipe(tmp_path, **changes), resume=True)
    assert (again.run_dir / "checkpoints" / "damaged-checkpoint-6").is_dir()
    assert equal(weights_of(whole), weights_of(again))


EVALUATED = {"training.eval_steps": 2, "data.validation_split": 0.3}


def test_evaluation_sees_the_average(tmp_path: Path) -> None:
    "The last evaluation on the way is that of the finished bot."
    result = train(recipe(tmp_path, **EVALUATED, **{"training.ema_decay": 0.5}))
    losses = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    assert losses[-1] == pytest.approx(result.metrics["validation_loss"], abs=1e-6)


DIVERGING = {**EVALUATED, "training.max_steps": 8, "training.lr_scheduler_type": "constant", "training.warmup_steps": 0,
             "training.learning_rate": 0.1, "training.stop_on_divergence": False, "training.packing": False}  # fmt: skip


def test_bot_gets_the_best_evaluation(tmp_path: Path) -> None:
    "With a rate that climbs out of the valley again, and checkpoints that are long rotated away."
    cfg = recipe(tmp_path, **DIVERGING, **{"training.keep_best": True, "training.save_steps": 1, "training.save_total_limit": 1})
    result = train(cfg)
    losses = {e["step"]: e["eval_loss"] for e in result.history if "eval_loss" in e}
    best = min(losses, key=lambda step: losses[step])
    assert best < max(losses), "the oracle wants a run whose last evaluation is not its best"
    assert result.metrics["validation_loss"] == pytest.approx(losses[best], abs=1e-6)
    short = train(recipe(tmp_path / "short", **(DIVERGING | {"training.max_steps": best})))
    assert equal(weights_of(result), weights_of(short)), "a run that ends at the best step has the same weights"


def test_best_counts_the_last_weights_too(tmp_path: Path) -> None:
    "A run that only gets better, and ends between two evaluations."
    cfg = recipe(tmp_path, **EVALUATED, **{"training.keep_best": True, "training.max_steps": 5})
    result = train(cfg)
    steps = [e["step"] for e in result.history if "eval_loss" in e]
    assert steps == [2, 4, 5]
    assert result.metrics["validation_loss"] == min(e["eval_loss"] for e in result.history if "eval_loss" in e)


@pytest.mark.parametrize("patience", [1, 2])
def test_stops_early(tmp_path: Path, patience: int) -> None:
    "After as many evaluations without a new best as the recipe says, counted here by hand."
    cfg = recipe(tmp_path, **(DIVERGING | {"training.early_stopping_patience": patience, "training.max_steps": 60}))
    result = train(cfg)
    losses = [e["eval_loss"] for e in result.history if "eval_loss" in e]
    best, bad = float("inf"), 0
    for i, loss in enumerate(losses):
        best, bad = (loss, 0) if loss < best else (best, bad + 1)
        assert (bad == patience) == (i == len(losses) - 1)
    assert result.steps == 2 * len(losses) < 60


def test_patience_survives_a_resume(tmp_path: Path) -> None:
    changes = {**DIVERGING, "training.early_stopping_patience": 2, "training.max_steps": 60, "training.save_steps": 1,
               "training.save_total_limit": 99}  # fmt: skip
    whole = train(recipe(tmp_path / "whole", **changes))
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


def test_precision_survives_an_evaluation(tmp_path: Path) -> None:
    "An evaluation on the way must not take the bf16 arithmetic away from the steps after it."
    trainer = make_trainer(recipe(tmp_path, **EVALUATED, **{"training.precision": "bf16", "training.max_steps": 4}), tmp_path / "run")
    seen: list[tuple[bool, torch.dtype]] = []
    layer = trainer.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, inputs, output: seen.append((trainer.model.training, output.dtype)))
    trainer.train()
    assert sum(training for training, _ in seen) == 4
    assert {dtype for _, dtype in seen} == {torch.bfloat16}


def gradients(trainer: BotTrainer, features: list[dict[str, Any]], micro: int) -> Weights:
    "Gradients of one optimizer step over `features`, in micro-batches of `micro` rows, by the trainer's own code."
    batches = [trainer.data_collator(features[at : at + micro]) for at in range(0, len(features), micro)]
    trainer.current_gradient_accumulation_steps = len(batches)
    samples, items = trainer.get_batch_samples(iter(batches), len(batches), trainer.args.device)
    trainer.model.zero_grad()
    for inputs in samples:
        trainer.training_step(trainer.model, inputs, items)
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("fused", ["none", "chunked"])
@pytest.mark.parametrize("packing", [True, False])
def test_accumulation_counts_tokens(tmp_path: Path, packing: bool, fused: str) -> None:
    "1 x 8 and 8 x 1 give one gradient, and it is that of the mean over all supervised tokens, written by hand."
    cfg = recipe(tmp_path, **{"training.packing": packing, "training.fused_loss": fused, "data.max_seq_length": 64})
    trainer = make_trainer(cfg, tmp_path / "run")
    trainer.pace = Pace()
    features = [trainer.train_dataset[i] for i in range(8)]
    counts = {sum(label != -100 for label in f["labels"]) for f in features}
    assert len(counts) > 2, "rows of unequal numbers of supervised tokens"
    whole, single = (gradients(trainer, features, micro) for micro in (8, 1))
    batch = trainer.data_collator(features)
    trainer.model.eval()  # the plain forward pass, whatever the loss of training
    logits = trainer.model(input_ids=batch["input_ids"], position_ids=batch.get("position_ids"), use_cache=False).logits
    trainer.model.zero_grad()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    for name, p in trainer.model.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(whole[name], single[name], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(whole[name], p.grad, rtol=1e-4, atol=1e-6)


UNPACKED = {"training.packing": False, "training.num_train_epochs": 2, "training.max_steps": "null", "training.save_steps": 1,
            "training.save_total_limit": 99, "training.gradient_accumulation_steps": 2}  # fmt: skip


@pytest.mark.parametrize(
    "setting", [{"training.max_tokens_per_batch": 200, "training.per_device_batch_size": 12}, {"training.group_by_length": True},
                {"training.dataloader_workers": 2, "training.packing": True}, {"training.fused_loss": "chunked"}]
)  # fmt: skip
def test_resume_in_the_middle_of_an_epoch(tmp_path: Path, setting: dict[str, Any]) -> None:
    "Bit-equal, in the second epoch, with two micro-batches a step."
    whole = train(recipe(tmp_path / "whole", **(UNPACKED | setting)))
    per_epoch = whole.steps // 2
    assert whole.steps == 2 * per_epoch >= 4
    resumed = interrupted(recipe(tmp_path, **(UNPACKED | setting)), at=per_epoch + 1)
    assert resumed.steps == whole.steps
    assert equal(weights_of(whole), weights_of(resumed))
    losses = [recipes.losses(r) for r in (whole, resumed)]
    assert losses[0] == losses[1]


def batches_of(trainer: BotTrainer, epoch: int) -> list[list[list[int]]]:
    "Token ids of each batch of an epoch, padding taken off."
    loader = trainer.get_train_dataloader()
    loader.set_epoch(epoch)
    pad = trainer.data_collator.pad_token_id
    return [[[i for i in row if i != pad] for row in batch["input_ids"].tolist()] for batch in loader]


def test_token_batches_in_the_trainer(tmp_path: Path) -> None:
    "Every row once an epoch, no batch beyond the budget, another order in the next epoch, the same batches."
    cfg = recipe(tmp_path, **{"training.packing": False, "training.max_tokens_per_batch": 200, "training.per_device_batch_size": 12})
    trainer = make_trainer(cfg, tmp_path / "run")
    rows = sorted(row["input_ids"] for row in trainer.train_dataset)
    first, second = batches_of(trainer, 0), batches_of(trainer, 1)
    for epoch in (first, second):
        assert sorted(row for batch in epoch for row in batch) == rows
        assert all(len(batch) * max(map(len, batch)) <= 200 and len(batch) <= 12 for batch in epoch)
    assert first != second
    assert sorted(first) == sorted(second)
    assert {len(batch) for batch in first} != {12}


def test_groups_of_like_length_in_the_trainer(tmp_path: Path) -> None:
    "Less padding than in a random order, every row once, batches that go up and down in length, in another order each epoch."
    spread = []
    for grouped in (False, True):
        cfg = recipe(tmp_path, **{"training.packing": False, "training.group_by_length": grouped, "training.per_device_batch_size": 4})
        trainer = make_trainer(cfg, tmp_path / f"run-{grouped}")
        epoch = batches_of(trainer, 1)
        spread.append(sum(len(batch) * max(map(len, batch)) - sum(map(len, batch)) for batch in epoch))
    assert spread[1] < spread[0] / 2
    assert sorted(row for batch in epoch for row in batch) == sorted(row["input_ids"] for row in trainer.train_dataset)
    lengths, others = ([max(map(len, batch)) for batch in found] for found in (epoch, batches_of(trainer, 2)))
    assert lengths != others
    assert lengths[0] == max(lengths), "what is short of memory fails at once"
    for found in (lengths, others):
        rises = sum(a < b for a, b in zip(found, found[1:], strict=False))
        assert rises >= 3, "rows that are only sorted within stretches rise once a stretch"


def test_groups_of_like_length_for_several_processes(tmp_path: Path) -> None:
    "What two processes take is, step by step, what one takes at the same global batch."
    cfg = recipe(tmp_path, **{"training.packing": False, "training.group_by_length": True, "training.per_device_batch_size": 4,
                              "data.validation_split": 0})  # rows that fill all batches
    trainer = make_trainer(cfg, tmp_path / "run")
    assert isinstance(trainer.rows, LengthGroupedRows)
    trainer.rows.set_epoch(3)
    alone = list(BatchSampler(trainer.rows, 4, drop_last=False))
    ranks = []
    for rank in range(2):
        rows = LengthGroupedRows(trainer.rows.lengths, 4, cfg.training.seed)  # each process draws its own
        rows.set_epoch(3)
        ranks.append(list(BatchSamplerShard(BatchSampler(rows, 2, drop_last=False), 2, rank)))
    assert [sorted(a + b) for a, b in zip(*ranks, strict=True)] == [sorted(batch) for batch in alone]


@pytest.mark.parametrize("order", ["as_given", "short_first"])
def test_token_batches_keep_an_order(tmp_path: Path, order: str) -> None:
    settings = {"training.packing": False, "training.max_tokens_per_batch": 200, "data.order": order, "data.validation_split": 0}
    trainer = make_trainer(recipe(tmp_path, **settings), tmp_path / "run")
    stored = [row["input_ids"] for row in trainer.train_dataset]
    for epoch in (0, 1):
        assert [row for batch in batches_of(trainer, epoch) for row in batch] == stored


def test_budget_below_a_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="longest row alone"):
        train(recipe(tmp_path, **{"training.packing": False, "training.max_tokens_per_batch": 20}))


def test_liger_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run on CUDA"):
        train(recipe(tmp_path, **{"training.fused_loss": "liger", "model.device": "cpu"}))


def test_chunked_loss_learns_the_same(tmp_path: Path) -> None:
    "The same course of the loss as the plain one, with chunks of seven rows."
    losses = []
    for fused in ("none", "chunked"):
        trainer = make_trainer(recipe(tmp_path, **{"training.fused_loss": "none"}), tmp_path / fused)
        if fused == "chunked":
            chunk_loss(trainer.model, chunk=7)
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


@register_method
class Plain:
    "A user's method on a trainer of transformers' own."

    name = "plain"
    data_kind = "chat"

    def learning_rate(self, model: Any, is_new: bool) -> float:
        return 1e-3

    def build(self, run: Any) -> Trainer:
        arguments = TrainingArguments(**training_arguments(run))
        collator = Collator(run.tokenizer.pad_token_id)
        return Trainer(run.model, arguments, train_dataset=run.data.train, data_collator=collator, processing_class=run.tokenizer)


@pytest.mark.parametrize(
    "setting", [{"training.freeze": "['*norm*']"}, {"training.ema_decay": 0.9}, {"training.fused_loss": "chunked"},
                {"training.group_by_length": True, "training.packing": False}]
)  # fmt: skip
def test_a_setting_that_a_trainer_does_not_know_is_refused(tmp_path: Path, setting: dict[str, Any]) -> None:
    name = next(iter(setting)).removeprefix("training.")
    with pytest.raises(ConfigError, match=f"{name} does nothing for 'plain'"):
        train(recipe(tmp_path, **{"training.method": "plain"}, **setting))


def test_compiled_model_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Captured by torch.compile; without its C++ compiler, which takes minutes and is PyTorch's own affair."
    arguments, backends = methods.efficiency_arguments, {False: {}, True: {"torch_compile_backend": "eager"}}
    monkeypatch.setattr(methods, "efficiency_arguments", lambda cfg: arguments(cfg) | backends[cfg.training.torch_compile])
    losses = []
    for compiled in (False, True):
        changes = {"training.torch_compile": compiled, "training.max_steps": 2, "training.packing": False}
        torch._dynamo.utils.counters.clear()
        result = train(recipe(tmp_path / str(compiled), **changes))
        losses.append(recipes.losses(result))
        assert not any("_orig_mod" in name for name in weights_of(result))
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
