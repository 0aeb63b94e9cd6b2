"""A training method of one's own, by MODULE:CLASS: from a terminal, with its settings checked, stopped and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from recipes import ENV, LLMBOT, losses, start, talk, train, write
from rich.console import Console
from safetensors.torch import load_file

from llmbot.core.config_io import load_config
from llmbot.core.errors import ConfigError
from llmbot.core.settings import InvalidConfigError
from llmbot.training.trainer import TrainingResult

METHOD = '''\
from typing import Literal

import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass

from llmbot.core.settings import STRICT, section
from llmbot.training.bot_trainer import BotTrainer, bot_trainer
from llmbot.training.methods import register_method, training_arguments
from llmbot.core.packing import Collator
from transformers import Trainer, TrainingArguments


class SmoothTrainer(BotTrainer):
    def summed_loss(self, model, inputs):
        given = {k: v for k, v in inputs.items() if k != "labels"}
        logits = model(**given).logits[:, :-1].flatten(0, 1)
        labels = inputs["labels"][:, 1:].flatten()
        return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.run.settings.smoothing)


class Smooth:
    name = "smooth"
    data_kind: Literal["chat"] = "chat"

    @section("method")
    @dataclass(kw_only=True, config=STRICT)
    class Settings:
        smoothing: float = Field(default=0.1, ge=0, lt=1, description="Share of each label that is spread over all tokens")

    def learning_rate(self, model, is_new):
        return 3e-3

    def build(self, run):
        return bot_trainer(run, SmoothTrainer)


Registered = register_method(type("Registered", (Smooth,), {"name": "smooth_by_name"}))


class Plain(Smooth):
    Settings = None

    def build(self, run):
        args = TrainingArguments(**training_arguments(run))
        return Trainer(run.model, args, Collator(run.tokenizer.pad_token_id or 0), run.data.train, callbacks=list(run.callbacks))


class NoMethod:
    name, Settings = "no method", Smooth.Settings
'''
RECIPE = """\
model: {preset: qwen3-0.2m, vocab_size: 300, max_position_embeddings: 128, device: cpu}
training:
  method: smooth:Smooth
  output_dir: bots/smooth
  max_steps: 12
  save_steps: 4
  logging_steps: 1
  packing: false
  per_device_batch_size: 4
method:
  smoothing: 0.2
data: {train: chats.jsonl, validation_split: 0.25, max_seq_length: 64, cache_dir: cache}
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A directory with a method, a recipe and data, in which the test works."
    (tmp_path / "smooth.py").write_text(METHOD)
    (tmp_path / "broken.py").write_text("import json\n\nraise RuntimeError('out of order')\n")
    (tmp_path / "unlucky.py").write_text("import no_such_package\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    write(tmp_path / "chats.jsonl", [talk(f"what is {n}?", f"{n} is {n}") for n in range(24)])
    monkeypatch.chdir(tmp_path)
    for name in ("smooth", "broken", "unlucky"):
        sys.modules.pop(name, None)
    return tmp_path


def run(home: Path, *overrides: str, resume: bool = False) -> TrainingResult:
    "Train in this process."
    return train(load_config(home / "recipe.yaml", list(overrides), env={}), resume=resume)


@pytest.mark.parametrize(("override", "words"), [
    ("training.method=smoth:Smooth", ["there is no module 'smoth'"]),
    ("training.method=smooth:Smoth", ["the module 'smooth' has no 'Smoth'"]),
    ("training.method=smooth:NoMethod", ["which is no training method", "'data_kind'"]),
    ("training.method=smooth:", ["MODULE:NAME"]),
    ("training.method=broken:Smooth", ["broken.py:3", "RuntimeError: out of order"]),
    ("training.method=unlucky:Smooth", ["no module 'no_such_package', which 'unlucky' imports"]),
])
@pytest.mark.parametrize("settings", [True, False], ids=["with settings", "without"])
def test_a_method_that_is_not_there(override: str, words: list[str], settings: bool, home: Path) -> None:
    if not settings:
        (home / "recipe.yaml").write_text(RECIPE.replace("method:\n  smoothing: 0.2\n", ""))
    with pytest.raises(ConfigError) as error:
        run(home, override)
    for word in words:
        assert word in str(error.value)
    assert not (home / "bots").exists()


@pytest.mark.parametrize(("line", "words"), [
    ("  smoothing: 1.5", ["recipe.yaml:11: method.smoothing", "'1.5'", ">= 0 and < 1"]),
    ("  smothing: 0.2", ["recipe.yaml:11: method.smothing", "did you mean 'method.smoothing'?"]),
])
def test_its_settings_are_checked_with_their_place(line: str, words: list[str], home: Path) -> None:
    (home / "recipe.yaml").write_text(RECIPE.replace("  smoothing: 0.2", line))
    with pytest.raises(InvalidConfigError) as error:
        load_config(home / "recipe.yaml", env={})
    for word in words:
        assert word in str(error.value)


def test_a_registered_name_takes_the_same_settings(home: Path) -> None:
    sys.path.insert(0, str(home))
    import smooth  # noqa: F401  # type: ignore[import-not-found]

    sys.path.remove(str(home))
    (home / "recipe.yaml").write_text(RECIPE.replace("smoothing: 0.2", "smoothing: x"))
    with pytest.raises(InvalidConfigError, match=r"recipe\.yaml:11: method\.smoothing"):
        load_config(home / "recipe.yaml", ["training.method=smooth_by_name"], env={})


def test_without_smoothing_it_is_fine_tuning(home: Path) -> None:
    "The same cross-entropy by way of `summed_loss`: equal losses, with accumulation and without."
    same = ("method.smoothing=0", "training.learning_rate=3e-3")
    own = losses(run(home, *same, "training.output_dir=own"))
    (home / "recipe.yaml").write_text(RECIPE.replace("method:\n  smoothing: 0.2\n", ""))
    plain = losses(run(home, "training.learning_rate=3e-3", "training.method=sft", "training.output_dir=plain"))
    assert own == pytest.approx(plain, rel=1e-4)
    (home / "recipe.yaml").write_text(RECIPE)
    parts = ("training.per_device_batch_size=1", "training.gradient_accumulation_steps=4", "training.output_dir=parts")
    assert losses(run(home, *same, *parts)) == pytest.approx(plain, rel=1e-4)


def test_smoothing_changes_what_is_learned(home: Path) -> None:
    assert losses(run(home, "training.output_dir=a"))[-1] > losses(run(home, "method.smoothing=0", "training.output_dir=b"))[-1]


def test_from_a_terminal_killed_and_resumed(home: Path) -> None:
    run(home, "training.output_dir=bots/whole", "training.max_steps=60")
    command = [LLMBOT, "train", "recipe.yaml", "training.max_steps=60", "--json"]
    process = subprocess.Popen(command, cwd=home, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first = home / "bots" / "smooth.run" / "checkpoints"
    while process.poll() is None and not any(first.glob("checkpoint-*/trainer_state.json")):
        time.sleep(0.01)  # no event tells of another process's file
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert not (home / "bots" / "smooth").exists()
    done = subprocess.run([*command, "--resume"], cwd=home, env=ENV, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming from checkpoint-" in done.stderr
    assert json.loads(done.stdout)["steps"] == 60
    a, b = (load_file(home / "bots" / name / "model.safetensors") for name in ("whole", "smooth"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    manifest = json.loads((home / "bots" / "smooth" / "llmbot.json").read_text())
    assert manifest["method"] == "smooth:Smooth"
    assert manifest["config"]["method"] == {"smoothing": "0.2"}


def test_a_mistake_in_a_terminal_is_one_message(home: Path) -> None:
    (home / "recipe.yaml").write_text(RECIPE.replace("smoothing: 0.2", "smoothing: much"))
    done = subprocess.run([LLMBOT, "train", "recipe.yaml"], cwd=home, env=ENV, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "recipe.yaml:11: method.smoothing: got 'much'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plain_trainer_is_refused_what_it_cannot_do(home: Path) -> None:
    "And what it must do without is said."
    (home / "recipe.yaml").write_text(RECIPE.replace("method:\n  smoothing: 0.2\n", "").replace("smooth:Smooth", "smooth:Plain"))
    for setting in ("max_minutes=0.001", "auto_batch_size=true"):
        with pytest.raises(ConfigError, match=f"training.{setting.partition('=')[0]} does nothing for 'smooth:Plain'"):
            run(home, f"training.{setting}")
    console = Console(record=True, width=300, file=open(os.devnull, "w"))  # noqa: SIM115
    start(load_config(home / "recipe.yaml", ["data.validation_split=0", "training.output_dir=bots/plain"], env={}), console=console)
    said = console.export_text()
    assert "--resume takes none of its checkpoints" in said
    assert "nothing stops it when it diverges" in said
