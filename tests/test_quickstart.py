"""The quickstart as a new user runs it: it must really learn, leave whole things behind, and go on after a kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llmbot.core.bot import verify_bot

LLMBOT = str(Path(sys.executable).with_name("llmbot"))


def llmbot(*arguments: str, cwd: Path, timeout: float = 900) -> subprocess.CompletedProcess[str]:
    command = [LLMBOT, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    "One whole quickstart, killed on its way and resumed."
    home = tmp_path_factory.mktemp("quickstart")
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([LLMBOT, "quickstart"], cwd=home, **silent)
    checkpoints, deadline = home / "quickstart" / "first-bot.run" / "checkpoints", time.monotonic() + 600
    while not (checkpoints / "checkpoint-250").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed in the middle, and had ended before"
    assert not (home / "quickstart" / "first-bot").exists()
    done = llmbot("quickstart", "--resume", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    return home, json.loads(done.stdout)


def test_it_learns(finished: tuple[Path, dict[str, Any]]) -> None:
    _, result = finished
    assert result["scores"]["sums"] >= 0.95
    assert result["scores"]["spelling"] >= 0.9
    assert result["scores"]["facts"] >= 0.85
    assert "72" in result["answers"]["What is 27 + 45?"]


def test_it_leaves_whole_things(finished: tuple[Path, dict[str, Any]]) -> None:
    home, result = finished
    assert verify_bot(home / result["bot"]) == []
    report = (home / result["report"]).read_text()
    assert "<polyline" in report
    assert "<script" not in report
    assert "//" not in report.replace("<!doctype", ""), "no outside request"


def test_its_bot_is_an_ordinary_model(finished: tuple[Path, dict[str, Any]]) -> None:
    "Plain transformers, without llmbot, gives the answer that the quickstart gave."
    home, result = finished
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (c.from_pretrained(home / result["bot"]) for c in (AutoModelForCausalLM, AutoTokenizer))
    question = [{"role": "user", "content": "What is 27 + 45?"}]
    ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    out = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == result["answers"]["What is 27 + 45?"]


def test_chat_reads_a_pipe(finished: tuple[Path, dict[str, Any]]) -> None:
    home, result = finished
    command = [LLMBOT, "chat", result["bot"]]
    done = subprocess.run(command, cwd=home, input="What is 27 + 45?", capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == result["answers"]["What is 27 + 45?"]


def test_a_second_one_reuses_nothing(finished: tuple[Path, dict[str, Any]]) -> None:
    "Without a free name there is nothing to resume, and a directory that is in use is refused."
    home, _ = finished
    again = llmbot("quickstart", "--dir", "quickstart", cwd=home)
    assert again.returncode == 5
    assert "not empty" in again.stderr
    assert "Traceback" not in again.stderr
    nothing = llmbot("quickstart", "--resume", cwd=home)
    assert nothing.returncode == 5
    assert "no unfinished quickstart" in nothing.stderr
