"""Four trackers of one real run, which was killed and resumed: what each of them wrote is read back, step by step."""

import base64
import hashlib
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

os.environ |= {"MLFLOW_DISABLE_TELEMETRY": "true", "WANDB_ERROR_REPORTING": "false", "COMET_DISABLE_AUTO_LOGGING": "1"}
from rich.console import Console

from llmbot.app.cli import main
from llmbot.app.run_records import find_runs, read_curves, records_of
from llmbot.core.config import Config, ModelConfig, MonitoringConfig, ServingConfig
from llmbot.core.config_io import load_config
from llmbot.core.errors import TrainingError
from llmbot.monitoring.experiment_tracker import TrackedRun, create_trackers, identity, register_tracker
from llmbot.monitoring.mlflow_tracker import make_database
from llmbot.monitoring.tracker_queue import read_calls
from llmbot.monitoring.tracker_records import leveldb_records, local_records, tracker_name
from llmbot.serving.api_server import running_server
from llmbot.training.launch import free_port
from llmbot.training.run_tracking import send_again
from llmbot.training.trainer import train

QUIET = Console(quiet=True)
ROOT = Path(__file__).parents[1]
FOUR = ["tensorboard", "mlflow", "wandb", "comet"]
PLANTED = {  # none of these may be found in anything that a tracker keeps
    "LLMBOT_TEST_API_KEY": "planted-value-of-the-environment",
    "in the configuration": "planted-token-of-the-server-0123456789",
    "in an address": "planted-password-of-an-address",
    "in a prompt": "hf_" + "plantedtokenofahub" * 2,
}
KILLED = """
import os, signal, sys
from rich.console import Console
from transformers import TrainerCallback
import llmbot.training.trainer as trainer
from llmbot.core.config_io import load_config
from llmbot.core.errors import TrainingError

class Kill(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.global_step == 10:  # checkpoints are after 4 and 8
            os.kill(os.getpid(), signal.SIGKILL)

make = trainer.make_callbacks
trainer.make_callbacks = lambda *a: (lambda t, c: (t, [*c, Kill()]))(*make(*a))
trainer.train(load_config(None, sys.argv[1:], env={}), console=Console(quiet=True))
"""


def write_chats(path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"{a} {b}"}, {"role": "assistant", "content": f"{b} {a}" * n}]}
        for a in ("red", "blue", "green", "grey") for b in ("fish", "bird", "cat") for n in (1, 2, 3, 4)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def overrides(folder: Path, name: str, **changes: object) -> list[str]:
    settings = {
        "model.preset": "qwen3-0.2m", "model.vocab_size": 300, "training.method": "sft", "training.output_dir": folder / name,
        "training.max_steps": 12, "training.precision": "fp32", "training.logging_steps": 1, "training.eval_steps": 4,
        "training.save_steps": 4, "data.train": f"[{write_chats(folder / 'chats.jsonl')}]", "data.cache_dir": folder / "cache",
        "data.max_seq_length": 64, "data.validation_split": 0.2, "monitoring.trackers": f"[{', '.join(FOUR)}]", **changes,
    }  # fmt: skip
    return [f"{key}={value}" for key, value in settings.items() if value is not None]


@dataclass
class Tracked:
    "A finished run and what it should have told."

    folder: Path
    run_dir: Path
    id: str
    numbers: dict[str, list[tuple[int, float]]]  # name -> (step, value), as the trainer's own history has it


def told(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    "The trainer's history under the trackers' names, each number once a step."
    found: dict[str, dict[int, float]] = defaultdict(dict)
    for entry in json.loads((run_dir / "history.json").read_text()):
        for key, value in entry.items():
            if key not in ("epoch", "step") and isinstance(value, int | float):
                found[tracker_name(key)].setdefault(entry["step"], value)
    return {name: sorted(values.items()) for name, values in found.items()}


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    "One run in all four trackers, killed after step 10 and resumed from step 8, with secrets planted on the way."
    folder = tmp_path_factory.mktemp("tracked")
    make_database(folder / "mlflow.db")  # here, where the tests after this one take the tables from
    given = overrides(folder, "bot", **{
        "serving.token": PLANTED["in the configuration"],
        "monitoring.sample_prompts":
            f"['red fish', 'see https://me:{PLANTED['in an address']}@example.org/ with {PLANTED['in a prompt']}']",
    })  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMBOT_TEST_API_KEY", PLANTED["LLMBOT_TEST_API_KEY"])
        done = subprocess.run([sys.executable, "-c", KILLED, *given], cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
        first = identity(folder / "bot.run")
        train(load_config(None, given, env={}), resume=True, console=QUIET)
    again = identity(folder / "bot.run")
    assert first
    assert first == again
    return Tracked(folder, folder / "bot.run", first["id"], told(folder / "bot.run"))


def check_numbers(tracked: Tracked, read: dict[str, list[tuple[int, float]]], exact: bool = True) -> None:
    "Everything that the history has is there, equal, and nothing comes twice."
    wanted = {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second", "validation/perplexity"}
    assert wanted <= tracked.numbers.keys()
    assert [step for step, _ in tracked.numbers["train/loss"]] == list(range(1, 13))
    for name, values in tracked.numbers.items():
        assert name in read, name
        mine = [(step, value) for step, value in read[name] if step > 0]  # step 0 was measured before the trainer began
        assert [s for s, _ in mine] == [s for s, _ in values], name
        assert [v for _, v in mine] == [v if exact else pytest.approx(v, rel=1e-6) for _, v in values], name
    near = [(step, pytest.approx(math.exp(value), rel=1e-5)) for step, value in tracked.numbers["train/loss"]]
    assert read["train/perplexity"] == near
    assert len(read["validation/loss"]) == len(tracked.numbers["validation/loss"]) + 1  # the untrained model's, at step 0
    assert all(step > 0 for step, _ in read["system/cpu_percent"])
    assert read["system/process_memory_bytes"][0][1] > 1e6


Numbers = dict[str, list[tuple[int, float]]]


def tensorboard_events(run_dir: Path, name: str) -> tuple[Numbers, dict[str, Any]]:
    "Scalars and texts."
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard" / name), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    return scalars, {tag: events.Tensors(tag) for tag in events.Tags()["tensors"]}


def test_tensorboard(tracked: Tracked) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    scalars, texts = tensorboard_events(tracked.run_dir, "bot")
    check_numbers(tracked, scalars, exact=False)  # TensorBoard keeps float32
    shown = EventMultiplexer().AddRunsFromDirectory(str(tracked.run_dir))
    assert list(shown.Runs()) == ["tensorboard/bot"], "what the killed process wrote is not shown as another run"
    assert tracked.id in texts["run/text_summary"][0].tensor_proto.string_val[0].decode()
    assert {"params/text_summary", "samples/text_summary", "artifact/bot/text_summary", "data/report/text_summary"} <= texts.keys()


def mlflow_client(folder: Path) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")


def mlflow_run(client: Any, run_id: str) -> tuple[Any, Numbers]:
    "The run with our id, and its numbers."
    [run] = client.search_runs([client.get_experiment_by_name("llmbot").experiment_id], f"tags.`llmbot.run_id` = '{run_id}'")
    names = run.data.metrics
    return run, {name: sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)) for name in names}


def test_mlflow(tracked: Tracked) -> None:
    client = mlflow_client(tracked.folder)
    run, read = mlflow_run(client, tracked.id)
    check_numbers(tracked, read)
    assert run.info.run_name == "bot"
    assert run.info.status == "FINISHED"
    assert run.data.metrics["train/loss"] == tracked.numbers["train/loss"][-1][1]
    assert run.data.params["training.method"] == "sft"
    assert run.data.params["facts.environment.versions.torch"]
    assert "fingerprint" in run.data.params["facts.data"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    assert run.data.params.get("facts.git.commit", "") == commit
    assert run.data.tags["artifact.bot"] == str(tracked.folder / "bot")
    tables = [f.path for f in client.list_artifacts(run.info.run_id, "samples")]
    assert tables == [f"samples/step-{step:08}.json" for step in (4, 8, 12)]
    table = json.loads(Path(client.download_artifacts(run.info.run_id, tables[-1])).read_text())
    assert table["columns"] == ["prompt", "answer"]
    assert table["data"][0][0] == "red fish"
    assert [f.path for f in client.list_artifacts(run.info.run_id, "config")] == ["config/config.yaml"]
    [report] = [f.path for f in client.list_artifacts(run.info.run_id, "data/report")]
    books = dict(json.loads(Path(client.download_artifacts(run.info.run_id, report)).read_text())["data"])
    assert (books["rows read"], books["rows kept"]) == ("48", "48")
    assert int(books["train: documents"]) + int(books["validation: documents"]) == 48
    kept = json.loads((tracked.run_dir / "data_report.json").read_text())
    assert kept["splits"]["train"]["tokens"] == int(books["train: tokens"])
    assert "fish" not in str(kept)  # none of the rows


def wandb_history(path: Path) -> tuple[dict[str, list[tuple[int, float]]], list[Any]]:
    from wandb.proto import wandb_internal_pb2 as pb

    records = []
    for data in leveldb_records(path.read_bytes()):
        records.append(pb.Record())
        records[-1].ParseFromString(data)
    read: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = row.get("_step", record.history.step.num)
            for name, value in row.items():
                if isinstance(value, int | float) and not name.startswith("_"):
                    read[name].append((int(step), value))
    return dict(read), records


def test_wandb(tracked: Tracked) -> None:
    [path] = (tracked.run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    assert path.name == f"run-{tracked.id}.wandb"
    read, records = wandb_history(path)
    check_numbers(tracked, read)
    [run] = [record.run for record in records if record.WhichOneof("record_type") == "run"][:1]
    assert (run.run_id, run.display_name, run.project, run.job_type) == (tracked.id, "bot", "llmbot", "sft")
    assert any("samples" in str(record.history) for record in records if record.WhichOneof("record_type") == "history")
    assert any(record.WhichOneof("record_type") == "artifact" or "artifact" in str(record.request) for record in records)


def comet_messages(run_dir: Path, run_id: str) -> tuple[Numbers, list[Any], list[str]]:
    "The numbers, all messages, and the names of the files beside them."
    [path] = (run_dir / "comet").glob("*.zip")
    assert path.name == f"{run_id}.zip"
    with zipfile.ZipFile(path) as archive:
        messages = [json.loads(line) for line in archive.read("messages.json").decode().splitlines()]
        names = archive.namelist()
    read: Numbers = defaultdict(list)
    for message in messages:
        if message["type"] == "metric_msg":
            metric = message["payload"]["metric"]
            read[metric["metricName"]].append((metric["step"], float(metric["metricValue"])))
    return dict(read), messages, names


def test_comet(tracked: Tracked) -> None:
    read, messages, names = comet_messages(tracked.run_dir, tracked.id)
    check_numbers(tracked, read)
    params = {m["payload"]["param"]["paramName"]: m["payload"]["param"]["paramValue"] for m in messages if m["type"] == "parameter_msg"}
    assert params["training.method"] == "sft"
    others = {m["payload"]["key"]: m["payload"]["value"] for m in messages if m["type"] == "log_other"}
    assert (others["Name"], others["run_id"], others["artifact/bot"]) == ("bot", tracked.id, str(tracked.folder / "bot"))
    assert len(names) > 3  # tables and the configuration


def test_the_readers_find_what_the_tools_find(tracked: Tracked) -> None:
    "The library's own readers, which need neither a server nor MLflow's client, against the trainer's history."
    records = local_records(tracked.run_dir, "bot", tracked.id)
    assert sorted(records) == ["comet", "history", "journal", "live", "mlflow", "tensorboard", "wandb"]
    assert records.pop("history")() == tracked.numbers
    assert records.pop("live")() == tracked.numbers
    for name, read in records.items():
        check_numbers(tracked, read(), exact=name != "tensorboard")
    client = mlflow_client(tracked.folder)
    run, _ = mlflow_run(client, tracked.id)
    assert records["mlflow"]().keys() == run.data.metrics.keys()
    assert not {"curr_step", "process duration"} & records["comet"]().keys()


def everything_in(path: Path) -> bytes:
    "All bytes below a path, archives unpacked."
    found = []
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        found.append(file.read_bytes())
        if file.suffix == ".zip" and file.stat().st_size > 100:
            with zipfile.ZipFile(file) as archive:
                found += [archive.read(name) for name in archive.namelist()]
    return b"\n".join(found)


def test_no_secret_reaches_a_tracker(tracked: Tracked) -> None:
    "Planted in the environment, the configuration, an address and a prompt; the prompt itself does arrive."
    places = [tracked.run_dir / name for name in ("tensorboard", "wandb", "comet", "tracking")]
    kept = {place.name: everything_in(place) for place in [*places, tracked.folder / "mlflow.db", tracked.folder / "mlflow-artifacts"]}
    for name, content in kept.items():
        for where, secret in PLANTED.items():
            assert secret.encode() not in content, f"the secret {where} is in {name}"
    assert all(b"[hidden]" in kept[name] for name in ("tensorboard", "tracking", "mlflow-artifacts"))


def test_nothing_waits(tracked: Tracked) -> None:
    assert not [*(tracked.run_dir / "tracking").glob("unsent-*")]
    steps = [call["step"] for call in read_calls(tracked.run_dir / "tracking" / "calls.jsonl") if "train/loss" in str(call["args"][0])]
    assert steps == list(range(1, 13))


class Down:
    "A tracker whose server is away until `up` is set."

    replays, up = False, False
    seen: list[int] = []

    def __init__(self, run: Any, settings: None) -> None: ...
    def start(self) -> None:
        if not self.up:
            raise ConnectionError("no network")

    def log_params(self, params: Any) -> None: ...
    def log_table(self, *args: Any) -> None: ...
    def log_artifact(self, *args: Any) -> None: ...
    def log_metrics(self, metrics: dict[str, float], step: int, time: float) -> None:
        if "train/loss" in metrics:
            self.seen.append(step)

    def finish(self) -> None: ...


def test_what_a_tracker_did_not_take_is_sent_later(tmp_path: Path) -> None:
    register_tracker("down")(Down)
    given = overrides(tmp_path, "bot", **{"monitoring.trackers": "[down]", "training.max_steps": 3})
    with pytest.warns(UserWarning, match="nothing waits for it") as warned:
        train(load_config(None, given, env={}), console=QUIET)
    assert len([w for w in warned if "Tracker 'down'" in str(w.message)]) == 1
    waiting = read_calls(tmp_path / "bot.run" / "tracking" / "unsent-down.jsonl")
    assert [call["step"] for call in waiting if "train/loss" in str(call["args"][0])] == [1, 2, 3]
    Down.up = True
    assert send_again(tmp_path / "bot.run") == {"down": (len(waiting), 0)}
    assert Down.seen == [1, 2, 3]
    assert send_again(tmp_path / "bot.run") == {}
    with pytest.raises(TrainingError, match="no run that trackers know"):
        send_again(tmp_path)


class Unwritable(Down):
    "A tracker that is away, beside a disk that takes neither the journal nor what waits."

    up = False

    def __init__(self, run: Any, settings: None) -> None:
        for name in ("calls.jsonl", "unsent-unwritable.jsonl", "artifacts"):
            (run.log_dir / "tracking").mkdir(exist_ok=True)
            (run.log_dir / "tracking" / name).touch() if name == "artifacts" else (run.log_dir / "tracking" / name).mkdir()


def test_a_disk_that_takes_nothing_ends_no_run(tmp_path: Path) -> None:
    "One warning of each kind, and the count at the end; the bot is made."
    register_tracker("unwritable")(Unwritable)
    said = io.StringIO()
    given = overrides(tmp_path, "bot", **{"monitoring.trackers": "[unwritable]", "training.max_steps": 3})
    with pytest.warns(UserWarning, match="has calls waiting that the disk does not take") as warned:
        found = train(load_config(None, given, env={}), console=Console(file=said, width=500))
    texts = [str(w.message) for w in warned]
    for part in ("has calls waiting that the disk does not take", "was not written into the trackers' journal", "artifact config was not"):
        assert len([text for text in texts if part in text]) == 1, part
    assert (found.bot / "llmbot.json").is_file()
    for part in ("Tracker 'unwritable' did not take", "trackers' journal, from which a resumed run would tell it again: "):
        assert part in said.getvalue(), part


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("broken"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_how_a_run_ended(error: BaseException, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "MLflow and W&B say so too."

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr("llmbot.training.trainer.train_under_control", fail)
    given = overrides(tmp_path, "bot", **{"monitoring.trackers": "[mlflow, wandb]"})
    with pytest.raises(type(error)):
        train(load_config(None, given, env={}), console=QUIET)
    [run] = mlflow_client(tmp_path).search_runs([e.experiment_id for e in mlflow_client(tmp_path).search_experiments()])
    assert run.info.status == status
    [record] = tmp_path.rglob("run-*.wandb")
    codes = [r.exit.exit_code for r in wandb_history(record)[1] if r.WhichOneof("record_type") == "exit"]
    assert codes == [1 if status == "FAILED" else 130]


SLOW = """
import threading
seen = []
class Slow:
    "A tracker that hangs at step 3, and cannot be told anything twice."
    replays, hangs = False, True
    def __init__(self, run, settings): pass
    def start(self): pass
    def log_metrics(self, metrics, step, time):
        if self.hangs and step == 3: threading.Event().wait()
        seen.append(step)
    def finish(self): pass
"""
KILLED_EARLY = """
import json, os, signal, sys, time
from pathlib import Path
from llmbot.monitoring.experiment_tracker import TRACKING, TrackedRun, create_trackers, identify
import slow_tracker
home = Path(sys.argv[1])
run = TrackedRun(**identify(home, "bot", "sft"), log_dir=home, shared_dir=home.parent)
group = create_trackers(["slow_tracker:Slow", "tensorboard"], run, home / TRACKING)
group.begin()
for step in range(1, 6): group.log_metrics({"train/loss": 1 / step}, step)
while slow_tracker.seen != [1, 2]: time.sleep(0.01)
print("hangs", flush=True)
if sys.stdin.readline(): os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_run_had_in_memory_is_sent_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    "Nothing waits on disk, and yet the journal has five steps: one tracker lacks three of them, the other may lack any."
    (tmp_path / "slow_tracker.py").write_text(SLOW)
    (home := tmp_path / "bot.run").mkdir()
    (home / "config.yaml").write_text('monitoring: {trackers: ["slow_tracker:Slow", tensorboard]}')
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    with subprocess.Popen([sys.executable, "-c", KILLED_EARLY, str(home)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          env=environment) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "hangs\n"
        with pytest.raises(TrainingError, match="still goes on"):
            send_again(home)
        process.communicate("now\n", timeout=60)
    monkeypatch.syspath_prepend(str(tmp_path))
    import slow_tracker  # type: ignore[import-not-found]

    monkeypatch.setattr(slow_tracker.Slow, "hangs", False)
    assert send_again(home) == {"slow_tracker:Slow": (3, 0), "tensorboard": (5, 0)}
    assert slow_tracker.seen == [3, 4, 5]
    assert [step for step, _ in tensorboard_events(home, "bot")[0]["train/loss"]] == [1, 2, 3, 4, 5]
    assert send_again(home) == {}


def test_the_command_sends_what_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    "MLflow's data base cannot be made while a run goes on: all of it waits, and `llmbot tracking sync` brings it, to the last value."
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, where a directory should be")
    given = overrides(tmp_path, "bot", **{"monitoring.trackers": "[tensorboard, mlflow]", "training.max_steps": 3,
                                          "tracker.mlflow": f"{{uri: 'sqlite:///{blocked}/mlflow.db', experiment: late}}"})  # fmt: skip
    with pytest.warns(UserWarning, match="Tracker 'mlflow' failed in"):
        train(load_config(None, given, env={}), console=QUIET)
    waiting = read_calls(tmp_path / "bot.run" / "tracking" / "unsent-mlflow.jsonl")
    assert len(waiting) == len(read_calls(tmp_path / "bot.run" / "tracking" / "calls.jsonl"))
    count = len(waiting)
    with pytest.warns(UserWarning, match="Tracker 'mlflow'"):
        assert send_again(tmp_path / "bot.run") == {"mlflow": (count, count)}
    blocked.unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["tracking", "sync", str(tmp_path / "bot"), "--json"])
    assert (left.value.code or 0, json.loads(capsys.readouterr().out)) == (0, {"mlflow": {"waited": count, "left": 0}})
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{blocked}/mlflow.db")
    [run] = client.search_runs([client.get_experiment_by_name("late").experiment_id])
    for name, values in told(tmp_path / "bot.run").items():
        assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name) if m.step] == values, name
    assert run.info.status == "FINISHED"
    assert run.data.tags["artifact.bot"] == str(tmp_path / "bot")


class Shelf:
    "A tracker that keeps figures in a directory of all runs, which is there or not."

    replays = False

    def __init__(self, run: TrackedRun, settings: None) -> None:
        self.run, self.file = run, run.shared_dir / "shelf" / f"{run.id}.jsonl"

    def start(self) -> None:
        self.file.touch()

    def log_params(self, params: Any) -> None: ...
    def log_table(self, *args: Any) -> None: ...
    def log_artifact(self, *args: Any) -> None: ...
    def log_metrics(self, metrics: dict[str, float], step: int, time: float) -> None:
        self.file.write_text(json.dumps(metrics))

    def finish(self) -> None:
        self.file.rename(self.file.with_name(f"{self.run.outcome}.jsonl"))


def test_paths_begin_where_the_run_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Relative paths in a recipe mean the same to a run, to the command that sends the rest later, and to who reads its records."
    register_tracker("shelf")(Shelf)
    (work := tmp_path / "work").mkdir()
    (other := tmp_path / "other").mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("PWD", str(work))  # as a shell does: it is no password
    given = overrides(Path(), "bot", **{"monitoring.trackers": "[tensorboard, mlflow, shelf]", "training.max_steps": 2,
                                        "monitoring.log_dir": "logs", "tracker.mlflow.uri": "sqlite:///all.db"})  # fmt: skip
    with pytest.warns(UserWarning, match="Tracker 'shelf' failed in"):
        train(load_config(None, given, env={}), console=QUIET)
    assert list(Path("bot.run/tracking").glob("unsent-*")) == [Path("bot.run/tracking/unsent-shelf.jsonl")]
    Path("logs/shelf").mkdir()
    monkeypatch.chdir(other)
    assert [left for _, left in send_again("../work/bot.run").values()] == [0]
    assert [path.name for path in (work / "logs" / "shelf").iterdir()] == ["finished.jsonl"]
    assert (list(other.iterdir()), Path.cwd()) == ([], other)
    [run] = find_runs(work)
    assert {"tensorboard", "mlflow"} <= records_of(run).keys()
    assert read_curves(run, "tensorboard").keys() == read_curves(run, "mlflow").keys()


def test_the_command_sends_what_waits_of_an_evaluation(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    "An evaluation is told in the same way: the line on the screen names the directory, and its run is complete in the end."
    from llmbot.evaluation.report import EvaluationReport
    from llmbot.evaluation.tracking import numbers_of, track

    register_tracker("shelf")(Shelf)
    monkeypatch.chdir(tmp_path)
    report = EvaluationReport(url := "http://host/v1", ["rows.jsonl"], 8, {"exact_match": 0.25})
    with pytest.warns(UserWarning, match="Tracker 'shelf' failed in"):
        [line] = track(report, url, Config(monitoring=MonitoringConfig(trackers=["tensorboard", "shelf"])))
    [home] = Path("http---host-v1.run/evaluations").iterdir()
    assert line == f"Tracker 'shelf' did not take 3 calls. Send them later: llmbot tracking sync {home}"
    Path("shelf").mkdir()
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["tracking", "sync", str(home), "--json"])
    assert (left.value.code or 0, json.loads(capsys.readouterr().out)) == (0, {"shelf": {"waited": 3, "left": 0}})
    assert json.loads(Path("shelf/finished.jsonl").read_text()) == numbers_of(report)


def pixels(data: bytes) -> Any:
    import numpy as np
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_figures_and_copies_of_bots(tracked: Tracked, tmp_path: Path) -> None:
    "A figure is the same picture in all four, and a bot that is copied the same files, to the last byte."
    import matplotlib.pyplot as plt
    import numpy as np
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figure, axes = plt.subplots(figsize=(2, 1))
    axes.plot([3, 1, 2])
    run = TrackedRun("pictures", uuid.uuid4().hex, tmp_path / "run", tmp_path)
    group = create_trackers(FOUR, run, tmp_path / "tracking")
    group.begin()
    group.log_metrics({"a": 1.0}, 7)
    group.log_figure("curves/loss", figure, 7)
    plt.close(figure)
    group.log_artifact("bot", tracked.folder / "bot", copy=True)
    group.finish()
    assert group.unsent == dict.fromkeys(FOUR, 0)
    [png] = (tmp_path / "tracking" / "figures").glob("*.png")
    picture = pixels(png.read_bytes())
    assert picture.std() > 10  # there is something on it
    files = {str(p.relative_to(tracked.folder / "bot")): p.read_bytes() for p in (tracked.folder / "bot").rglob("*") if p.is_file()}
    assert {"model.safetensors", "llmbot.json"} <= files.keys()

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "pictures"), size_guidance={"images": 0, "tensors": 0}).Reload()
    [image] = events.Images("curves/loss")
    assert image.step == 7
    assert np.array_equal(pixels(image.encoded_image_string), picture)
    [where] = events.Tensors("artifact/bot/text_summary")
    copy = Path(where.tensor_proto.string_val[0].decode())
    assert {str(p.relative_to(copy)): p.read_bytes() for p in copy.rglob("*") if p.is_file()} == files

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [found] = client.search_runs([client.get_experiment_by_name("llmbot").experiment_id])
    shown = Path(client.download_artifacts(found.info.run_id, "curves/loss/step-00000007.png"))
    assert np.array_equal(pixels(shown.read_bytes()), picture)
    home = Path(client.download_artifacts(found.info.run_id, "bot"))
    assert {str(p.relative_to(home)): p.read_bytes() for p in home.rglob("*") if p.is_file()} == files

    [image_file] = (tmp_path / "run" / "wandb").glob("offline-run-*/files/media/images/curves/*.png")
    assert np.array_equal(pixels(image_file.read_bytes()), picture)
    [record] = (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")
    artifacts = [r.artifact for r in wandb_history(record)[1] if r.WhichOneof("record_type") == "artifact"]
    [contents] = [a.manifest.contents for a in artifacts]
    digests = {name: base64.b64encode(hashlib.md5(data).digest()).decode() for name, data in files.items()}
    assert {entry.path: entry.digest for entry in contents} == digests

    with zipfile.ZipFile(tmp_path / "run" / "comet" / f"{run.id}.zip") as archive:
        everything = {name: archive.read(name) for name in archive.namelist()}
    assert any(data[:4] == b"\x89PNG" and np.array_equal(pixels(data), picture) for data in everything.values())
    assert {hashlib.md5(data).digest() for data in files.values()} <= {hashlib.md5(data).digest() for data in everything.values()}


@pytest.mark.server
def test_a_server_in_the_trackers(tracked: Tracked, tmp_path: Path) -> None:
    "What a server did, read back from MLflow and TensorBoard: the rates add up to the tokens of the answers."
    from mlflow import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cfg = Config(
        model=ModelConfig(device="cpu"),
        serving=ServingConfig(models=[str(tracked.folder / "bot")], port=0, admin_token="planted-token-0"),
        monitoring=MonitoringConfig(trackers=FOUR[:2], log_dir=str(tmp_path), serving_interval_s=0.2, resource_interval_s=0.1),
    )  # fmt: skip
    usage = []
    with running_server(cfg) as url:
        for length in (3, 5, 7):
            answer = httpx.post(f"{url}/generate", json={"prompt": "red", "max_new_tokens": length, "ignore_eos": True}, timeout=60)
            usage.append(answer.raise_for_status().json()["usage"])
        stats = httpx.get(f"{url}/stats").json()
    [home] = tmp_path.glob("serving-bot-*.run")
    who = identity(home)
    assert who
    assert (who["parent"], who["root"]) == (tracked.id, tracked.id)
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    [run] = client.search_runs([client.get_experiment_by_name("llmbot").experiment_id])
    read = {name: [m.value for m in client.get_metric_history(run.info.run_id, name)] for name in run.data.metrics}
    ends = read["serving/uptime_s"]
    assert ends == sorted(ends)
    spans = [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]
    for name, key in (("tokens", "completion_tokens"), ("prompt_tokens", "prompt_tokens")):
        total = sum(rate * span for rate, span in zip(read[f"serving/{name}_per_s"], spans, strict=True))
        assert total == pytest.approx(sum(one[key] for one in usage))
    assert sum(one["completion_tokens"] for one in usage) == 15
    assert read["serving/latency_s_p50"][-1] == stats["total"]["latency_s"]["p50"]
    assert read["system/process_memory_bytes"][-1] > 1e6
    assert (run.data.tags["llmbot.parent"], run.data.params["serving.port"], run.info.status) == (tracked.id, "0", "FINISHED")
    events = EventAccumulator(str(tmp_path / "tensorboard" / who["name"]), size_guidance={"scalars": 0}).Reload()
    assert [e.value for e in events.Scalars("serving/tokens_per_s")] == [pytest.approx(v, rel=1e-6) for v in read["serving/tokens_per_s"]]
    assert b"planted-token-0" not in everything_in(tmp_path)


STAGES: dict[str, dict[str, Any]] = {  # each goes on from the one before
    "scratch": {"data.train": "[stories.txt]", "data.validation": "[others.txt]", "data.validation_split": None},
    "sft": {},
    "lora": {"lora.merge": True},
    "dpo": {"data.train": "[pairs.jsonl]", "method.reference": "frozen"},
}


def write_chain_data(folder: Path) -> None:
    for name, first in (("stories", "The"), ("others", "A")):
        lines = [f"{first} {a} {b} saw the {b} {a}. " * 3 for a in ("red", "blue") for b in "abcdefghij"]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    pairs = [{"prompt": f"{a} {b}", "chosen": f"{b} {a}", "rejected": f"{a} {b} {a} {b}"} for a in ("red", "blue") for b in "abcdefghij"]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))


@pytest.mark.slow
def test_a_chain_of_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "Scratch, SFT, LoRA, DPO, in all four trackers at once: every number of every stage, and each stage below the one before."
    monkeypatch.chdir(tmp_path)
    write_chain_data(tmp_path)
    chain: list[dict[str, Any]] = []
    for stage, changes in STAGES.items():
        base = {"model.base": tmp_path / chain[-1]["name"], "model.preset": None, "model.vocab_size": None} if chain else {}
        given = overrides(tmp_path, stage, **{"training.method": stage, "training.max_steps": 4, "training.eval_steps": 2,
                                              "training.save_steps": 4, **base, **changes})  # fmt: skip
        train(load_config(None, given, env={}), console=QUIET)
        who = identity(tmp_path / f"{stage}.run")
        assert who
        chain.append(who)
    root, client, parents = chain[0]["id"], mlflow_client(tmp_path), [None, *(who["id"] for who in chain)]
    ours: dict[str, str] = {}  # our id -> MLflow's
    for who, parent in zip(chain, parents, strict=False):
        run_dir, numbers = tmp_path / f"{who['name']}.run", told(tmp_path / f"{who['name']}.run")
        assert (who["parent"], who["root"]) == (parent, root if parent else None)
        scalars, texts = tensorboard_events(run_dir, who["name"])
        run, in_mlflow = mlflow_run(client, who["id"])
        [record] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
        in_wandb, records = wandb_history(record)
        in_comet, messages, _ = comet_messages(run_dir, who["id"])
        assert [step for step, _ in numbers["train/loss"]] == [1, 2, 3, 4]
        assert ("train/perplexity" in in_mlflow) == (who["method"] != "dpo")  # whose loss is no likelihood
        for name, values in numbers.items():
            assert [(s, pytest.approx(v, rel=1e-6)) for s, v in values] == [pair for pair in scalars[name] if pair[0]], name
            for read in (in_mlflow, in_wandb, in_comet):
                assert [pair for pair in read[name] if pair[0]] == values, name
        ours[who["id"]] = run.info.run_id
        assert run.data.tags.get("mlflow.parentRunId") == (ours[parent] if parent else None)
        assert not parent or parent in texts["run/text_summary"][0].tensor_proto.string_val[0].decode()
        [begun] = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
        assert (begun.run_id, begun.run_group, begun.job_type) == (who["id"], root, who["method"])
        others = {m["payload"]["key"]: m["payload"]["value"] for m in messages if m["type"] == "log_other"}
        assert (others["parent"], others["root"]) == (parent or "", root if parent else "")
    check_evaluation_in_all(tmp_path, chain[-1])


def check_evaluation_in_all(folder: Path, who: dict[str, Any]) -> None:
    "The figures of an evaluation of the last bot, read back from each of the four, as a run below that of its training."
    from llmbot.evaluation.evaluate import evaluate_bot
    from llmbot.evaluation.tracking import numbers_of, track

    bot = folder / who["name"]
    report = evaluate_bot(bot, folder / "chats.jsonl", ["token_f1", "bits_per_byte"], model=ModelConfig(device="cpu"), max_new_tokens=4)
    cfg = Config(monitoring=MonitoringConfig(trackers=FOUR))
    assert track(report, bot, cfg) == []
    wanted = {name: [(0, value)] for name, value in numbers_of(report).items()}
    assert {"evaluation/token_f1", "evaluation/token_f1_low", "evaluation/bits_per_byte_high", "evaluation/rows"} <= wanted.keys()
    [home] = (folder / f"{who['name']}.run" / "evaluations").iterdir()
    name = f"{who['name']} evaluation"
    scalars, _ = tensorboard_events(home, name)
    client = mlflow_client(folder)
    [run] = client.search_runs([client.get_experiment_by_name("llmbot").experiment_id], f"attributes.run_name = '{name}'")
    _, in_mlflow = mlflow_run(client, run.data.tags["llmbot.run_id"])
    [record] = (home / "wandb").glob("offline-run-*/run-*.wandb")
    in_wandb, records = wandb_history(record)
    [archive] = (home / "comet").glob("*.zip")
    in_comet, messages, _ = comet_messages(home, archive.stem)
    for read in (in_mlflow, in_wandb, in_comet):
        assert {key: values for key, values in read.items() if key.startswith("evaluation/") and key in wanted} == wanted
    assert {key: scalars[key] for key in wanted} == {key: [(0, pytest.approx(value, rel=1e-6))] for key, [(_, value)] in wanted.items()}
    others = {m["payload"]["key"]: m["payload"]["value"] for m in messages if m["type"] == "log_other"}
    assert (run.data.tags["llmbot.parent"], others["parent"]) == (who["id"], who["id"])
    [begun] = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    assert (begun.run_id, begun.job_type) == (archive.stem, "evaluation")


def answer_of(command: list[str], url: str, folder: Path) -> str:
    "What a server answers, once it is up."
    alone = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # MLflow's would start four processes for jobs
    server = subprocess.Popen(command, cwd=folder, env=alone, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        for _ in range(1200):
            assert server.poll() is None, "the server ended"
            try:
                with urllib.request.urlopen(url, timeout=10) as response:
                    return response.read().decode()
            except OSError:
                time.sleep(0.1)
        raise AssertionError("the server did not come up")
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_tensorboard_serves_the_run(tracked: Tracked) -> None:
    port = free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(tracked.run_dir / "tensorboard"), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--load_fast=false"]
    url = f"http://127.0.0.1:{port}/data/plugin/scalars/scalars?run=bot&tag=train%2Floss"
    points = json.loads(answer_of(command, url, tracked.folder))
    assert [int(step) for _, step, _ in points] == list(range(1, 13))


def test_mlflow_serves_the_run(tracked: Tracked) -> None:
    port, client = free_port(), mlflow_client(tracked.folder)
    run, _ = mlflow_run(client, tracked.id)
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{tracked.folder / 'mlflow.db'}"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    url = f"http://127.0.0.1:{port}/api/2.0/mlflow/metrics/get-history?run_id={run.info.run_id}&metric_key=train/loss"
    history = json.loads(answer_of(command, url, tracked.folder))["metrics"]
    assert sorted((int(m["step"]), m["value"]) for m in history) == tracked.numbers["train/loss"]
