"""Configuration: round trips, precedence, reports of faults, secrets, and updates of a running server."""

import contextlib
import dataclasses
import json
import pickle
import re
import string
import subprocess
import sys
import threading
import types
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from pydantic.dataclasses import dataclass

from llmbot.core.config import Config, ServingConfig, TrainingConfig, check_config, method_settings
from llmbot.core.config import settings as all_settings
from llmbot.core.config_io import (
    RECIPES,
    LiveConfig,
    config_schema,
    hidden_settings,
    init_recipe,
    load_config,
    save_config,
    to_dict,
)
from llmbot.core.errors import ConfigError, LLMBotError
from llmbot.core.own_settings import TRACKER_SETTINGS
from llmbot.core.settings import NAMES_ELSEWHERE, STRICT, InvalidConfigError

SCHEMA = config_schema()
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# --- any valid configuration, drawn from the JSON schema ---------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
TOKEN = st.text(string.ascii_letters + string.digits + string.punctuation, min_size=8, max_size=20)
WORDS = ["null", "~", "true", "no", "1e-4", "12:30", "2024-01-01", "0x1F", "- a", "a: b", "# c", "[", "{}",
                          " x ", "x\n", "\t", "\x85", "\u2028", "\ufeff", "😀", "'", '"', "*a", "&a", "!!python/none", "%", "---"]
TRICKY = st.sampled_from(WORDS)


def values(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    "Values that a schema allows."
    if "anyOf" in schema:
        return st.one_of([values(s) for s in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema.get("writeOnly"):
        return TOKEN
    kind = schema["type"]
    if kind == "string":
        return st.from_regex(schema["pattern"], fullmatch=True) if "pattern" in schema else TEXT | TRICKY
    if kind == "integer":
        low = schema.get("minimum", schema.get("exclusiveMinimum", 0) + 1)
        return st.integers(low, min(schema.get("maximum", low + 10**6), low + 10**6))
    if kind == "number":
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum", schema.get("exclusiveMaximum"))
        return st.floats(low, high, exclude_min="exclusiveMinimum" in schema, exclude_max="exclusiveMaximum" in schema,
                         allow_nan=False, allow_infinity=False)
    if kind == "array":
        return st.lists(values(schema["items"]), max_size=3)
    if kind == "object":
        return st.dictionaries(TEXT | TRICKY, values(schema["additionalProperties"]), max_size=3)
    return {"boolean": st.booleans(), "null": st.none()}[kind]


FIELDS = {f"{name}.{field}": schema
          for name, section in SCHEMA["properties"].items() if "$ref" in section
          for field, schema in SCHEMA["$defs"][section["$ref"].rpartition("/")[2]]["properties"].items()}


NEEDS: dict[str, dict[str, Any]] = {  # settings that mean something only beside another
    "model.revision": {"model.base": "hf:a/b"}, "data.streaming": {"training.max_steps": 10**6},
    "monitoring.sample_steps": {"monitoring.sample_prompts": ["hi"]},
    "training.min_lr_ratio": {"training.lr_scheduler_type": "cosine_with_min_lr"}, "lora.merge_tolerance": {"lora.merge": True},
    "data.weights": {"data.train": ["a", "b"]}, "monitoring.otlp_endpoint": {"monitoring.opentelemetry": True},
    "model.quantization": {"model.base": "a", "training.method": "lora"}, "training.early_stopping_patience": {"training.eval_steps": 5},
    "training.keep_best": {"training.eval_steps": 5}, "training.group_by_length": {"training.packing": False},
    "training.max_tokens_per_batch": {"training.packing": False}, "serving.rate_limit_storage": {"serving.rate_limit": "60/minute"}}
LIKELY: dict[str, list[Any]] = {"model.head_dim": [32, 64], "serving.host": ["localhost", "::1"], "data.weights": [[1, 0.5]],
                                "monitoring.log_format": ["json"]}


@st.composite
def configs(draw: st.DrawFn) -> Config:
    "Any configuration: some settings are drawn, and those that contradict each other fall back to their default."
    keys = draw(st.lists(st.sampled_from(sorted(FIELDS)), unique=True, max_size=12))
    flat = {key: draw(values(FIELDS[key])) for key in keys}
    for key in keys:
        flat |= NEEDS.get(key, {}) | ({key: draw(st.sampled_from(LIKELY[key]))} if key in LIKELY else {})
    for _ in range(40):
        tree: dict[str, dict[str, Any]] = {}
        for key, value in flat.items():
            tree.setdefault(key.split(".")[0], {})[key.split(".")[1]] = value
        try:
            return Config(**tree)
        except InvalidConfigError as exc:  # only contradictions: the values come from the schema
            for fault in exc.faults:
                assert fault.given is None, fault
                for key in fault.key.split(", "):
                    flat.pop(key, None)
    raise AssertionError("contradictions do not end")


@QUICK
@given(cfg=configs())
def test_round_trip(cfg: Config, tmp_path: Path) -> None:
    save_config(cfg, tmp_path / "a.yaml", show_secrets=True)
    assert load_config(tmp_path / "a.yaml", env={}) == cfg
    assert Config(**to_dict(cfg, show_secrets=True)) == cfg
    assert check_config(cfg) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg


def test_every_tricky_word_survives(tmp_path: Path) -> None:
    cfg = Config(monitoring={"sample_prompts": [*WORDS, "\x85 two lines", "one\u2029two", "\x00"]},
                 data={"columns": dict.fromkeys(WORDS, "x")})
    save_config(cfg, tmp_path / "a.yaml")
    assert load_config(tmp_path / "a.yaml", env={}) == cfg


def test_schema_tells_the_defaults() -> None:
    tree = {section: {} for section in SCHEMA["properties"]}
    for key, schema in FIELDS.items():
        tree[key.split(".")[0]][key.split(".")[1]] = schema["default"]
        assert schema["description"]
    assert Config(**tree) == Config()


def test_round_trip_reaches_every_setting() -> None:
    "The strategy above is worth something only if it changes every setting at some time."
    touched: set[str] = set()

    @settings(max_examples=2000, deadline=None, derandomize=True, database=None)
    @given(cfg=configs())
    def collect(cfg: Config) -> None:
        for key, setting in all_settings().items():
            section, name = key.split(".")
            if getattr(getattr(cfg, section), name) != setting.default:
                touched.add(key)

    collect()
    assert touched == set(all_settings())


@QUICK
@given(cfg=configs())
def test_schema_accepts_what_is_valid(cfg: Config) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(json.dumps(to_dict(cfg, show_secrets=True))))


@pytest.mark.parametrize("tree", [{"training": {"learning_rate": -1}}, {"trainin": {}}, {"training": {"lr": 1}},
                                  {"data": {"train": [1]}}, {"model": {"dtype": "int4"}}, {"model": {"device": "gpu"}},
                                  {"serving": {"port": 70000}}, {"data": {"columns": {"a": 1}}}, {"serving": 1}])
def test_schema_refuses_what_is_not(tree: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(tree)
    with pytest.raises(InvalidConfigError):
        Config(**tree)


# --- precedence --------------------------------------------------------------------------------------------------------

@QUICK
@given(layers=st.fixed_dictionaries({}, optional={name: st.integers(1, 10**6) for name in ("file", "env", "override")}))
def test_the_later_source_wins(layers: dict[str, int], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("training:\n  seed: 5\n" + (f"  save_steps: {layers['file']}\n" if "file" in layers else ""))
    env = {"LLMBOT_TRAINING__SAVE_STEPS": str(layers["env"])} if "env" in layers else {}
    overrides = [f"training.save_steps={layers['override']}"] if "override" in layers else []
    cfg = load_config(path, overrides, env)
    assert cfg.training.save_steps == layers.get("override", layers.get("env", layers.get("file", 200)))
    assert cfg.training.seed == 5
    live = LiveConfig(cfg)
    assert live.update({"serving.top_p": 0.5}).serving.top_p == 0.5
    assert live.current.training == cfg.training


@pytest.fixture
def nudge(monkeypatch: pytest.MonkeyPatch) -> None:
    "A made-up training method with settings of its own."
    from pydantic import Field
    from pydantic.dataclasses import dataclass

    from llmbot.core import own_settings
    from llmbot.core.settings import STRICT, section

    @section("method")
    @dataclass(kw_only=True, config=STRICT)
    class NudgeSettings:
        strength: float = Field(default=0.1, gt=0, description="How hard")
        kinds: list[str] = Field(default_factory=list, description="Which")

    monkeypatch.setitem(own_settings.METHOD_SETTINGS, "nudge", NudgeSettings)


@pytest.mark.usefixtures("nudge")
def test_settings_of_a_method(tmp_path: Path) -> None:
    "They come from the same sources, and their faults have the same places, as all others."
    path = tmp_path / "recipe.yaml"
    path.write_text("training:\n  method: nudge\nmethod:\n  strength: 0\n  strenght: 2\n")
    with pytest.raises(InvalidConfigError) as caught:
        load_config(path, env={})
    assert [(f.key, f.line) for f in caught.value.faults] == [("method.strength", 4), ("method.strenght", 5)]
    assert "did you mean 'method.strength'" in str(caught.value)
    cfg = load_config(None, ["training.method=nudge", "method.kinds=[a, b]"], {"LLMBOT_METHOD__STRENGTH": "0.5"})
    assert cfg.method == {"kinds": ["a", "b"], "strength": "0.5"}
    save_config(cfg, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", env={}) == cfg
    with pytest.raises(InvalidConfigError, match="environment variable LLMBOT_METHOD__KIND"):
        load_config(None, ["training.method=nudge"], {"LLMBOT_METHOD__KIND": "a"})
    with pytest.raises(InvalidConfigError, match="has no settings of its own"):
        load_config(None, ["training.method=sft", "method.strength=1"], {})


def test_the_environment_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMBOT_SERVING__PORT", "1234")
    monkeypatch.setenv("LLMBOT_SHARED", "left/alone")
    monkeypatch.setenv("LLMBOT_SOMETHING__ELSE", "left alone")
    assert load_config().serving.port == 1234


@pytest.mark.parametrize(("text", "expected"), [
    ("1e-4", 1e-4), ("1E-4", 1e-4), ("1.0e-4", 1e-4), ("'1e-4'", 1e-4), ("0.0001", 1e-4), ("3", 3.0), ("null", None), ("~", None),
    ("", None)])
def test_numbers_as_people_write_them(text: str, expected: float | None, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"training:\n  learning_rate: {text}\n")
    assert load_config(tmp_path / "r.yaml", env={}).training.learning_rate == expected
    if text and "'" not in text:
        assert load_config(None, [f"training.learning_rate={text}"], {}).training.learning_rate == expected
        assert load_config(None, (), {"LLMBOT_TRAINING__LEARNING_RATE": text}).training.learning_rate == expected


@pytest.mark.parametrize("name", ["2024", "1.10", "no", "on", "true", "2024-01-01", "12:30", "0x10", "1e3"])
def test_a_name_stays_as_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"monitoring:\n  run_name: {name}\n")
    assert load_config(tmp_path / "r.yaml", env={}).monitoring.run_name == name


@pytest.mark.parametrize(("text", "expected"), [
    ("'null'", "null"), ('"two\\nlines"', "two\nlines"), ("'it''s'", "it's"), ("'a' or 'b'", "'a' or 'b'"), ("'", "'"), ("''x", "''x")])
def test_an_override_may_be_quoted(text: str, expected: str) -> None:
    assert load_config(None, [f"data.system_prompt={text}"], {}).data.system_prompt == expected
    assert load_config(None, (), {"LLMBOT_DATA__SYSTEM_PROMPT": text}).data.system_prompt == expected


@QUICK
@given(text=(TEXT | TRICKY).filter(lambda t: t[0] not in "'\""))
def test_an_override_takes_any_text(text: str) -> None:
    expected = None if text in ("null", "~") else text
    assert load_config(None, [f"data.system_prompt={text}"], {}).data.system_prompt == expected


@pytest.mark.parametrize(("text", "expected"), [
    ("a.txt", ["a.txt"]), ("[a.txt, 'b, c.txt']", ["a.txt", "b, c.txt"]), ("[]", []), ("a, b.txt", ["a, b.txt"])])
def test_lists_as_text(text: str, expected: list[str]) -> None:
    assert load_config(None, [f"data.train={text}"], {}).data.train == expected
    assert load_config(None, (), {"LLMBOT_DATA__TRAIN": text}).data.train == expected


def test_mappings_as_text() -> None:
    assert load_config(None, ["data.columns={prompt: question, 'a: b': c}"], {}).data.columns == {"prompt": "question", "a: b": "c"}


# --- faults ------------------------------------------------------------------------------------------------------------

def faults(*args: Any) -> dict[str, tuple[int | None, str | None]]:
    with pytest.raises(InvalidConfigError) as info:
        load_config(*args)
    assert info.value.exit_code == 2
    assert all(str(fault) in str(info.value) for fault in info.value.faults)
    return {f.key: (f.line, f.suggestion) for f in info.value.faults}


def test_one_report_of_everything(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("""\
# a comment
training:
  learning_rate: fast
  epochs: 3

  method: sft
  method: scratch
data:
  train:
    - a.txt
    -
  on_bad_row: ignore
serving: {port: 99999, host: 0.0.0.0}
learning_rate: 1
""")
    found = faults(path, ["model.devise=cpu", "training.seed=-1", "data.columns={a"], {"LLMBOT_MODEL__DTYPE": "int3"})
    assert found == {
        "training.learning_rate": (3, None), "training.epochs": (4, "training.num_train_epochs"),
        "training.method": (7, None), "data.train.1": (11, None), "data.on_bad_row": (12, None), "serving.port": (13, None),
        "learning_rate": (14, "training.learning_rate"), "model.devise": (None, "model.device"), "training.seed": (None, None),
        "data.columns": (None, None), "model.dtype": (None, None)}


def test_a_fault_names_its_source(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model:\n  preset: tiny\n")
    with pytest.raises(InvalidConfigError, match=r"environment variable LLMBOT_TRAINING__MAX_STEPS: training.max_steps: got '0'"):
        load_config(path, (), {"LLMBOT_TRAINING__MAX_STEPS": "0"})
    with pytest.raises(InvalidConfigError, match=r"recipe.yaml:2: model.preset, model.depth"):
        load_config(path, ["model.depth=3"], {})


@pytest.mark.parametrize(("content", "message"), [
    (b"", "is empty"), (b"# only this\n", "is empty"), (b"- a\n", ":1: the recipe"), (b"just text\n", ":1: the recipe"),
    (b"a: [1\nb: 2\n", ":2: syntax"), (b"a:\n\tb: 1\n", ":2: syntax"), (b"a: 1\n---\nb: 2\n", ":2: syntax"),
    (b"a: \xff\n", ":1: byte 0xff"), (b"a: 1\nb: \x00\n", ":2: syntax"), (b"a: &x 1\nb: *x\n", "aliases"),
    (b"x" * 1_000_001, "too large"), (b"? [a]\n: b\n", "a key must be a name"), (b"?", ": unknown setting"),
    (b"modle:", "did you mean 'model'?"), (b"self: 1\n", "self: unknown setting"),
    (b"training:\n  self: 1\n", ":2: training.self: unknown setting"), (b"a: " + b"[" * 5000, "nested too deeply")])
def test_broken_files(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as info:
        load_config(tmp_path / "r.yaml", env={})
    assert message in str(info.value)


def test_names_of_other_trainers_are_known() -> None:
    assert all(key in all_settings() for keys in NAMES_ELSEWHERE.values() for key in keys)
    for key, meant in [("training.lr", "training.learning_rate"), ("data.path", "data.train"), ("model.path", "model.base")]:
        with pytest.raises(ConfigError, match=f"{re.escape(key)}: unknown setting; did you mean '{re.escape(meant)}'"):
            load_config(None, [f"{key}=1"], {})


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file.*config init"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(tmp_path)


@QUICK
@given(content=st.binary(max_size=60) | TEXT.map(str.encode))
def test_no_file_breaks_the_reader(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    try:
        cfg = load_config(tmp_path / "r.yaml", env={})
    except LLMBotError:
        return
    written = yaml.safe_load(content)  # the one thing that is right by chance: the name of a section, with nothing below it
    assert cfg == Config()
    assert written
    assert not any(written.values())
    assert written.keys() <= {field.name for field in dataclasses.fields(Config)}


@QUICK
@given(at=st.integers(0, 10**4), length=st.integers(0, 5), new=TEXT | TRICKY, method=st.sampled_from(sorted(RECIPES)))
def test_no_slip_in_a_recipe_breaks_the_reader(at: int, length: int, new: str, method: str, tmp_path: Path) -> None:
    text = init_recipe(method)
    at %= len(text)
    (tmp_path / "r.yaml").write_text(text[:at] + new + text[at + length:], encoding="utf-8")
    with contextlib.suppress(ConfigError):  # and nothing else
        assert isinstance(load_config(tmp_path / "r.yaml", env={}), Config)


# --- the settings themselves -------------------------------------------------------------------------------------------

def test_every_setting_is_described_and_checked() -> None:
    for key, setting in all_settings().items():
        assert len(setting.description) >= 10, f"{key} needs a description"
        section, name = key.split(".")
        cls = type(getattr(Config(), section))
        with pytest.raises(InvalidConfigError) as info:
            cls(**{name: object()})
        assert [f.key for f in info.value.faults] == [key]
        assert setting.expected in info.value.faults[0].allowed


def test_mutable_settings_are_those_of_a_running_server() -> None:
    assert {k for k, s in all_settings().items() if s.mutable} == {f"serving.{n}" for n in (
        "max_concurrent_requests", "max_queue_size", "max_queue_tokens", "request_timeout_s", "stall_timeout_s", "max_new_tokens",
        "max_new_tokens_limit", "max_answers", "temperature", "top_p", "memory_budget_gb", "drain_s", "conversation_days")}


def test_a_refused_assignment_changes_nothing() -> None:
    training = TrainingConfig(max_steps=10)
    for name, value in (("warmup_steps", 11), ("max_steps", 0), ("method", ""), ("unknown", 1)):
        with pytest.raises(InvalidConfigError):
            setattr(training, name, value)
    assert training == TrainingConfig(max_steps=10)


@pytest.mark.parametrize("method", sorted(RECIPES))
@pytest.mark.parametrize("full", [False, True])
def test_recipes_load_again(method: str, full: bool, tmp_path: Path) -> None:
    text = init_recipe(method, full)
    (tmp_path / "r.yaml").write_text(text)
    cfg = check_config(load_config(tmp_path / "r.yaml", env={}), "train")
    assert cfg.training.method == method
    if full:  # with every comment of a setting taken away it says the defaults, and still has no fault but contradictions
        lines = [line.replace("# ", "", 1) if line.startswith("  # ") and ": " in line and
                 line.split(":")[0].removeprefix("  # ") in {k.split(".")[1] for k in all_settings(method)} else line
                 for line in text.splitlines()]
        assert "  #   # " in text  # the meaning of a tracker's setting
        lines = [line.replace("# ", "", 1) if re.match(r"  #( [a-z]+:$|   [a-z_]+: )", line) else line for line in lines]
        tree = yaml.safe_load("\n".join(lines))
        nested = {f"tracker.{name}.{field}": value for name, fields in tree.pop("tracker").items() for field, value in fields.items()}
        everything = all_settings(method, trackers=TRACKER_SETTINGS)
        assert nested == {key: setting.default for key, setting in everything.items() if key.startswith("tracker.")}
        names = {section: set(fields) for section, fields in tree.items()}
        assert {f"{section}.{name}" for section in names for name in names[section]} == set(all_settings(method))
        (tmp_path / "r.yaml").write_text("\n".join(lines))
        again = load_config(tmp_path / "r.yaml", env={})
        assert dataclasses.replace(again, method=cfg.method, tracker={}) == cfg
        assert (own := method_settings(method)) is None or own(**again.method) == own(**cfg.method)


@dataclass(kw_only=True, config=STRICT)
class Vault:
    password: SecretStr | None = None
    place: str = "here"


class VaultTracker:
    Settings = Vault


def test_settings_of_trackers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    "From a recipe, the environment and overrides; checked by the schema as by the trackers' own classes; secrets of one's own stay here."
    assert all_settings(trackers=["mlflow"])["tracker.mlflow.experiment"].default == "llmbot"
    overrides = ["tracker.mlflow.uri=http://h:5000", "tracker.mlflow.experiment='1.10'"]
    cfg = load_config(None, overrides, {"LLMBOT_TRACKER__COMET__PROJECT": "x"})
    assert cfg.tracker == {"mlflow": {"uri": "http://h:5000", "experiment": "1.10"}, "comet": {"project": "x"}}
    with pytest.raises(InvalidConfigError) as caught:
        load_config(None, ["tracker.mlflow.uri=http://me:password@h", "tracker.wandb.mod=x", "tracker.tensorboard.x=1"], {})
    assert {fault.key for fault in caught.value.faults} == {"tracker.mlflow.uri", "tracker.wandb.mod", "tracker.tensorboard.x"}
    assert "password@" not in str(caught.value)
    for tracker, valid in (({"wandb": {"mode": "online"}}, True), ({"wandb": {"mode": "on"}}, False), ({"comet": {"modes": "x"}}, False)):
        assert jsonschema.Draft202012Validator(config_schema()).is_valid({"tracker": tracker}) == valid
    monkeypatch.setitem(sys.modules, "my.vault", types.SimpleNamespace(Tracker=VaultTracker))
    monkeypatch.setitem(sys.modules, "my", types.SimpleNamespace())
    cfg = load_config(None, ["tracker.my.vault:Tracker.password=correct-horse", "tracker.my.vault:Tracker.place=there"], {})
    assert cfg.tracker == {"my.vault:Tracker": {"password": "correct-horse", "place": "there"}}
    assert hidden_settings(cfg) == ["tracker.my.vault:Tracker.password"]
    save_config(cfg, tmp_path / "r.yaml")
    assert "correct-horse" not in (tmp_path / "r.yaml").read_text()
    assert load_config(tmp_path / "r.yaml", env={}).tracker == {"my.vault:Tracker": {"place": "there"}}


# --- secrets and the disk ----------------------------------------------------------------------------------------------

@QUICK
@given(token=TOKEN.filter(lambda t: not any(t in word for word in ("expected", "characters"))))
def test_a_secret_stays_secret(token: str, tmp_path: Path) -> None:
    token = f"sec-{token}"
    cfg = Config(serving=ServingConfig(token=SecretStr(token)))
    save_config(cfg, tmp_path / "a.yaml")
    assert token not in (tmp_path / "a.yaml").read_text()
    assert token not in repr(cfg) + str(to_dict(cfg)) + json.dumps(to_dict(cfg))
    assert to_dict(cfg, show_secrets=True)["serving"]["token"] == token
    save_config(cfg, tmp_path / "b.yaml", show_secrets=True)
    assert (tmp_path / "b.yaml").stat().st_mode & 0o077 == 0
    bad = f"{token} with a space"
    for attempt in (lambda: load_config(None, [f"serving.token={bad}"], {}),
                    lambda: load_config(None, (), {"LLMBOT_SERVING__TOKEN": bad}),
                    lambda: ServingConfig(token=bad), lambda: LiveConfig(cfg).update({"serving.token": bad})):
        with pytest.raises(InvalidConfigError) as info:
            attempt()
        assert token not in str(info.value) + repr(info.value.faults) + str(info.value.__cause__)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    "A limit on file size fails a write as a full disk does."
    path = tmp_path / "a.yaml"
    save_config(Config(), path)
    before = path.read_text()
    code = ("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
            "from llmbot.core.config import Config; from llmbot.core.config_io import save_config\n"
            "from llmbot.core.errors import ConfigError\n"
            f"try: save_config(Config(training={{'seed': 1}}), {str(path)!r})\n"
            "except ConfigError as exc: print(exc)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a.yaml cannot be written: File too large" in done.stdout
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"]


# --- a running server --------------------------------------------------------------------------------------------------

def test_an_update_is_all_or_nothing() -> None:
    live, seen = LiveConfig(Config()), []
    live.on_change(lambda old, new: seen.append(new))
    with pytest.raises(InvalidConfigError) as info:
        live.update({"serving.temperature": 1.5, "serving.port": 9, "serving.max_new_tokens": 10**6, "serving.tops": 1})
    assert [f.key for f in info.value.faults] == ["serving.port", "serving.tops", "serving.max_new_tokens, "
                                                  "serving.max_new_tokens_limit"]
    assert live.current == Config()
    assert seen == []


@QUICK
@given(cfg=configs(), data=st.data())
def test_only_mutable_settings_change(cfg: Config, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(FIELDS)))
    section, name = key.split(".")
    old = getattr(getattr(cfg, section), name)
    value = data.draw(values(FIELDS[key]).filter(lambda v: v != (old.get_secret_value() if isinstance(old, SecretStr) else old)))
    live = LiveConfig(cfg)
    try:
        new = live.update({key: value})
    except InvalidConfigError as exc:
        refused = str(exc)
        assert not all_settings()[key].mutable or "limit" in refused
        assert live.current == cfg
    else:
        assert all_settings()[key].mutable
        tree = dataclasses.asdict(cfg)
        tree[section][name] = value
        assert new == live.current == Config(**tree)


def test_threads_see_whole_updates() -> None:
    "Two settings that are always updated together are never seen apart, and listeners hear each change in order."
    live = LiveConfig(Config(serving={"max_new_tokens": 10, "max_new_tokens_limit": 10}))
    heard: list[tuple[int, int]] = []
    live.on_change(lambda old, new: heard.append((old.serving.max_new_tokens, new.serving.max_new_tokens)))
    done, torn = threading.Event(), []

    def read() -> None:
        while not done.is_set():
            serving = live.current.serving
            if serving.max_new_tokens != serving.max_new_tokens_limit:
                torn.append(serving)

    def write(base: int) -> None:
        for n in range(base, base + 50):
            live.update({"serving": {"max_new_tokens": n, "max_new_tokens_limit": n}})

    readers = [threading.Thread(target=read) for _ in range(2)]
    writers = [threading.Thread(target=write, args=(base,)) for base in (100, 200, 300)]
    for thread in readers + writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    for thread in readers:
        thread.join()
    assert torn == []
    assert len(heard) == 150
    assert [old for old, _ in heard] == [10, *(new for _, new in heard[:-1])]


def test_a_failing_listener_does_not_silence_the_others() -> None:
    live, heard = LiveConfig(Config()), []

    def fail(old: Config, new: Config) -> None:
        raise RuntimeError("listener")

    live.on_change(fail)
    stop = live.on_change(lambda old, new: heard.append(new.serving.top_p))
    with pytest.raises(ExceptionGroup) as info:
        live.update({"serving.top_p": 0.5})
    assert isinstance(info.value.exceptions[0], RuntimeError)
    assert heard == [0.5]
    assert live.current.serving.top_p == 0.5
    stop()
    with pytest.raises(ExceptionGroup):
        live.update({"serving.top_p": 0.6})
    assert heard == [0.5]
