"""lm-evaluation-harness on local tasks through our API, and what it scores beside what the model itself says.

It lives in an environment of its own (`make clients`), like the other clients.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from tiny_bots import make_bot

from llmbot.app.cli import main
from llmbot.core.bot import read_manifest
from llmbot.core.config import ModelConfig
from llmbot.core.errors import DataError
from llmbot.core.model_manager import load_bot
from llmbot.evaluation.lm_eval import run_tasks
from llmbot.evaluation.recording import record_report

LM_EVAL = os.environ.get("LLMBOT_LM_EVAL") or str(Path(__file__).parents[1] / ".venv-clients" / "bin" / "lm_eval")

pytestmark = pytest.mark.skipif(not Path(LM_EVAL).exists(), reason="lm_eval is not installed: make clients")

ROWS = [(f"What is {n} + {n}?", [f" It is {2 * n}.", " Once upon a time", f" It is {n}."]) for n in range(10, 16)]
TASK = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 3}
"""


def tasks_of(home: Path) -> Path:
    "A directory with one task and its rows."
    tasks = home / "tasks"
    tasks.mkdir()
    (tasks / "sums.yaml").write_text(TASK)
    (tasks / "rows.jsonl").write_text("".join(json.dumps({"question": q, "choices": c}) + "\n" for q, c in ROWS))
    return tasks


def test_local_tasks_are_scored_as_the_model_does(tmp_path: Path) -> None:
    import torch

    bot, tasks = make_bot(tmp_path, "tiny"), tasks_of(tmp_path)
    [report] = run_tasks(bot, tasks, model=ModelConfig(device="cpu"), command=LM_EVAL)

    loaded, right = load_bot(bot, device="cpu"), 0
    for question, choices in ROWS:
        scores = []
        for choice in choices:
            start, ids = len(loaded.tokenizer(question).input_ids), loaded.tokenizer(question + choice).input_ids
            with torch.inference_mode():
                logits = loaded.model(torch.tensor([ids])).logits[0, start - 1 : -1].float().log_softmax(-1)
            scores.append(logits.gather(1, torch.tensor(ids[start:])[:, None]).sum().item())
        right += scores.index(max(scores)) == 0
    assert report.metrics["acc"] == pytest.approx(right / len(ROWS))
    assert (report.rows, report.data, report.settings["task_version"]) == (len(ROWS), ["sums"], 3)
    assert report.intervals["acc"].low <= report.metrics["acc"] <= report.intervals["acc"].high

    assert "recorded in" in record_report(report, bot)
    manifest = read_manifest(bot)
    assert manifest is not None
    assert manifest.metrics["sums/acc"]["value"] == report.metrics["acc"]

    with pytest.raises(DataError, match="lm_eval ended with exit code 2"):  # a program that is no lm_eval
        run_tasks(bot, tasks, model=ModelConfig(device="cpu"), command=sys.executable)


def test_tasks_make_a_page_and_reach_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    "By the command, two tasks: one page, and one run in TensorBoard, with each task's figures, intervals and rows."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    bot, tasks = make_bot(tmp_path, "tiny"), tasks_of(tmp_path)
    (tasks / "few.yaml").write_text(TASK.replace("task: sums", "task: few").replace("{test: rows.jsonl}", "{test: few.jsonl}"))
    (tasks / "few.jsonl").write_text("".join(json.dumps({"question": q, "choices": c}) + "\n" for q, c in ROWS[:4]))
    monkeypatch.chdir(tmp_path)
    page, logs = tmp_path / "page.html", tmp_path / "logs"
    with pytest.raises(SystemExit) as left:
        main(["lm-eval", str(bot), str(tasks), "--lm-eval-command", LM_EVAL, "--html", str(page), "--track", "--json", "model.device=cpu",
              f"monitoring.log_dir={logs}"])  # fmt: skip
    assert not left.value.code
    reports = {report["data"][0]: report for report in json.loads(capsys.readouterr().out)}
    assert {name: report["rows"] for name, report in reports.items()} == {"sums": 6, "few": 4}
    [place] = logs.rglob("events.out.tfevents*")
    events = EventAccumulator(str(place.parent)).Reload()
    seen = {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]}
    assert seen["evaluation/rows"] == 10
    shown = page.read_text()
    for task, report in reports.items():
        ends = report["intervals"]["acc"]
        told = {"acc": report["metrics"]["acc"], "acc_low": ends["low"], "acc_high": ends["high"], "rows": report["rows"]}
        assert {name: seen[f"evaluation/{task}/{name}"] for name in told} == pytest.approx(told)
        assert f"{report['metrics']['acc']:.4g} [{ends['low']:.3g}, {ends['high']:.3g}]" in shown
        assert f"num_fewshot of {task}" in shown
