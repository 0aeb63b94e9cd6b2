"""The quickstart as a new user runs it: every stage must really learn, leave whole things behind, and go on after a kill."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from recipes import LLMBOT

from llmbot.app.quickstart import TALK
from llmbot.core.bot import verify_bot

pytestmark = pytest.mark.timeout(1800)  # three stages of training in one fixture
SUM, DIFFERENCE, WHO = "What is 27 + 45?", "What is 83 - 47?", "Who are you?"


def llmbot(*arguments: str, cwd: Path, timeout: float = 1200) -> subprocess.CompletedProcess[str]:
    command = [LLMBOT, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    "One whole quickstart, killed in the middle of its second stage and resumed."
    home = tmp_path_factory.mktemp("quickstart")
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([LLMBOT, "quickstart"], cwd=home, **silent)
    checkpoints, deadline = home / "quickstart" / "skilled-bot.run" / "checkpoints", time.monotonic() + 1200
    while not (checkpoints / "checkpoint-250").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was to be killed in the middle, and had ended before"
    assert not (home / "quickstart" / "skilled-bot").exists()
    first = (home / "quickstart" / "sft.json").read_bytes()
    done = llmbot("quickstart", "--resume", "--json", cwd=home)
    assert done.returncode == 0, done.stderr
    assert (home / "quickstart" / "sft.json").read_bytes() == first, "the first stage was over, and must not be made again"
    return home, json.loads(done.stdout)


def test_no_row_is_lost(finished: tuple[Path, dict[str, Any]]) -> None:
    "What is longer than the recipes allow would be left out, and the bot would not learn it."
    home = finished[0] / "quickstart"
    for bot, name in (("first-bot", "train"), ("skilled-bot", "subtraction"), ("friendly-bot", "preferences")):
        (data,) = json.loads((home / bot / "llmbot.json").read_text())["data"]
        written = (home / "data" / f"{name}.jsonl").read_text().splitlines()
        assert data["rows"] == len(set(written))


def test_it_learns(finished: tuple[Path, dict[str, Any]]) -> None:
    first = finished[1]["stages"]["sft"]
    assert first["correct"]["sums"] >= 0.95
    assert first["correct"]["spelling"] >= 0.9
    assert first["correct"]["facts"] >= 0.85
    assert first["answers"][SUM] == "72"


def test_lora_teaches_a_skill_and_keeps_the_old_one(finished: tuple[Path, dict[str, Any]]) -> None:
    stages = finished[1]["stages"]
    assert stages["sft"]["correct"]["subtraction"] < 0.1
    assert stages["lora"]["correct"]["subtraction"] >= 0.8
    assert stages["lora"]["correct"]["sums"] >= 0.95


def test_dpo_changes_the_style_and_keeps_the_content(finished: tuple[Path, dict[str, Any]]) -> None:
    stages = finished[1]["stages"]
    assert stages["lora"]["friendly"]["all"] < 0.1
    assert stages["dpo"]["friendly"]["all"] >= 0.9
    assert stages["dpo"]["correct"]["all"] >= 0.9
    assert stages["dpo"]["correct"]["sums"] >= 0.9


def test_small_talk_stays_as_it_is(finished: tuple[Path, dict[str, Any]]) -> None:
    "Through all stages: what was taught by heart, without a friendly ending, and one question word by word."
    for stage in finished[1]["stages"].values():
        assert stage["correct"][TALK] >= 0.9
        assert stage["friendly"][TALK] <= 0.05
        assert stage["answers"][WHO] == "I am Pico, a small chatbot that you trained."


def test_the_scores_are_those_of_the_bots(finished: tuple[Path, dict[str, Any]]) -> None:
    "Plain transformers and plain arithmetic, without llmbot, find the shares that the quickstart reports."
    home, result = finished
    from transformers import AutoModelForCausalLM, AutoTokenizer

    asked = [json.loads(line) for line in (home / "quickstart" / "data" / "heldout.jsonl").open()]
    sums = [row["messages"][0] for row in asked if row["skill"] == "sums"]
    for stage in result["stages"].values():
        model, tokenizer = (c.from_pretrained(home / stage["bot"]) for c in (AutoModelForCausalLM, AutoTokenizer))
        tokenizer.padding_side = "left"
        texts = [tokenizer.apply_chat_template([message], add_generation_prompt=True, tokenize=False) for message in sums]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=24, do_sample=False)
        said = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [
            re.fullmatch(rf"{sum(map(int, re.findall('[0-9]+', message['content'])))}(\. Happy to help!)?", answer) is not None
            for message, answer in zip(sums, said, strict=True)
        ]
        assert sum(right) / len(right) == pytest.approx(stage["correct"]["sums"], abs=0.011), "but for ties in rounding"
        assert sum(a.endswith("Happy to help!") for a in said) / len(said) == pytest.approx(stage["friendly"]["sums"], abs=0.011)


def test_no_held_out_prompt_was_trained_on(finished: tuple[Path, dict[str, Any]]) -> None:
    home, _ = finished
    data = home / "quickstart" / "data"
    asked = {name: {json.dumps((row.get("messages") or row["prompt"])[0]) for row in map(json.loads, (data / f"{name}.jsonl").open())}
             for name in ("train", "subtraction", "preferences", "heldout")}
    for name in ("train", "subtraction", "preferences"):
        assert not asked[name] & asked["heldout"]


def test_it_leaves_whole_things(finished: tuple[Path, dict[str, Any]]) -> None:
    home, result = finished
    for stage in result["stages"].values():
        assert verify_bot(home / stage["bot"]) == []
    report = (home / result["report"]).read_text()
    assert report.count("<polyline") == 3
    assert "<script" not in report
    assert "//" not in report.replace("<!doctype", ""), "no outside request"
    for stage in result["stages"].values():
        for answer in stage["answers"].values():
            assert answer in report


@pytest.mark.parametrize("stage", ["sft", "lora", "dpo"])
def test_its_recipes_train_again(finished: tuple[Path, dict[str, Any]], stage: str) -> None:
    home, result = finished
    done = llmbot("train", result["stages"][stage]["recipe"], f"training.output_dir=again-{stage}", "training.max_steps=2", cwd=home)
    assert done.returncode == 0, done.stderr
    assert verify_bot(home / f"again-{stage}") == []


def test_chat_reads_a_pipe(finished: tuple[Path, dict[str, Any]]) -> None:
    home, result = finished
    command = [LLMBOT, "chat", result["bot"]]
    done = subprocess.run(command, cwd=home, input=SUM, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == result["stages"]["dpo"]["answers"][SUM]


def test_a_second_one_reuses_nothing(finished: tuple[Path, dict[str, Any]]) -> None:
    "A finished one leaves nothing to resume, a directory that is in use is refused, and so is a stage without a bot to go on from."
    home, _ = finished
    for arguments, message in (
        (["--dir", "quickstart"], "not empty"),
        (["--resume"], "no unfinished quickstart"),
        (["--stages", "lora,dpo"], "goes on from the bot of sft"),
        (["--stages", "sft,rlhf"], "There is no stage 'rlhf'"),
    ):
        again = llmbot("quickstart", *arguments, cwd=home)
        assert again.returncode == 5
        assert message in " ".join(again.stderr.split())
        assert "Traceback" not in again.stderr
    assert not (home / "quickstart-2").exists()
