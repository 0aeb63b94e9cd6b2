"""Preferences: the data kinds, DPO against TRL and closed forms, the reference's cache, collapse, and mistakes told in time."""

import copy
import csv
import io
import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import recipes
import torch
from recipes import built, losses, on, sums, talk, train, watched, write
from rich.console import Console
from safetensors.torch import load_file
from tiny_bots import make_bot
from transformers import TrainerCallback

from llmbot.core.chat import ChatFormat, attach_chat_template
from llmbot.core.config import Config, DataConfig
from llmbot.core.data_processor import prepare_data
from llmbot.core.errors import LLMBotError
from llmbot.core.model_manager import load_bot
from llmbot.monitoring.experiment_tracker import TrackerGroup
from llmbot.training.preference_trainer import PreferenceTrainer, pair_metrics

recipe = partial(recipes.recipe, rows=sums(), **{
    "training.method": "dpo", "training.max_steps": 6, "training.learning_rate": 1e-3, "training.logging_steps": 2,
    "data.validation_split": 0.2, "data.max_seq_length": 128,
})  # fmt: skip


def disturb(model: torch.nn.Module, seed: int = 0) -> None:
    "Move a model away from its reference."
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


# --- DPO against TRL ---------------------------------------------------------------------------------------------------


def trl_trainer(cfg: Config, run: Any, policy: torch.nn.Module, reference: torch.nn.Module, tmp: Path) -> Any:
    "TRL's DPOTrainer with the same settings on the same conversations."
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    own = run.settings
    sft = {"loss_type": [own.loss, "sft"], "loss_weights": [1.0, own.sft_weight]} if own.sft_weight else {"loss_type": [own.loss]}
    rows = [{"prompt": [{"role": "user", "content": r["prompt"]}], **{
        side: [{"role": "assistant", "content": r[side]}] for side in ("chosen", "rejected")}} for r in sums()]  # fmt: skip
    args = DPOConfig(output_dir=str(tmp / "trl"), beta=own.beta, label_smoothing=own.label_smoothing, report_to="none", use_cpu=True,
                     bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False, max_length=None, **sft)  # fmt: skip
    return DPOTrainer(model=policy, ref_model=reference, args=args, train_dataset=Dataset.from_list(rows), processing_class=run.tokenizer)


@pytest.mark.parametrize(
    "method",
    [
        {"loss": "sigmoid"},
        {"loss": "ipo", "beta": 0.5},
        {"loss": "hinge"},
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss": "sigmoid", "sft_weight": 0.3},
    ],
)
def test_loss_gradient_and_figures_equal_trls(tmp_path: Path, method: dict[str, object]) -> None:
    "Same policy, same reference, same pairs: the loss, every gradient, rewards, margins, accuracies and log-probabilities."
    cfg = recipe(tmp_path, **{"data.validation_split": 0, **{f"method.{k}": v for k, v in method.items()}})
    run, ours = built(cfg, tmp_path / "run")
    policy, reference = copy.deepcopy(run.model), copy.deepcopy(run.model)
    for model in (run.model, policy):
        disturb(model)
    trl = trl_trainer(cfg, run, policy, reference, tmp_path)
    rows = [ours.train_dataset[i] for i in (0, 5, 23, 60, 95)]

    newline = run.tokenizer("\n").input_ids  # behind the stop token in ChatML: TRL learns it too, no backend ever writes it
    assert [trl.train_dataset[i]["prompt_ids"] for i in (0, 5)] == [r["prompt_ids"] for r in rows[:2]]
    assert [trl.train_dataset[i]["chosen_ids"] for i in (0, 5)] == [r["chosen_ids"] + newline for r in rows[:2]]

    batch = trl.data_collator([{k: r[k] for k in ("prompt_ids", "chosen_ids", "rejected_ids")} for r in rows])
    theirs = trl.compute_loss(trl.model.train(), batch)
    theirs.backward()
    loss = ours.compute_loss(ours.model.train(), ours.data_collator(rows))
    loss.backward()
    assert loss.item() == pytest.approx(theirs.item(), rel=1e-5)
    expected = dict(policy.named_parameters())
    for name, parameter in run.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-6, msg=name)
    figures = {name: values[-1] for name, values in trl._metrics["train"].items()}
    logged = pair_metrics(ours.sums.tolist())
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen", "logps/rejected"):
        assert logged[name] == pytest.approx(figures[name], rel=1e-4, abs=1e-5), name


def test_policy_that_is_its_reference_has_loss_ln_2(tmp_path: Path) -> None:
    run, trainer = built(recipe(tmp_path), tmp_path / "run")
    metrics = trainer.heldout_metrics(run.data.validation)
    assert metrics["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert metrics["logps/chosen_change"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("reference", ["precomputed", "frozen"])
def test_every_reference_gives_the_same_losses(tmp_path: Path, reference: str) -> None:
    "A reference that is computed before, and one that stands beside the policy; held against a bare loop."
    cfg = recipe(tmp_path, **{"method.reference": reference, "data.validation_split": 0, "training.logging_steps": 1})
    run, trainer = built(cfg, tmp_path / "bare")
    policy, frozen = copy.deepcopy(run.model), copy.deepcopy(run.model)
    bare, optimizer = [], torch.optim.AdamW(policy.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)

    def logps(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)].sum()

    trainer.create_optimizer_and_scheduler(6)
    for batch in list(trainer.get_train_dataloader())[:6]:
        rate = trainer.lr_scheduler.get_last_lr()[0]
        optimizer.param_groups[0]["lr"] = rate
        ratios = [[logps(policy, *side) - logps(frozen, *side).detach() for side in pair] for pair in split_pairs(batch)]
        delta = torch.stack([chosen - rejected for chosen, rejected in ratios])
        loss = -torch.nn.functional.logsigmoid(0.1 * delta).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        trainer.optimizer.step()  # without gradients: moves nothing, and lets the schedule go on
        trainer.lr_scheduler.step()
        bare.append(loss.item())
    result = train(cfg)
    assert losses(result) == pytest.approx(bare, abs=1e-4)


def split_pairs(batch: dict[str, torch.Tensor]) -> list[tuple[tuple[list[int], list[int]], ...]]:
    "Prompt and answer of both sides of each pair, out of the labels."
    sides = []
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        start = next(i for i, label in enumerate(labels) if label >= 0)
        sides.append((ids[:start], [label for label in labels if label >= 0]))
    return list(zip(sides[0::2], sides[1::2], strict=True))


def test_accumulation_and_batches_change_nothing(tmp_path: Path) -> None:
    "1 x 8 and 4 x 2 pairs give one gradient, SFT term included; held-out figures do not depend on the batch size."
    grads, figures = [], []
    for micro in (8, 2):
        changes = {"method.sft_weight": 0.5, "training.per_device_batch_size": micro, "training.gradient_accumulation_steps": 8 // micro}
        run, trainer = built(recipe(tmp_path, **changes), tmp_path / f"run{micro}")
        disturb(run.model)
        rows = [run.data.train[i] for i in range(8)]
        batches = [trainer.data_collator(rows[i : i + micro]) for i in range(0, 8, micro)]
        items = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        for batch in batches:
            trainer.compute_loss(run.model.train(), batch, num_items_in_batch=items).backward()
        grads.append(torch.cat([p.grad.flatten() for p in run.model.parameters() if p.grad is not None]))
        figures.append(trainer.heldout_metrics(run.data.validation))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
    assert figures[0] == pytest.approx(figures[1], rel=1e-4, abs=1e-5)


# --- training ----------------------------------------------------------------------------------------------------------


def test_a_step_that_is_made_again_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Out of memory in the second micro-batch of the first step: pairs, tokens and rewards of the report are those of a run with room."
    changes = {"training.gradient_accumulation_steps": 2, "training.per_device_batch_size": 4, "training.max_steps": 2,
               "training.logging_steps": 1, "training.auto_batch_size": True}  # fmt: skip
    real, log, calls, pairs = PreferenceTrainer.compute_loss, PreferenceTrainer.log, [0], []

    def report(self: PreferenceTrainer, logs: dict[str, float], *args: Any) -> None:
        if "loss" in logs and self.sums is not None:
            pairs.append((self.sums[0].item(), self.tokens_seen))
        log(self, logs, *args)

    monkeypatch.setattr(PreferenceTrainer, "log", report)

    def starved(self: PreferenceTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = real(self, *args, **kwargs)
        calls[0] += 1
        if calls[0] == 2:
            raise MemoryError
        return loss

    whole = train(recipe(tmp_path, **changes))
    monkeypatch.setattr(PreferenceTrainer, "compute_loss", starved)
    less = train(recipe(tmp_path, **changes, **{"training.output_dir": tmp_path / "less"}))
    assert calls[0] == 2 + 4 + 4, "one pass too many, and both steps in halves"
    assert [count for count, _ in pairs] == [8.0] * 4
    assert pairs[2:] == pairs[:2], "tokens too"
    names = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected")
    one, other = ([[e[name] for name in names] for e in result.history if "loss" in e] for result in (whole, less))
    assert len(one) == 2
    for a, b in zip(one, other, strict=True):
        assert b == pytest.approx(a, abs=1e-4)


def test_held_out_accuracy_rises(tmp_path: Path) -> None:
    "What was learned from some questions holds for others: the margin opens, and the talkative answer loses."
    result = train(recipe(tmp_path, **{"training.max_steps": 16, "training.eval_steps": 8}))
    before, after = (
        {k.removeprefix("validation_").removesuffix(end): v for k, v in result.metrics.items() if k.endswith("_before") == bool(end)}
        for end in ("_before", "")
    )
    assert before["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert after["loss"] < 0.2
    assert after["rewards/accuracies"] > 0.95
    assert after["rewards/margins"] > 1 > 0.01 > abs(before["rewards/margins"])
    assert any("eval_rewards/margins" in entry for entry in result.history)
    assert {"rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} <= result.history[0].keys()


def test_a_second_run_computes_no_reference(tmp_path: Path) -> None:
    "The reference is found under the data and the weights; a damaged entry, other weights and other data are computed anew."
    cfg = recipe(tmp_path)
    computed = [built(cfg, tmp_path / "first")[1].reference_computed, built(cfg, tmp_path / "second")[1].reference_computed]
    assert computed == [96, 0]
    entries = sorted((tmp_path / "cache" / "reference").iterdir())
    assert len(entries) == 2, "one for training rows, one for held-out rows"
    largest = max(entries, key=lambda p: p.stat().st_size)
    whole = largest.read_bytes()
    largest.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    run, trainer = built(cfg, tmp_path / "third")
    assert trainer.reference_computed == len(run.data.train)
    assert largest.read_bytes() == whole
    largest.write_bytes(whole[:20])
    assert built(cfg, tmp_path / "fourth")[1].reference_computed == len(run.data.train)
    assert built(recipe(tmp_path, **{"training.seed": 7}), tmp_path / "fifth")[1].reference_computed == 96, "other weights"
    run, trainer = built(recipe(tmp_path, rows=[*sums(), {"prompt": "Hi", "chosen": "a", "rejected": "b"}]), tmp_path / "sixth")
    assert trainer.reference_computed == len(run.data.train), "other training rows, the same held-out ones"


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bot that answers sums, tersely and talkatively."
    tmp = tmp_path_factory.mktemp("parent")
    chats = [{"prompt": r["prompt"], "completion": r[side]} for r in sums() for side in ("chosen", "rejected")]
    changes = {"training.method": "sft", "training.max_steps": 80, "training.learning_rate": 3e-3, "data.validation_split": 0}
    return train(recipe(tmp, rows=chats, **changes)).bot


@pytest.mark.parametrize(("sft_weight", "warns"), [(0.0, True), (0.2, False)])
def test_collapse_is_told_once_and_the_sft_term_cures_it(
    tmp_path: Path, parent: Path, sft_weight: float, warns: bool, monkeypatch: Any
) -> None:
    "A high rate without an SFT term: the chosen answers fall while the margin grows. With the term the margin grows, and they rise."
    told: list[tuple[str, str, int]] = []
    monkeypatch.setattr(TrackerGroup, "log_text", lambda self, name, text, step: told.append((name, text, step)))
    console = Console(record=True, width=400, file=io.StringIO())
    changes = {"training.max_steps": 24, "training.learning_rate": 1e-3, "training.eval_steps": 8, "method.sft_weight": sft_weight}
    result = train(recipe(tmp_path, **on(parent), **changes), console=console)
    warnings = [text for name, text, _ in told if name == "warning"]
    assert len(warnings) == warns
    assert ("fall while the margin grows" in console.export_text()) == warns
    assert result.metrics["validation_rewards/margins"] > 1
    assert (result.metrics["validation_logps/chosen_change"] < -0.5) == warns
    if warns:
        assert "sft_weight" in warnings[0]


# --- adapters, KTO, resuming -------------------------------------------------------------------------------------------


def test_the_base_under_an_adapter_is_its_reference(tmp_path: Path, parent: Path) -> None:
    "Switched off, precomputed or a frozen copy: one history; the bot is an adapter that names its base."
    histories = []
    for reference in ("adapter_off", "precomputed", "frozen"):
        changes = {"method.adapter": True, "method.reference": reference, "training.output_dir": tmp_path / reference, "lora.rank": 4}
        result = train(recipe(tmp_path, **on(parent), **changes))
        histories.append(losses(result))
        assert (result.bot / "adapter_config.json").is_file()
    assert histories[0] == pytest.approx(histories[1], abs=1e-5)
    assert histories[0] == pytest.approx(histories[2], abs=1e-5)
    assert histories[0][-1] < histories[0][0] - 0.005


def test_kto_separates_good_answers_from_bad_ones(tmp_path: Path, parent: Path) -> None:
    "Each pair gives two labelled answers; TRL's own reference and the cached one give one history; a second run computes none."
    changes = {"training.method": "kto", "training.max_steps": 12, "training.eval_steps": 6, "training.learning_rate": 3e-4}
    start = on(parent) | changes
    runs = {
        name: train(recipe(tmp_path, **start, **{"method.reference": name, "training.output_dir": tmp_path / name}))
        for name in ("precomputed", "frozen")
    }
    curves = [losses(result) for result in runs.values()]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    metrics = runs["precomputed"].metrics
    assert metrics["validation_loss_before"] == pytest.approx(0.5, abs=1e-5)
    assert metrics["validation_rewards/accuracies"] > 0.9
    assert metrics["validation_rewards/margins"] > 0.05
    again = recipe(tmp_path, **start, **{"training.output_dir": tmp_path / "again"})
    assert built(again, tmp_path / "again.run")[1].reference_computed == 0
    assert not list((tmp_path / "precomputed.run" / "checkpoints").glob("README*")), "TRL's model card is left out"


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_reference_of_another_config_is_not_taken(tmp_path: Path, method: str) -> None:
    "The same weights under another epsilon or base of the rotations are another model; under another name they are not."
    base = make_bot(tmp_path, "base")
    rows = [{"prompt": r["prompt"], "completion": r[side], "label": side == "chosen"} for r in sums(4) for side in ("chosen", "rejected")]
    given = {"training.method": method, **({"rows": rows} if method == "kto" else {})}

    def computed(place: Path, name: str) -> int:
        cfg = recipe(tmp_path, **(given | on(place) | {"training.output_dir": tmp_path / name}))
        return int(built(cfg, tmp_path / f"{name}.run")[1].reference_computed)

    assert computed(base, "first") > 0
    assert computed(Path(shutil.copytree(base, tmp_path / "renamed")), "second") == 0
    config = json.loads((base / "config.json").read_text())
    rotations = config["rope_parameters"] | {"rope_theta": 100.0}
    for change in ({"rms_norm_eps": 1e-2}, {"rope_parameters": rotations}):
        (base / "config.json").write_text(json.dumps(config | change))
        assert computed(base, f"with-{next(iter(change))}") > 0


def labelled_file(path: Path, rows: list[tuple[Any, ...]]) -> Path:
    "Rows of prompt, completion and label as CSV or as JSON lines."
    names = ("prompt", "completion", "label")
    if path.suffix == ".jsonl":
        return write(path, [dict(zip(names, row, strict=True)) for row in rows])
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path


@pytest.mark.parametrize(("good", "bad"), [("true", "false"), ("True", "False"), ("1", "0"), (True, False), (1, 0)])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_labels_are_read_however_they_are_written(tmp_path: Path, form: str, good: Any, bad: Any) -> None:
    "In CSV, which knows text alone, and as numbers; what is neither is refused with its row."
    rows = [(r["prompt"], r[side], good if side == "chosen" else bad) for r in sums(6) for side in ("chosen", "rejected")]
    rows.append(("What?", "That.", "perhaps"))
    path = labelled_file(tmp_path / f"labels.{form}", rows)
    run, _ = built(recipe(tmp_path, rows=path, **{"training.method": "kto", "data.validation_split": 0}), tmp_path / "run")
    assert sum(run.data.train["label"]) == len(run.data.train) / 2 == len(rows) // 2
    [(reason, lost)] = run.data.report.dropped.items()
    assert lost.count == 1
    assert "true or false (or 1 or 0)" in reason
    assert f"{len(rows) + (form == 'csv')}" in str(lost)


def test_what_a_csv_calls_false_is_not_imitated(tmp_path: Path) -> None:
    "Fine-tuning treats the word in a CSV file as the value in JSON."
    for form, yes, no in (("csv", "true", "false"), ("jsonl", True, False)):
        rows = [(r["prompt"], r[side], yes if side == "chosen" else no) for r in sums(6) for side in ("chosen", "rejected")]
        path = labelled_file(tmp_path / f"labels.{form}", rows)
        run, _ = built(recipe(tmp_path, rows=path, **{"training.method": "sft", "data.validation_split": 0}), tmp_path / f"run-{form}")
        assert run.data.report.rows_kept == len(rows) // 2


class Stop(TrainerCallback):
    "Ends a run with an exception, as a kill would, after a step."

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 7:
            raise RuntimeError("stopped by the test")


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_a_stopped_run_resumes_bit_equal(tmp_path: Path, method: str, monkeypatch: Any) -> None:
    changes = {"training.method": method, "training.max_steps": 10, "training.save_steps": 4, "training.logging_steps": 1}
    whole = train(recipe(tmp_path, **changes, **{"training.output_dir": tmp_path / "whole"}))
    cfg = recipe(tmp_path, **changes)
    with monkeypatch.context() as patched:
        watched(patched, Stop())
        with pytest.raises(RuntimeError, match="stopped by the test"):
            train(cfg)
    resumed = train(cfg, resume=True)
    first, second = (load_file(result.bot / "model.safetensors") for result in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    curves = [[(e["step"], e["loss"]) for e in result.history if "loss" in e] for result in (whole, resumed)]
    assert curves[0] == curves[1]


# --- mistakes ----------------------------------------------------------------------------------------------------------

CHAT = talk("Hi", "Hello")
PAIR = {"prompt": "Hi", "chosen": "Hello", "rejected": "What?"}


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([CHAT], {}, "no pair of answers"),
        ([{"prompt": "Hi", "chosen": "Hello"}], {}, "question and no answer"),
        ([PAIR | {"rejected": ""}], {}, "content of the assistant message is empty"),
        ([PAIR | {"rejected": "Hello"}], {}, "the same"),
        ([{**CHAT, "label": True}], {}, "training.method=kto"),
        ([{**CHAT, "label": True}] * 1 + [{"prompt": f"{i}?", "completion": "a", "label": True} for i in range(9)],
         {"training.method": "kto"}, "none is undesirable"),
        ([CHAT], {"training.method": "kto"}, "no label"),
        ([PAIR], {"method.reference": "adapter_off"}, "set 'adapter' to true"),
        ([PAIR], {"method.loss": "robust"}, "above 0"),
        ([PAIR], {"method.label_smoothing": 0.1}, "only the loss 'robust'"),
        ([PAIR], {"method.policy": "full"}, "policy"),
        ([PAIR], {"data.on_overlong": "truncate_right"}, "drop or truncate_left"),
        ([PAIR], {"data.train_on": "all"}, "learns from the answer alone"),
        (sums(), {"data.streaming": True}, "streamed rows are not known"),
        (sums(), {"training.method": "kto", "data.streaming": True}, "read whole"),
        (sums(), {"training.method": "kto", "training.per_device_batch_size": 1}, "at least 2"),
        ([PAIR], {"data.validation_split": 0, "training.fused_loss": "chunked"}, "dpo has a loss of its own"),
    ],
)  # fmt: skip
def test_mistakes_are_told(tmp_path: Path, rows: list[Any], changes: dict[str, object], message: str) -> None:
    with pytest.raises(LLMBotError, match=message):
        train(recipe(tmp_path, rows=rows, **changes))
    assert not (tmp_path / "bot").exists()


def test_the_command_line_tells_a_mistake(tmp_path: Path, parent: Path) -> None:
    "A chat file given to DPO ends with a reason, and leaves nothing."
    chats = write(tmp_path / "chats.jsonl", [CHAT])
    (tmp_path / "r.yaml").write_text(
        f"model: {{base: {parent}}}\ntraining: {{method: dpo, output_dir: {tmp_path / 'bot'}}}\n"
        f"data: {{train: {chats}, cache_dir: {tmp_path / 'cache'}}}\n"
    )
    command = [sys.executable, "-c", "from llmbot.app.cli import main; main()", "train", str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode not in (0, 1)
    assert "no pair of answers" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("bot*"))


# --- real data ---------------------------------------------------------------------------------------------------------


def test_real_preferences_are_read(tmp_path: Path, shared: Path) -> None:
    "Every row of the demos is kept or counted as lost for its length or as a double; ranked trees give pairs, best against worst."
    bot = load_bot(shared / "models" / "stories260K", device="cpu")
    attach_chat_template(bot.tokenizer, bot.model)
    chat = ChatFormat(bot.tokenizer)
    for name, kind in (("preference/dpo-en-demo.json", "preference"), ("preference/kto-en-demo.json", "labelled"),
                       ("sft/oasst-trees.jsonl", "preference")):  # fmt: skip
        config = DataConfig(train=[str(shared / "data" / name)], cache_dir=str(tmp_path), validation_split=0.1)
        data = prepare_data(config, chat, kind=kind, max_seq_length=4096, packing=True)
        assert data.report.rows_read == data.report.rows_kept + data.report.rows_dropped
        assert data.report.rows_kept > 0.6 * data.report.rows_read, data.report.dropped
        for row in data.train:
            answers = [row[side] for side in ("chosen_ids", "rejected_ids", "completion_ids") if side in row]
            assert all(answer[-1] in chat.stop_token_ids for answer in answers)
            assert len({tuple(answer) for answer in answers}) == len(answers)
