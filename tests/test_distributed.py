"""Two processes on this machine, on CPUs with gloo: the same curve as one, one voice, and one end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from llmbot.core.config_io import load_config, save_config
from llmbot.training.launch import run_directory
from llmbot.training.trainer import train

ROOT = Path(__file__).parents[1]
QUIET = Console(quiet=True)
pytestmark = pytest.mark.slow
ALONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}


def write_chats(path: Path) -> Path:
    "Thirty-seven conversations of very unequal lengths: no number of processes divides them evenly."
    rows = [
        {"messages": [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": " ".join(map(str, range(n)))}]}
        for n in range(1, 38)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipe(home: Path, chats: Path, **changes: object) -> Path:
    "A recipe of two epochs and a bit, at a global batch of 8 in one process."
    settings = {
        "model.preset": "qwen3-0.2m",
        "model.vocab_size": 300,
        "model.device": "cpu",
        "training.output_dir": home / "bot",
        "training.max_steps": 12,
        "training.per_device_batch_size": 8,
        "training.learning_rate": 3e-3,
        "training.logging_steps": 1,
        "training.precision": "fp32",
        "training.packing": False,
        "data.train": f"[{chats}]",
        "data.cache_dir": home / "cache",
        "data.max_seq_length": 128,
        "data.validation_split": 0.2,
        **changes,
    }
    home.mkdir(exist_ok=True)
    save_config(load_config(None, overrides=[f"{k}={v}" for k, v in settings.items()], env={}), home / "recipe.yaml")
    return home / "recipe.yaml"


def start(path: Path, *options: str, cwd: Path | None = None, **environment: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "llmbot.app.cli", "train", str(path), *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | ALONE | environment, cwd=cwd, **pipes)  # type: ignore[call-overload]


def finished(process: "subprocess.Popen[str]", code: int = 0, within: float = 120) -> tuple[str, str]:
    "Standard output and error of a process that ends with `code`."
    out, err = process.communicate(timeout=within)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


def curve(home: Path) -> dict[str, list[float]]:
    "Losses and held-out losses, as they were logged."
    history = json.loads((run_directory(home / "bot") / "history.json").read_text())
    return {name: [e[name] for e in history if name in e] for name in ("loss", "eval_loss", "validation_loss", "learning_rate")}


def largest_difference(one: Path, other: Path) -> float:
    "Of any weight of two bots."
    a, b = (load_file(home / "bot" / "model.safetensors") for home in (one, other))
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, chats: Path) -> dict[bool, Path]:
    "Runs of one process, unpacked and packed, which all others are compared with."
    root = tmp_path_factory.mktemp("one")
    homes = {packing: root / str(packing) for packing in (False, True)}
    for packing, home in homes.items():
        train(load_config(recipe(home, chats, **SHAPE[packing]), env={}), console=QUIET)
    return homes


SHAPE: dict[bool, dict[str, object]] = {
    False: {"training.eval_steps": 5},
    True: {"training.packing": True, "data.max_seq_length": 96, "training.gradient_accumulation_steps": 2, "training.max_steps": 8,
           "training.per_device_batch_size": 4},
}  # fmt: skip
SHARE = {False: {"training.per_device_batch_size": 4}, True: {"training.per_device_batch_size": 2}}


@pytest.mark.parametrize(("packing", "strategy"), [(False, "auto"), (True, "ddp"), (False, "fsdp")])
def test_two_processes_learn_what_one_does(
    tmp_path: Path, chats: Path, one: dict[bool, Path], packing: bool, strategy: str
) -> None:
    "The same global batch, over epochs that end in the middle of one: the same losses, held-out losses and weights, within rounding."
    home = tmp_path / "two"
    path = recipe(home, chats, **SHAPE[packing] | SHARE[packing] | {"training.strategy": strategy})
    out, err = finished(start(path, "--nproc", "2"))
    expected, got = curve(one[packing]), curve(home)
    assert len(got["loss"]) == len(expected["loss"]) >= 8
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, abs=2e-5), name
    assert largest_difference(one[packing], home) < 2e-5
    assert out.count("is trained") == 1, "one process speaks"
    assert err.count("step 1/") == 1
    assert json.loads((run_directory(home / "bot") / "run.json").read_text())["processes"] == 2


def test_the_comparison_can_fail(tmp_path: Path, chats: Path, one: dict[bool, Path]) -> None:
    "Another order of rows is seen in the curve and in the weights."
    train(load_config(recipe(tmp_path / "other", chats, **SHAPE[False], **{"training.seed": 7}), env={}), console=QUIET)
    assert curve(tmp_path / "other")["loss"] != pytest.approx(curve(one[False])["loss"], abs=1e-3)
    assert largest_difference(one[False], tmp_path / "other") > 1e-3
