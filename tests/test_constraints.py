"Whatever a model is inclined to say, its answer has the form that was asked for. The oracles are jsonschema, json and re."

import json
import re

import jsonschema
import pytest
import torch
from tiny_bots import make_bot

from llmbot.core.model_manager import LoadedBot, load_bot
from llmbot.serving.constraints import Grammars
from llmbot.serving.sampler import BatchSampler
from llmbot.serving.sampling_params import Constraint, SamplingParams

PERSON = {
    "type": "object",
    "properties": {
        "größe": {"type": "integer", "minimum": 1, "maximum": 250},
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["bot", "世界", "a\"b\\c"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pair"}]},
    },
    "required": ["größe", "name", "kind", "tags", "more"],
    "additionalProperties": False,
    "$defs": {"pair": {"type": "array", "prefixItems": [{"type": "number"}, {"const": "x"}], "items": False, "minItems": 2}},
}  # fmt: skip
EXPRESSIONS = [r"(ja|nein|世界){1,3}!?", r"[A-Z][a-zäöü]{2,6}, [0-9]{1,3} (km|m)", r"", r"[^a-z\n]{1,5}", "😀{2}(é|ü)?", r"a.c\.\s?$"]


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> LoadedBot:
    return load_bot(make_bot(tmp_path_factory.mktemp("bots"), "tiny"), device="cpu")


def answers(bot: LoadedBot, wishes: list[SamplingParams]) -> list[str | None]:
    "The answers to one prompt in one batch; None for one that was cut by its length."
    chat, prompt = bot.chat, bot.tokenizer("Once upon").input_ids
    sampler = BatchSampler(bot.config.vocab_size, "cpu", Grammars(bot.tokenizer, bot.config.vocab_size, chat.stop_token_ids))
    running = {str(i): list(prompt) for i in range(len(wishes))}
    for key, wish in zip(running, wishes, strict=True):
        sampler.add(key, wish, prompt)
    found: list[str | None] = [None] * len(wishes)
    for _ in range(wishes[0].max_new_tokens):
        keys = list(running)
        if not keys:
            break
        with torch.inference_mode():
            logits = bot.model(torch.tensor([running[k] for k in keys])).logits[:, -1]
        for key, drawn in zip(keys, sampler.sample(logits, keys), strict=True):
            assert drawn.error is None
            running[key].append(drawn.token_id)
            if drawn.token_id in chat.stop_token_ids:
                found[int(key)] = chat.decode(running.pop(key)[len(prompt) :])
                sampler.remove(key)
    return found


def wishes(constraint: Constraint, count: int, tokens: int) -> list[SamplingParams]:
    "Requests that differ in every way, with the same constraint."
    kinds = [{"temperature": 0.0}, {"temperature": 1.0, "top_k": 3}, {"temperature": 2.0, "top_p": 1.0}, {"min_p": 0.3}]
    bias = {"logit_bias": ((5, 100.0), (9, -100.0))}
    extras = [{}, {"repetition_penalty": 1.3}, {"presence_penalty": 1.0, "frequency_penalty": 0.5}, bias]
    return [
        SamplingParams(**kinds[i % 4], **extras[i // 4 % 4], seed=i, constraint=constraint, max_new_tokens=tokens)
        for i in range(count)
    ]


def test_a_schema_is_kept(bot: LoadedBot) -> None:
    "Every answer that was not cut is valid, and most are not cut."
    found = answers(bot, wishes(Constraint("json_schema", json.dumps(PERSON)), 24, 160))
    done = [text for text in found if text is not None]
    assert len(done) >= 12
    for text in done:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(done)) > 12


def test_an_object_is_an_object(bot: LoadedBot) -> None:
    "An object of any form may be long; those that end are objects."
    done = [text for text in answers(bot, wishes(Constraint("json_object"), 32, 120)) if text is not None]
    assert done
    assert all(isinstance(json.loads(text), dict) for text in done)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_matches_the_whole_answer(bot: LoadedBot, expression: str) -> None:
    "Python's re agrees, character for character."
    found = answers(bot, wishes(Constraint("regex", expression), 24, 60))
    assert all(text is not None and re.fullmatch(expression, text) for text in found), found


def test_a_real_model_with_another_kind_of_tokenizer(shared) -> None:
    "A SentencePiece vocabulary with byte fallback."
    bot = load_bot(shared / "models" / "stories260K", device="cpu")
    size = {"type": "integer", "maximum": 99, "minimum": 0}
    properties = {"girl": {"type": "string", "maxLength": 12}, "größe": size}
    schema = {"type": "object", "properties": properties, "required": ["girl", "größe"], "additionalProperties": False}
    done = [text for text in answers(bot, wishes(Constraint("json_schema", json.dumps(schema)), 16, 120)) if text is not None]
    assert len(done) >= 8
    for text in done:
        jsonschema.validate(json.loads(text), schema)
    for text in answers(bot, wishes(Constraint("regex", "(Lily|Tim) [a-z]{2,8}[.!] 世?"), 16, 60)):
        assert text is not None
        assert re.fullmatch("(Lily|Tim) [a-z]{2,8}[.!] 世?", text)
