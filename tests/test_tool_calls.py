"What a template writes, the parser reads, however the answer is cut into pieces."

import json

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmbot.core.chat import ChatFormat
from llmbot.core.model_manager import train_tokenizer
from llmbot.serving.call_parser import FORMATS, ToolCallFormat, ToolCallParser, joined_calls, parse_tool_calls
from llmbot.serving.constraints import Grammars
from llmbot.serving.sampler import BatchSampler
from llmbot.serving.sampling_params import SamplingParams
from llmbot.serving.tool_calls import tool_call_format, tool_constraint

TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}]
HEAD = "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role != 'assistant' %}{{ m.content }}\n"
TAIL = "<|im_end|>{% endif %}{% endfor %}"
#: The parts that write calls in the templates of Qwen 2.5, Llama 3.1 and Mistral 7B v0.3, with our end token.
TEMPLATES = {
    "hermes": HEAD + "{% else %}{{ m.content }}{% for c in m.tool_calls %}{{ '\n<tool_call>\n{\"name\": \"' + c.function.name + '\", "
    "\"arguments\": ' + (c.function.arguments | tojson) + '}\n</tool_call>' }}{% endfor %}" + TAIL,
    "llama3": HEAD + "{% elif m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('one call') }}{% endif %}"
    "{{ '{\"name\": \"' + m.tool_calls[0].function.name + '\", \"parameters\": ' + (m.tool_calls[0].function.arguments | tojson) + '}' }}"
    "<|im_end|>{% else %}{{ m.content }}" + TAIL,
    "mistral": HEAD + "{% elif m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{{ (c.function | tojson)[:-1] + ', \"id\": \"' + c.id + '\"}' }}{{ ', ' if not loop.last }}{% endfor %}]"
    "<|im_end|>{% else %}{{ m.content }}" + TAIL,
}  # fmt: skip
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.sampled_from(["", "ü 世", '"\\', "</tool_call>", "<tool_call>", "{", "]\n"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abü"), inner, max_size=2),
    max_leaves=4,
)
calls_strategy = st.lists(
    st.tuples(st.sampled_from(["look_up", "add"]), st.dictionaries(st.sampled_from("xyä"), JSON, max_size=3)),
    min_size=1,
    max_size=3,
)
PIECES = ["<tool_call>", "</tool_call>", "[TOOL_CALLS]", '{"name": "f", "arguments": {"a": "</tool_call>"}}',
          '[{"name": "f", "arguments": {}}]',
          '{"name": "f", "parameters": {}}', " ", "\n", "text", "<tool", "_call>", "{", '"', "ü", "\\", "[TOOL"]  # fmt: skip


def chat_with(template: str, special: str | None = None) -> ChatFormat:
    "A bot's chat format; `special` becomes a control token."
    tokenizer = train_tokenizer(["What is 12 + 30? ü 世"] * 20, vocab_size=340)
    if special:
        tokenizer.add_special_tokens({"extra_special_tokens": [special]}, replace_extra_special_tokens=False)
    if template != "chatml":
        tokenizer.chat_template = template
    return ChatFormat(tokenizer)


CHATS = {name: chat_with(template) for name, template in TEMPLATES.items()}
CHATS |= {"chatml": chat_with("chatml"), "mistral control token": chat_with(TEMPLATES["mistral"], "[TOOL_CALLS]")}


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=25, deadline=None)
@given(calls=calls_strategy)
def test_what_the_template_writes_is_read(name: str, calls) -> None:
    "A conversation with calls, rendered, encoded, decoded as an answer would be, and parsed."
    form = tool_call_format(CHATS[name])
    assert form is not None
    assert form.name == ("hermes" if name == "chatml" else name.split()[0])
    calls = calls[:1] if name == "llama3" else calls
    made = [
        {"id": "abcdefgh1", "type": "function", "function": {"name": n, "arguments": json.dumps(a)}} for n, a in calls
    ]
    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "", "tool_calls": made}]
    text = CHATS[name].decode(CHATS[name].render(talk, TOOLS).supervised_ids)
    said, found, malformed = parse_tool_calls(form, text)
    assert (said.strip(), malformed) == ("", 0)
    assert [(c.name, json.loads(c.arguments)) for c in found] == calls
    assert len({c.id for c in found}) == len(found)


@settings(max_examples=400, deadline=None)
@given(
    st.sampled_from(FORMATS),
    st.lists(st.sampled_from(PIECES), max_size=9).map("".join),
    st.randoms(use_true_random=False),
)
def test_pieces_do_not_matter(form: ToolCallFormat, text: str, random) -> None:
    "Text, calls and count of a stream are those of the whole; text that is out is never taken back."
    parser, said, pieces, at = ToolCallParser(form), "", [], 0
    while at < len(text):
        size = random.choice([1, 1, 2, 5, 30])
        new, more = parser.push(text[at : at + size])
        said, pieces, at = said + new, pieces + more, at + size
    new, more = parser.finish()
    whole, found, malformed = parse_tool_calls(form, text)
    assert said + new == whole
    assert [(c.name, c.arguments) for c in joined_calls(pieces + more)] == [(c.name, c.arguments) for c in found]
    assert parser.malformed == malformed
    if not found:
        assert whole == text


@pytest.mark.parametrize("name", CHATS)
@settings(max_examples=25, deadline=None)
@given(calls=calls_strategy)
def test_arguments_get_out_as_they_are_written(name: str, calls) -> None:
    "Character by character: once a call has its name, each character of its arguments comes at once, and nothing else does."
    form, said = tool_call_format(CHATS[name]), "" if name.startswith(("llama3", "mistral c")) else "Let me see."
    assert form is not None
    written = [(n, json.dumps(a, ensure_ascii=False)) for n, a in (calls[:1] if name == "llama3" else calls)]
    bodies = [f'{{"name": "{n}", "{form.arguments}": {a}}}' for n, a in written]
    text = said + (form.begin + f"[{', '.join(bodies)}]" if form.as_list else "".join(form.begin + b + form.end for b in bodies))
    parser, pieces, out = ToolCallParser(form), [], ""
    for character in text:
        new, more = parser.push(character)
        out, pieces = out + new, pieces + more
        assert all(piece.arguments in ("", character) for piece in more)
    assert (out, parser.finish(), parser.malformed) == (said, ("", []), 0)
    assert [(c.name, c.arguments) for c in joined_calls(pieces)] == written
    assert sum(bool(piece.arguments) for piece in pieces) == sum(len(arguments) for _, arguments in written)


def test_no_piece_of_a_tag_gets_out() -> None:
    "Character by character, what is out never ends within a tag that turns out to be one."
    text = 'So, < and <b>.\n <tool_call>{"name": "f", "arguments": {}}</tool_call>'
    parser, out = ToolCallParser(FORMATS[0]), ""
    for character in text:
        out += parser.push(character)[0]
        assert "So, < and <b>.".startswith(out)
    assert out == "So, < and <b>."


def test_a_form_that_is_not_known_is_none() -> None:
    "Tools that are shown, and calls that are written as XML or not at all."
    assert tool_call_format(chat_with(HEAD + "{% else %}{{ m.content }}" + TAIL)) is None
    xml = "{% else %}{% for c in m.tool_calls %}<call>{{ c.function.name }}</call>{% endfor %}"
    assert tool_call_format(chat_with(HEAD + xml + TAIL)) is None
    assert tool_call_format(chat_with("chatml", "<tool_call>")) is None  # its text would not show the tag


@pytest.mark.parametrize("name", CHATS)
def test_a_bot_that_must_call_calls(name: str) -> None:
    "With every token as likely as any other, the answer is one or more calls that follow the schemas of their functions."
    chat, form = CHATS[name], tool_call_format(CHATS[name])
    assert form is not None
    day = {"type": "object", "properties": {"day": {"enum": ["heute", "世"]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}}}
    closed = {"type": "object", "additionalProperties": False}
    schemas = {"weather": {**day, **closed, "required": ["day"]}, "now": closed}
    tools = [{"type": "function", "function": {"name": key, "parameters": value}} for key, value in schemas.items()]
    size = len(chat.tokenizer)
    sampler = BatchSampler(size, "cpu", Grammars(chat.tokenizer, size, chat.stop_token_ids))
    counts = set()
    for seed in range(12):
        constraint = tool_constraint(form, tools, "required")
        sampler.add(str(seed), SamplingParams(temperature=1.0, top_p=1.0, seed=seed, constraint=constraint), [1])
        ids = [-1]
        while ids[-1] not in chat.stop_token_ids:
            ids.append(sampler.sample(torch.zeros(1, size), [str(seed)])[0].token_id)
        assert form.opener is None or ids[1] == form.opener
        said, calls, malformed = parse_tool_calls(form, chat.decode(ids[1:]))
        assert (said, malformed) == ("", 0)
        counts.add(len(calls))
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    assert counts == {1} if name == "llama3" else 1 in counts and len(counts) > 1


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("name", CHATS)
def test_a_free_bot_is_held_to_the_schema_once_it_calls(name: str, parallel: bool) -> None:
    "Answers that begin as text, as a call, as text and a call, or as half a tag, and go on at random."
    chat, form = CHATS[name], tool_call_format(CHATS[name])
    assert form is not None
    day = {"type": "object", "properties": {"day": {"enum": ["heute", "世"]}}, "required": ["day"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": key, "strict": True, "parameters": day}} for key in ("weather", "tides")]
    size = len(chat.tokenizer)
    sampler = BatchSampler(size, "cpu", Grammars(chat.tokenizer, size, chat.stop_token_ids))
    constraint, counts = tool_constraint(form, tools, "auto", parallel), {}
    calling = form.begin or ("[" if form.as_list else "{")
    for start, seed in [(start, seed) for start in ("Hi", calling, "Hi" + form.begin, "<tool ca") for seed in range(6)]:
        begin = [form.opener] if form.opener is not None and start == calling else []
        begin += chat.tokenizer(start, add_special_tokens=False).input_ids
        sampler.add("r", SamplingParams(temperature=1.0, top_p=1.0, seed=seed, constraint=constraint), [1])
        ids: list[int] = []
        while not ids or ids[-1] not in chat.stop_token_ids:
            scores = torch.zeros(1, size)
            scores[0, chat.stop_token_ids[0]] = 3  # soon, where that is allowed
            if len(ids) < len(begin):
                scores[0, begin[len(ids)]] = 60
            ids.append(sampler.sample(scores, ["r"])[0].token_id)
        sampler.remove("r")
        said, calls, malformed = parse_tool_calls(form, chat.decode(ids))
        assert malformed == 0
        assert said.startswith("" if start == calling else start.removesuffix(form.begin))
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), day)
        counts.setdefault(start, set()).add(len(calls))
    assert counts["Hi"] == counts["<tool ca"] == {0}
    assert 0 not in counts[calling]
    if not parallel:
        assert counts[calling] == {1}
