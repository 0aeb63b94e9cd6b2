"""lm-evaluation-harness on local tasks through our API, and what it scores beside what the model itself says.

It lives in an environment of its own (`make clients`), like the other clients.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from tiny_bots import make_bot

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


def test_local_tasks_are_scored_as_the_model_does(tmp_path: Path) -> None:
    import torch

    bot, tasks = make_bot(tmp_path, "tiny"), tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "sums.yaml").write_text(TASK)
    (tasks / "rows.jsonl").write_text("".join(json.dumps({"question": q, "choices": c}) + "\n" for q, c in ROWS))
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
