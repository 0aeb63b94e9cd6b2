"""The source archive, the wheel made from it, and the wheel in an empty environment, as a user would have it."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]  # the wheel is made from the archive
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("llmbot-*.whl")
    return path


def test_wheel_is_typed_and_holds_only_the_package(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "llmbot/py.typed" in names
    assert "llmbot/core/config.py" in names
    assert {n.split("/")[0] for n in names} <= {"llmbot", f"{wheel.name.split('-py3')[0]}.dist-info"}
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("METADATA"))).decode()
    assert "Apache-2.0" in next(line for line in metadata.splitlines() if line.startswith("License"))
    assert "Provides-Extra: dev" in metadata


@pytest.mark.slow
def test_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    "Installed with the base requirements alone: the command line starts, and a bot can be made and asked."
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([*install, "-c", ROOT / "constraints.txt", wheel], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr

    def run(*command: str | Path) -> str:
        finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=300)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    assert run(python, "-c", "import llmbot; print(llmbot.__version__)").strip() == "0.1.0"
    (tmp_path / "recipe.yaml").write_text(run(tmp_path / "env" / "bin" / "llmbot", "config", "init", "sft"))
    assert "Usage" in run(tmp_path / "env" / "bin" / "llmbot", "--help")
    made = """
import llmbot
from llmbot.core.config import ModelConfig
from llmbot.core.model_manager import new_model, save_bot, train_tokenizer
tokenizer = train_tokenizer(["hello world"] * 10, 300)
save_bot("tiny", new_model(ModelConfig(preset="qwen3-0.2m"), tokenizer), tokenizer)
assert isinstance(llmbot.ask("tiny", "hello"), str)
"""
    run(python, "-c", made)
