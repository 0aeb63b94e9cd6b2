"""core.preflight: each known trap is found, and what is shown can neither forge colours nor HTML."""

import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console
from test_data_processor import CHAT, make_chat, prepare, talk, write

from llmbot.core.chat import ChatFormat
from llmbot.core.chat_template import CHATML_TEMPLATE
from llmbot.core.config import DataConfig
from llmbot.core.data_processor import prepare_data
from llmbot.core.data_report import SplitStats
from llmbot.core.errors import DataError
from llmbot.core.preflight import PreflightReport, preflight

ROWS: list[dict | str] = [talk(f"question {i}", "an answer " * 3) for i in range(60)]


def with_template(template: str) -> ChatFormat:
    chat = make_chat()
    chat.tokenizer.chat_template = template
    return ChatFormat(chat.tokenizer)


def report_of(folder: Path, chat: ChatFormat, rows: list[dict | str] = ROWS, length: int = 256, **settings: object) -> PreflightReport:
    config = DataConfig(train=[write(folder, rows)], cache_dir=str(folder / "cache"), **settings)  # type: ignore[arg-type]
    return preflight(prepare_data(config, chat, kind="chat", max_seq_length=length, packing=True), chat)


def warned(report: PreflightReport, pattern: str) -> bool:
    return any(re.search(pattern, warning) for warning in report.warnings)


def test_good_data_has_no_findings(tmp_path: Path) -> None:
    report = report_of(tmp_path, CHAT, validation_split=0.1)
    report.raise_if_fatal()
    assert report.errors == report.warnings == []


def test_a_stop_token_that_is_masked_out(tmp_path: Path) -> None:
    "Markers that leave the end token out are put right; a template without one is fatal."
    outside = CHATML_TEMPLATE.replace("{{- '<|im_end|>' }}\n{%- endgeneration %}", "{%- endgeneration %}\n{{- '<|im_end|>' }}")
    assert outside != CHATML_TEMPLATE
    fixed = report_of(tmp_path, with_template(outside))
    assert fixed.errors == []
    assert fixed.data.splits["train"].stop_supervised == fixed.data.splits["train"].documents
    assert fixed.data.splits["train"].supervised_tokens == report_of(tmp_path, CHAT).data.splits["train"].supervised_tokens
    endless = report_of(tmp_path, with_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                                                "{% if add_generation_prompt %}assistant:{% endif %}"))  # fmt: skip
    with pytest.raises(DataError, match="is never learned: the chat template ends an answer with no special token"):
        endless.raise_if_fatal()


def test_end_tokens_that_the_tokenizer_does_not_have(tmp_path: Path) -> None:
    "The template of another model: its end token is ten characters here."
    foreign = report_of(tmp_path, with_template(CHATML_TEMPLATE.replace("<|im_end|>", "<|eot_id|>")))
    assert warned(foreign, r"writes <\|eot_id\|>, which the tokenizer does not have")
    assert len(foreign.errors) == 1


def test_nothing_supervised(tmp_path: Path) -> None:
    report = report_of(tmp_path, CHAT)
    stats = dataclasses.replace(report.data.splits["train"], supervised_tokens=0)
    data = dataclasses.replace(report.data, splits={"train": stats})
    with pytest.raises(DataError, match="No token is learned"):
        preflight(dataclasses.replace(prepare(tmp_path, ROWS), report=data), CHAT).raise_if_fatal()
    empty = with_template("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}")  # noqa: E501
    with pytest.raises(DataError, match="Nothing is left to train on"):
        report_of(tmp_path, empty)


@pytest.mark.parametrize(("settings", "pattern"), [
    ({"rows": [*ROWS[:5], talk("q", "a" * 300)]}, "of the rows are lost: too long"),
    ({"rows": [*ROWS, *ROWS]}, "50% of the rows are lost: an exact duplicate"),
    ({"rows": [talk("a", "{{name}}"), talk("b", "c")]}, "{{name}} has no value"),
    ({"validation_split": 0.0}, "Nothing is held out"),
    ({"rows": ROWS[:4]}, r"Only \d+ tokens are held out"),
    ({"rows": [talk("q" * 1500 + str(i), "a") for i in range(20)], "length": 2000}, r"Only 0.\d% of the tokens are learned"),
    ({"rows": [talk(f"question {i}", "a" * 70) for i in range(40)], "length": 190}, "Packed rows are only .* full"),
    ({"rows": [talk("q", "a" * 90), *(talk(str(i), "a" * 900) for i in range(9))], "on_overlong": "truncate_right"},
     "9 of 10 documents end before their stop"),
])  # fmt: skip
def test_warnings(tmp_path: Path, settings: dict, pattern: str) -> None:
    settings = {"validation_split": 0.0} | settings if "held" not in pattern else settings
    report = report_of(tmp_path, CHAT, **settings)
    assert warned(report, pattern), report.warnings
    report.raise_if_fatal()


def test_advice_for_rows_that_are_too_long(tmp_path: Path) -> None:
    "What is lost although its oldest exchanges were taken away is not helped by taking them away."
    rows = [*ROWS[:5], talk("q", "a" * 300)]
    for policy, other in (("drop", True), ("truncate_left", False)):
        [advice] = [text for text in report_of(tmp_path, CHAT, rows=rows, on_overlong=policy).warnings if "too long" in text]
        assert ("data.on_overlong" in advice) == other, advice
        assert "Raise data.max_seq_length" in advice


def test_chat_warnings(tmp_path: Path) -> None:
    today = report_of(tmp_path, with_template("{{- strftime_now('%Y') }}" + CHATML_TEMPLATE))
    assert warned(today, "today's date")
    chat = make_chat()
    chat.tokenizer.pad_token = "<|im_end|>"
    assert warned(report_of(tmp_path, ChatFormat(chat.tokenizer)), "Padding and end are one token")
    chat.tokenizer.model_max_length = 100
    assert warned(report_of(tmp_path, ChatFormat(chat.tokenizer)), "the tokenizer is made for 100")


def test_dropped_system_prompt_is_noted(tmp_path: Path) -> None:
    chat = with_template(CHATML_TEMPLATE.replace("message.role not in ('system', 'developer')", "message.role == 'user'").replace(
        "{{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' }}", "").replace("{%- elif not loop.first %}\n", "{%- elif false %}\n"))
    report = report_of(tmp_path, chat, system_prompt="Be kind")
    assert report.data.changed["the chat template leaves out a message of the system"].count == 60


HOSTILE = "\x1b[31mred\x1b]0;title\x07 [bold]not markup[/bold] <script>alert(1)</script> & \x9b1m"


def test_data_cannot_forge_the_view(tmp_path: Path) -> None:
    report = report_of(tmp_path, CHAT, rows=[talk(HOSTILE, HOSTILE), json.dumps({HOSTILE: 1})], validation_split=0.0)
    out = io.StringIO()
    report.print(Console(file=out, width=80, force_terminal=False))
    shown = out.getvalue()
    assert "\x1b" not in shown
    assert "\x9b" not in shown
    assert "[bold]not markup[/bold]" in shown
    tags: set[str] = set()

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list) -> None:
            tags.add(tag)

    Tags().feed(report._repr_html_())
    assert tags <= {"style", "div", "p", "b", "table", "tr", "td", "pre", "mark", "span"}


def test_terminal_view_fits_80_columns(tmp_path: Path) -> None:
    rows: list[dict | str] = [*ROWS, *ROWS[:3], "{", talk("q", "a" * 999), talk("a", "b", "c")]
    report = report_of(tmp_path, CHAT, rows=rows)
    out = io.StringIO()
    report.print(Console(file=out, width=80))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(re.match(r"\s*3 +an exact duplicate .* first: line 61", line) for line in lines)
    assert "66 rows read, 61 kept, 5 lost" in out.getvalue()


def test_json(tmp_path: Path) -> None:
    data = json.loads(report_of(tmp_path, CHAT).to_json())
    assert data["errors"] == []
    assert data["data"]["splits"]["train"].keys() == {f.name for f in dataclasses.fields(SplitStats)}
