"""An evaluation that is killed goes on without asking again, and figures stay with the bot where gates read them."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_evaluate import CPU, TALKS, write
from tiny_bots import make_bot

from llmbot.app.cli import main
from llmbot.core.bot import bot_digest, read_manifest, verify_bot
from llmbot.core.errors import BotError, ConfigError, DataError
from llmbot.core.evaluations import known_metrics
from llmbot.core.registry import register, verify_registry
from llmbot.core.registry_aliases import promote
from llmbot.evaluation.evaluate import evaluate_bot
from llmbot.evaluation.kept import Kept
from llmbot.evaluation.report import ALIKE

SLOW = '''
import asyncio, os
from pathlib import Path
from llmbot.serving.backends import create_backend

class Slow:
    "PyTorch's engine, which writes down what it is asked, and after some answers gives none any more."
    name, given = "slow", 0

    def __init__(self, bot_ref, cfg):
        self.inner = create_backend("torch", bot_ref, cfg)
        self.chat, self.context_length = self.inner.chat, self.inner.context_length

    def capabilities(self):
        return self.inner.capabilities()

    async def start(self):
        await self.inner.start()

    async def stop(self):
        await self.inner.stop()

    async def generate(self, request):
        with open(os.environ["ASKED"], "a") as log:
            log.write(request.request_id + "\\n")
        Slow.given += 1
        if Slow.given > int(os.environ["ANSWERS"]):
            await asyncio.Event().wait()
        async for chunk in self.inner.generate(request):
            yield chunk
'''


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_bot(tmp_path, "tiny", seed=3)
    write(tmp_path / "rows.jsonl", TALKS)
    monkeypatch.setenv("LLMBOT_REGISTRY", str(tmp_path / "registry"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def kept_rows(path: Path) -> set[str]:
    return {json.loads(line).get("row") for line in path.read_bytes().splitlines()[1:]} if path.exists() else set()


def test_a_killed_evaluation_goes_on(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "SIGKILL in the middle; what was answered before is not asked again, and the report is that of a run that was left alone."
    (home / "slow_engine.py").write_text(SLOW)
    kept, log = home / "report.answers.jsonl", home / "asked.txt"
    command = ["evaluate", "tiny", "serving.backend=slow_engine:Slow", "model.device=cpu", "--data", "rows.jsonl", "--metrics",
               "token_f1,exact_match", "--max-new-tokens", "8", "--json", "-o", "report.json"]  # fmt: skip
    env = os.environ | {"ASKED": str(log), "ANSWERS": "4", "PYTHONPATH": f"{home}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    run = subprocess.Popen([sys.executable, "-m", "llmbot.app.cli", *command], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while len(kept_rows(kept)) < 4:
        assert run.poll() is None, run.stderr.read().decode() if run.stderr else ""
        assert time.monotonic() < until
        time.sleep(0.05)  # looks again; nothing depends on how long it is
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    before = kept_rows(kept)
    log.unlink()

    monkeypatch.syspath_prepend(home)
    monkeypatch.setenv("ASKED", str(log))
    monkeypatch.setenv("ANSWERS", "1000")
    with pytest.raises(SystemExit) as left:
        main(command)
    assert not left.value.code
    asked = {f"answer-{line.removeprefix('row-')}" for line in log.read_text().split()}
    assert len(before) == 4
    assert asked == {f"answer-{i}" for i in range(len(TALKS))} - before
    report = json.loads((home / "report.json").read_text())
    alone = evaluate_bot("tiny", "rows.jsonl", ["token_f1", "exact_match"], model=CPU, max_new_tokens=8)
    assert report["metrics"] == alone.metrics
    assert report["scores"] == alone.scores
    assert f"4 of {len(TALKS)} results" in " ".join(report["notes"])


def test_another_run_does_not_take_the_answers(home: Path) -> None:
    def again(ref: str = "tiny", **changes: Any) -> Any:
        options: dict[str, Any] = {"model": CPU, "max_new_tokens": 6, "keep": "kept.jsonl"} | changes
        return evaluate_bot(ref, "rows.jsonl", ["token_f1", "loss"], **options)

    first = again()
    assert again().metrics == first.metrics
    make_bot(home, "other", seed=9)
    for reason, changes in {"bot": {"ref": "other"}, "max_new_tokens": {"max_new_tokens": 7}, "data": {"max_rows": 3},
                            "stop": {"stop": "x"}}.items():  # fmt: skip
        with pytest.raises(ConfigError, match=f"another run.*{reason}: was"):
            again(**changes)
    assert again("other", fresh=True).notes == [f"no spread of token_f1: {ALIKE}"]
    write(home / "rows.jsonl", [*TALKS[1:], TALKS[0]])
    with pytest.raises(ConfigError, match="data: was"):
        again("other")


def test_figures_stay_with_the_bot(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    "In the manifest and on the card of a bot, beside a registered version; gates read both, and no digest moves."
    def run(*command: str) -> Any:
        with pytest.raises(SystemExit) as left:
            main([*command, "--json"])
        out = capsys.readouterr().out
        return left.value.code or 0, json.loads(out) if out else None

    digest = bot_digest("tiny")
    place = register("tiny", "mine")
    code, report = run("evaluate", "tiny", "--data", "rows.jsonl", "--metrics", "chrf,bits_per_byte", "--html", "page.html", "--track",
                       "model.device=cpu", "monitoring.log_dir=logs")  # fmt: skip
    manifest = read_manifest("tiny")
    assert manifest is not None
    figure = manifest.metrics["rows.jsonl/chrf"]
    assert (code, figure["value"], figure["rows"]) == (0, report["metrics"]["chrf"], len(TALKS))
    assert figure["interval"] == [report["intervals"]["chrf"][end] for end in ("low", "high")]
    assert (figure["fingerprint"], figure["digest"], figure["settings"]["decoding"]) == (report["fingerprint"], digest, "greedy")
    assert (bot_digest("tiny"), verify_bot("tiny")) == (digest, [])
    assert "rows.jsonl/chrf" in (home / "tiny" / "README.md").read_text()
    assert "chrf" in (home / "page.html").read_text()
    assert list((home / "logs").rglob("events.out.tfevents*"))

    with pytest.raises(BotError, match="no metric 'chrf'"):
        promote("mine@1", require=["chrf>=0"])
    code, report = run("evaluate", "mine@1", "--data", "rows.jsonl", "--metrics", "chrf", "model.device=cpu")
    assert code == 0
    assert known_metrics(place.directory)["rows.jsonl/chrf"]["value"] == report["metrics"]["chrf"]
    assert verify_registry() == {}
    promote("mine@1", require=[f"chrf>={report['metrics']['chrf'] - 0.01}"])
    with pytest.raises(BotError, match="compared is the lower end of its interval"):
        promote("mine@1", "canary", [f"chrf.low>{report['intervals']['chrf']['high']}"])
    make_bot(home, "other", seed=9)
    code, found = run("compare", "other", "mine@1", "--data", "rows.jsonl", "--metrics", "chrf", "model.device=cpu")
    more, less = known_metrics(place.directory)["rows.jsonl/chrf_over_other"], known_metrics("other")["rows.jsonl/chrf_over_mine@1"]
    difference = found["differences"]["chrf"]
    assert (code, more["value"]) == (0, difference["second"] - difference["first"])
    assert (more["interval"], more["over_digest"]) == ([difference["interval"][end] for end in ("low", "high")], bot_digest("other"))
    assert (less["value"], less["over_digest"], less["wins"], less["losses"]) == (-more["value"], digest, more["losses"], more["wins"])
    assert more["settings"] == less["settings"] == found["settings"]
    assert "### Compared with other bots" in (home / "other" / "README.md").read_text()
    assert (verify_bot("other"), verify_registry()) == ([], {})
    promote("mine@1", "better", [f"chrf_over_other.low>={more['interval'][0]}"])

    with_hand = (home / "tiny" / "config.json").read_text()
    (home / "tiny" / "config.json").write_text(with_hand + " ")
    _, report = run("evaluate", "tiny", "--data", "rows.jsonl", "--metrics", "chrf", "--no-record", "model.device=cpu")
    assert report["notes"] == []


def test_a_disk_that_was_full_is_no_damage(tmp_path: Path) -> None:
    "What could not be written, at the beginning or in the middle, is written by the same command once there is room."
    path, key = tmp_path / "report.answers.jsonl", {"bot": "1f"}

    @contextlib.contextmanager
    def room_for(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.raises(DataError, match="cannot be kept there"), room_for(5):
        Kept(path, key)
    assert list(tmp_path.iterdir()) == []
    Kept(path, key).add({"0": ["Paris", True]})
    whole = path.read_bytes()
    with pytest.raises(OSError, match="too large"), room_for(len(whole) + 9):
        Kept(path, key).add({"1": ["Rome", True]})
    assert path.read_bytes().startswith(whole)
    assert Kept(path, key).found == {"0": ["Paris", True]}
    assert path.read_bytes() == whole
