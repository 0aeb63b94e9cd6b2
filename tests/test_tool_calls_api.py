"Tools over a real socket: OpenAI's own client, a bot that must call, and one that has learned to."

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
import torch
from tiny_bots import CORPUS, GatedBackend, make_bot

from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.core.model_manager import load_bot, new_model, save_bot, train_tokenizer
from llmbot.serving.api_server import running_server

pytestmark = pytest.mark.server
CLOSED = {"type": "object", "additionalProperties": False}
DAY = {"day": {"enum": ["heute", "世"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}}
WEATHER = {**CLOSED, "properties": DAY, "required": ["day"]}
SCHEMAS: dict[str, Any] = {"weather": WEATHER, "now": CLOSED}
TOOLS: list[Any] = [{"type": "function", "function": {"name": name, "description": f"Tells the {name}.", "parameters": schema}}
                    for name, schema in SCHEMAS.items()]  # fmt: skip
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather?"}]
CALLING = {"role": "assistant", "content": "Let me see.", "tool_calls": [
    {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"day": "世", "n": 3}'}},
    {"id": "call_2", "type": "function", "function": {"name": "now", "arguments": "{}"}}]}  # fmt: skip
RESULTS = [{"role": "tool", "tool_call_id": "call_1", "content": "Sun."}, {"role": "tool", "tool_call_id": "call_2", "content": "12:30"}]
ANSWER = {"role": "assistant", "content": "It is sunny, 12:30."}
NO_TOOLS = ("{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
XML = "{% if tools %}{{ tools | tojson }}{% endif %}" + NO_TOOLS.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}<call>{{ c.function.name }}</call>{% endfor %}")


def teach(folder: Path, name: str, talks: Sequence[Sequence[Any]]) -> Path:
    "A bot that knows these conversations by heart, tools and all."
    tokenizer = train_tokenizer([*CORPUS * 20, json.dumps(TOOLS, ensure_ascii=False)], vocab_size=600)
    model = new_model(ModelConfig(preset="qwen3-0.2m", max_position_embeddings=1024), tokenizer, seed=1)
    bot = load_bot(save_bot(folder / "raw", model, tokenizer))
    rows = [bot.chat.render(talk, TOOLS) for talk in talks]
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(120):
        loss = torch.zeros(())
        for row in rows:
            ids, mask = torch.tensor([row.input_ids]), torch.tensor(row.assistant_mask).bool()
            loss = loss + model(ids, labels=torch.where(mask, ids[0], -100)[None]).loss
        if loss.item() < 0.02:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    return save_bot(folder / name, model, tokenizer)


@pytest.fixture(scope="module")
def bots(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bots")
    made = {"tiny": make_bot(folder, "tiny", max_position_embeddings=2048), "taught": teach(folder, "taught", [[*QUESTION, CALLING],
            [*QUESTION, CALLING, *RESULTS, ANSWER]])}  # fmt: skip
    for name, template in (("toolless", NO_TOOLS), ("xml", XML)):
        tokenizer = train_tokenizer(CORPUS * 20, vocab_size=340)
        tokenizer.chat_template = template
        made[name] = save_bot(folder / name, new_model(ModelConfig(preset="qwen3-0.2m"), tokenizer), tokenizer)
    return made


@pytest.fixture(scope="module")
def url(bots: dict[str, Path]) -> Iterator[str]:
    serving = ServingConfig(models=[str(path) for path in bots.values()], port=0, max_new_tokens=400)
    with running_server(Config(model=ModelConfig(device="cpu"), serving=serving)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


Said = tuple[str, list[tuple[str, str]], str]  # text, calls (name and arguments), and why the answer ended


def ask(client: openai.OpenAI, **asked: Any) -> list[Said]:
    "Each of `n` answers, which must be the same whole and streamed."
    asked = {"model": "tiny", "messages": QUESTION, "tools": TOOLS, **asked}
    whole = client.chat.completions.create(**asked)
    answers = []
    for choice in whole.choices:
        made = choice.message.tool_calls or []
        assert choice.message.content is not None or made
        assert len({call.id for call in made}) == len(made)
        calls = [(call.function.name, call.function.arguments) for call in made]
        answers.append((choice.message.content or "", calls, choice.finish_reason))
    assert streamed(client, asked, len(answers)) == answers
    return answers


def streamed(client: openai.OpenAI, asked: dict[str, Any], n: int) -> list[Said]:
    texts, ends, calls = [""] * n, [""] * n, [dict[int, list[str]]() for _ in range(n)]
    for chunk in client.chat.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            assert not ends[choice.index]
            texts[choice.index] += choice.delta.content or ""
            for delta in choice.delta.tool_calls or []:
                known = calls[choice.index]
                if delta.index not in known:
                    assert delta.index == len(known)  # in order, and named first
                    assert delta.id
                    assert delta.type == "function"
                    assert delta.function
                    assert delta.function.name
                    known[delta.index] = [delta.function.name, ""]
                else:
                    assert delta.id is None
                known[delta.index][1] += (delta.function and delta.function.arguments) or ""
            ends[choice.index] = choice.finish_reason or ""
    return [(text, [(name, given) for name, given in known.values()], end) for text, known, end in zip(texts, calls, ends, strict=True)]


# A bot that must call


@pytest.mark.parametrize("parallel", [None, False])
def test_a_bot_of_random_weights_must_call(client: openai.OpenAI, parallel: bool | None) -> None:
    "Real answers of the real engine, each one call or more, whose arguments follow their schemas."
    more = {} if parallel is None else {"parallel_tool_calls": parallel}
    counts, names = set(), set()
    for seed in range(5):
        for text, calls, end in ask(client, tool_choice="required", temperature=1.5, top_p=1, seed=seed, n=2, **more):
            assert (text, end) == ("", "tool_calls")
            counts.add(len(calls))
            for name, arguments in calls:
                names.add(name)
                jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert names <= set(SCHEMAS)
    assert len(counts) > 1 if parallel is None else counts == {1}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_function_is_called_once(client: openai.OpenAI, name: str) -> None:
    choice = {"type": "function", "function": {"name": name}}
    for seed in range(3):
        [(text, calls, end)] = ask(client, tool_choice=choice, seed=seed)
        assert (text, [call[0] for call in calls], end) == ("", [name], "tool_calls")
        jsonschema.validate(json.loads(calls[0][1]), SCHEMAS[name])


# A bot that has learned to call


def written(bot: Path, messages: Sequence[Any]) -> list[str]:
    "What the bot has written after each token, tags included, by transformers' `generate`."
    loaded = load_bot(bot)
    ids = torch.tensor([loaded.chat.prompt_ids(messages, TOOLS)])
    out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=400, do_sample=False)[0, ids.shape[1] :]
    return [loaded.chat.decode(out[: i + 1].tolist()) for i in range(len(out))]


def test_question_calls_results_answer(client: openai.OpenAI, bots: dict[str, Path]) -> None:
    "The whole exchange; what the first answer was goes back as OpenAI's client has it."
    assert written(bots["taught"], QUESTION)[-1].count("<tool_call>") == 2
    asked: dict[str, Any] = {"model": "taught", "tools": TOOLS, "temperature": 0}
    expected = [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in CALLING["tool_calls"]]  # type: ignore[index]
    for more in ({}, {"tool_choice": "auto"}, {"parallel_tool_calls": True}):
        [(text, calls, end)] = ask(client, **asked, **more)
        assert (text, [(name, json.loads(given)) for name, given in calls], end) == ("Let me see.", expected, "tool_calls")
    message = client.chat.completions.create(messages=QUESTION, **asked).choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": old["content"]}
               for call, old in zip(message.tool_calls or [], RESULTS, strict=True)]  # fmt: skip
    talk = [*QUESTION, message.model_dump(), *results]
    assert ask(client, **asked | {"messages": talk}) == [(ANSWER["content"], [], "stop")]
    assert written(bots["taught"], talk)[-1] == ANSWER["content"]


def test_held_to_the_schema_only_from_where_a_call_begins(client: openai.OpenAI) -> None:
    "Functions that are strict, and a single call: text stays free, the call is as it was learned, and the second is not begun."
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    [(text, calls, end)] = ask(client, model="taught", tools=strict, temperature=0)
    assert (text, [name for name, _ in calls], end) == ("Let me see.", ["weather", "now"], "tool_calls")
    narrow = json.loads(json.dumps(strict))
    narrow[0]["function"]["parameters"]["properties"]["n"]["maximum"] = 2
    [(text, calls, _)] = ask(client, model="taught", tools=narrow, temperature=0)
    for name, given in calls:
        jsonschema.validate(json.loads(given), {tool["function"]["name"]: tool["function"]["parameters"] for tool in narrow}[name])
    [(text, calls, end)] = ask(client, model="taught", parallel_tool_calls=False, temperature=0)
    assert (text, [name for name, _ in calls], end) == ("Let me see.", ["weather"], "tool_calls")


def taken_out(raw: str) -> tuple[str, list[tuple[str, str]]]:
    "Text and calls of what a bot has written so far: a call is one from where its arguments begin."
    calls = []
    for head in re.finditer(r'<tool_call>\s*{"name": "(\w+)", "arguments": (?={)', raw):
        rest = raw[head.end() :]
        try:
            end = json.JSONDecoder().raw_decode(rest)[1]
        except ValueError:  # cut off
            end = len(rest)
        calls.append((head[1], rest[:end]))
    return re.sub(r'\s*<tool_call>\s*{"name": "\w+", "arguments": {.*?(</tool_call>|$)', "", raw, flags=re.DOTALL), calls


def test_wherever_an_answer_is_cut_nothing_is_lost(client: openai.OpenAI, bots: dict[str, Path]) -> None:
    "Text and calls of an answer cut after each of its tokens, beside what `generate` writes up to there."
    ends, whole = set(), written(bots["taught"], QUESTION)
    for tokens in [*range(1, len(whole) - 1, 4), len(whole) - 1, len(whole)]:
        raw = whole[tokens - 1].rstrip("\ufffd")  # half a character is not sent
        [(text, calls, end)] = ask(client, model="taught", temperature=0, max_tokens=tokens)
        said, made = taken_out(raw)
        assert [(name, given.rstrip("\ufffd")) for name, given in calls] == made
        assert text.rstrip("\ufffd") == said
        assert end == ("tool_calls" if tokens == len(whole) else "length")
        ends.add((len(calls), end))
    assert ends == {(0, "length"), (1, "length"), (2, "length"), (2, "tool_calls")}


def test_arguments_come_in_pieces(client: openai.OpenAI) -> None:
    "Each with its token: the answer is not held back until the call is complete."
    asked: dict[str, Any] = {"model": "taught", "messages": QUESTION, "tools": TOOLS, "temperature": 0, "stream": True}
    deltas = [c.choices[0].delta for c in client.chat.completions.create(**asked) if c.choices]
    first = [d.tool_calls[0].function.arguments for d in deltas if d.tool_calls and d.tool_calls[0].index == 0 and d.tool_calls[0].function]
    assert first[0] == ""  # beside the name
    assert len(first) > 4
    assert "".join(filter(None, first)) == CALLING["tool_calls"][0]["function"]["arguments"]  # type: ignore[index]


def test_without_tools_nothing_is_taken_out(client: openai.OpenAI) -> None:
    "`none` shows no tools: the prompt is that of a request without them, and so is the answer."
    asked: dict[str, Any] = {"model": "taught", "messages": QUESTION, "temperature": 0}
    plain = client.chat.completions.create(**asked)
    none = client.chat.completions.create(**asked, tools=TOOLS, tool_choice="none")
    shown = client.chat.completions.create(**asked, tools=TOOLS)
    assert none.choices[0].message == plain.choices[0].message
    assert none.choices[0].message.tool_calls is None
    without, hidden, seen = (answer.usage.prompt_tokens for answer in (plain, none, shown) if answer.usage)
    assert without == hidden < seen


def test_log_probabilities_are_of_all_that_was_written(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "taught", "messages": QUESTION, "tools": TOOLS, "temperature": 0, "logprobs": True}
    whole = client.chat.completions.create(**asked)
    assert whole.usage
    known = [t.token for t in (whole.choices[0].logprobs and whole.choices[0].logprobs.content) or []]
    assert len(known) == whole.usage.completion_tokens
    told = [c.choices[0].logprobs for c in client.chat.completions.create(**asked, stream=True)]
    assert [t.token for part in told if part for t in part.content or []] == known


# What is refused


@pytest.mark.parametrize(
    ("asked", "param", "message"),
    [
        ({"tool_choice": "required", "tools": []}, "tool_choice", "there are no tools"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "there is no tool 'x'"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools", "two tools named weather"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "match pattern"),
        ({"tools": [{"type": "web_search"}]}, "tools", "function"),
        ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "string"}}}]}, "tools", "must be an object"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools", "at most 128"),
        ({"tool_choice": "any"}, "tool_choice", "required"),
        ({"response_format": {"type": "json_object"}}, "response_format", "cannot be a call"),
        ({"messages": [*QUESTION, {"role": "assistant", "content": "A"}], "extra_body": {"continue_final_message": True}},
         "continue_final_message", "within a call"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "a", "parameters": {
            "type": "object", "properties": {"b": {"type": "string", "pattern": "("}}}}}]}, "tools", "cannot be used"),
        ({"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "a", "parameters": {
            "type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(3000)}}}}]}, "tools", "at most 64000"),
        ({"messages": [*QUESTION, {"role": "tool", "tool_call_id": "a", "content": "b"}]}, "messages", "follows no tool call"),
        ({"model": "toolless"}, "tools", "does not show tools"),
        ({"model": "xml"}, "tools", "form that is not known"),
        ({"model": "toolless", "tools": [], "messages": [*QUESTION, CALLING, *RESULTS]}, "messages", "does not show calls"),
        ({"functions": [{"name": "f"}], "tools": []}, "functions", "describe them in tools"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_refused(client: openai.OpenAI, asked: dict[str, Any], param: str, message: str, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "tools": TOOLS, "stream": stream, **asked})
    assert (refused.value.param or "").partition(".")[0] == param


def test_an_engine_without_grammars_has_tools_that_leave_it_free(bots: dict[str, Path]) -> None:
    GatedBackend.gate.set()
    serving = ServingConfig(models=[str(bots["tiny"])], port=0, backend="gated", max_new_tokens=2)
    with running_server(Config(model=ModelConfig(device="cpu"), serving=serving)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        assert ask(client) == [("word word ", [], "length")]
        strict = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}]
        for more, param in (({"tool_choice": "required"}, "tool_choice"), ({"parallel_tool_calls": False}, "parallel_tool_calls"),
                            ({"tools": strict}, "tools")):  # fmt: skip
            with pytest.raises(openai.BadRequestError, match="'gated' backend cannot hold an answer to a grammar") as refused:
                ask(client, **more)
            assert refused.value.param == param
