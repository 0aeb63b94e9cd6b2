"""A run goes on only as what it was: its settings, its base, its data; what may change is said."""

import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recipes
from recipes import built, on, sums, train
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_bots import make_bot

from llmbot.core.config import Config
from llmbot.core.errors import TrainingError

ROWS: dict[str, list[Any]] = {"sft": recipes.chats(), "lora": recipes.chats(), "dpo": sums()}


def recipe(home: Path, method: str = "sft", **changes: object) -> Config:
    settings = {"training.method": method, "training.max_steps": 4, "training.save_steps": 2, "data.max_seq_length": 128,
                "training.logging_steps": 1}  # fmt: skip
    return recipes.recipe(home, ROWS[method], **(settings | changes))


def begun(cfg: Config) -> Path:
    "The directory of a run that lacks its last steps and its bot."
    result = train(cfg)
    shutil.rmtree(result.bot)
    shutil.rmtree(result.run_dir / "checkpoints" / "checkpoint-4")
    return result.run_dir


def stronger(weights: Path) -> None:
    "Multiply all weights by 1.2."
    save_file({name: 1.2 * tensor for name, tensor in load_file(weights).items()}, weights, metadata={"format": "pt"})


def resumed(cfg: Config) -> str:
    "What is said while a run is resumed."
    console = Console(record=True, width=300, file=open(os.devnull, "w"))  # noqa: SIM115
    train(cfg, resume=True, console=console)
    return console.export_text()


@pytest.mark.parametrize("method", ["sft", "lora", "dpo"])
def test_another_base_is_refused(tmp_path: Path, method: str) -> None:
    base = make_bot(tmp_path, "base")
    cfg = recipe(tmp_path, method, **on(base))
    begun(cfg)
    before = (base / "model.safetensors").read_bytes()
    stronger(base / "model.safetensors")
    with pytest.raises(TrainingError, match="not what it was when the run"):
        train(cfg, resume=True)
    (base / "model.safetensors").write_bytes(before)
    assert "resuming from checkpoint-2" in resumed(cfg)


@pytest.mark.parametrize("change", ["weights", "commit"])
def test_another_base_from_the_hub_is_refused(tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "The files of a hub model changed under their old commit, or its branch moved on."
    cache = tmp_path / "hub"
    for place in ("huggingface_hub.constants.HF_HUB_CACHE", "huggingface_hub.file_download.HF_HUB_CACHE",
                  "transformers.utils.hub.HF_HUB_CACHE"):
        monkeypatch.setattr(place, str(cache), raising=False)  # fmt: skip
    repository = cache / "models--someone--tiny"
    first = make_bot(repository / "snapshots", "a" * 40)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    cfg = recipe(tmp_path, **(on(Path("hf:someone/tiny"))))
    begun(cfg)
    if change == "weights":
        stronger(first / "model.safetensors")
    else:
        first.rename(first.with_name("b" * 40))
        (repository / "refs" / "main").write_text("b" * 40)
    with pytest.raises(TrainingError, match="not what it was when the run"):
        train(cfg, resume=True)


def test_a_setting_of_the_method_that_is_gone_is_refused(tmp_path: Path) -> None:
    "What is left out means its default; written out as such it is the same run."
    given = recipe(tmp_path, "dpo", **{"method.beta": 0.3, "method.sft_weight": 0.2})
    begun(given)
    for gone in ("beta", "sft_weight"):
        left = {f"method.{name}": value for name, value in (("beta", 0.3), ("sft_weight", 0.2)) if name != gone}
        with pytest.raises(TrainingError, match=f"method.{gone}: 0.[23] then, 0.[01] now"):
            train(recipe(tmp_path, "dpo", **left), resume=True)
    assert "resuming from checkpoint-2" in resumed(recipe(tmp_path, "dpo", **{
        "method.beta": 0.3, "method.sft_weight": 0.2, "method.loss": "sigmoid"}))  # fmt: skip


def test_a_new_length_is_said(tmp_path: Path) -> None:
    begun(recipe(tmp_path))
    said = resumed(recipe(tmp_path, **{"training.max_steps": 6, "training.save_total_limit": 3}))
    assert "training.max_steps: 4 then, 6 now" in said
    assert "training.save_total_limit: 2 then, 3 now" in said
    assert "the learning rate follows the new length" in said


def test_nothing_is_said_of_what_did_not_change(tmp_path: Path) -> None:
    begun(recipe(tmp_path))
    assert "then" not in resumed(recipe(tmp_path))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": {}}'])
def test_a_broken_record_is_named(tmp_path: Path, content: str) -> None:
    run_dir = begun(recipe(tmp_path, "lora", **on(make_bot(tmp_path, "base"))))
    (run_dir / "run.json").write_text(content)
    with pytest.raises(TrainingError, match=r"run\.json"):
        train(recipe(tmp_path, "lora", **on(tmp_path / "base")), resume=True)


def test_a_broken_baseline_is_measured_again(tmp_path: Path) -> None:
    cfg = recipe(tmp_path, **on(make_bot(tmp_path, "base")), **{"data.validation_split": 0.2})
    first = train(cfg)
    shutil.rmtree(first.bot)
    (first.run_dir / "baseline.json").write_text("{")
    again = train(cfg, resume=True)
    assert again.metrics["validation_loss_before"] == pytest.approx(first.metrics["validation_loss_before"])


def test_tied_weights_are_not_called_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    "What a tied model leaves out of its file is no loss, and what is really missing is still told."
    from transformers.trainer import logger

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    cfg = recipe(tmp_path)
    begun(cfg)
    with caplog.at_level(logging.WARNING, logger=logger.name):
        resumed(cfg)
        assert "missing keys" not in caplog.text
        trainer = built(cfg, tmp_path / "other.run")[1]
        trainer._issue_warnings_after_load(SimpleNamespace(missing_keys=["lm_head.weight", "model.norm.weight"], unexpected_keys=[]))
    assert "missing keys in the checkpoint model loaded: ['model.norm.weight']" in caplog.text
