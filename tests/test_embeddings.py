"Vectors and tokens over a real socket, asked by OpenAI's own client, beside what transformers computes."

import asyncio
import base64
import re
import socket
import struct
import threading
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from tiny_bots import GatedBackend, make_bot
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.core.model_manager import load_bot
from llmbot.serving import embeddings_api, http_exchange
from llmbot.serving.api_server import running_server
from llmbot.serving.backends import Capabilities, register_backend
from llmbot.serving.embeddings_api import MAX_INPUTS, SIDE_BY_SIDE
from llmbot.serving.sampling_params import Chunk, GenerationRequest

pytestmark = pytest.mark.server
TEXTS = ["Grüße, 世界! 😀", "What is 12 + 30?", "Once upon a time there was a bot." * 3]
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Grüße <|im_end|> 世界"}]


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bot(tmp_path_factory.mktemp("bots"), "tiny", max_position_embeddings=256)


@pytest.fixture(scope="module")
def url(bot: Path) -> Iterator[str]:
    serving = ServingConfig(models=[str(bot)], port=0, max_body_bytes=100_000)
    with running_server(Config(model=ModelConfig(device="cpu"), serving=serving)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def refusal(url: str, path: str, **body: Any) -> tuple[int, str, str]:
    "Status, parameter and message of a request that is refused."
    answer = httpx.post(url + path, json=body)
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    return answer.status_code, error["param"], error["message"]


# Embeddings


def test_vectors_are_the_mean_of_the_last_hidden_states(client: openai.OpenAI, bot: Path) -> None:
    "The oracle is transformers, one text at a time; OpenAI's client asks for base64 unless it is told not to."
    model, tokenizer = AutoModelForCausalLM.from_pretrained(bot), AutoTokenizer.from_pretrained(bot)
    ids = [tokenizer(text).input_ids for text in TEXTS]
    with torch.inference_mode():
        expected = [model.model(torch.tensor([one])).last_hidden_state[0].mean(0) for one in ids]
    lists: list[Any] = [TEXTS, ids]
    for given in lists:
        for more in ({}, {"encoding_format": "float"}, {"dimensions": len(expected[0])}):
            answer = client.embeddings.create(model="tiny", input=given, **more)
            assert [item.index for item in answer.data] == [0, 1, 2]
            assert answer.usage.prompt_tokens == answer.usage.total_tokens == sum(map(len, ids))
            for item, vector in zip(answer.data, expected, strict=True):
                torch.testing.assert_close(torch.tensor(item.embedding), vector, rtol=1e-4, atol=1e-5)
    singles: list[Any] = [TEXTS[0], ids[0]]
    for given in singles:
        answer = client.embeddings.create(model="tiny", input=given)
        torch.testing.assert_close(torch.tensor(answer.data[0].embedding), expected[0], rtol=1e-4, atol=1e-5)
    assert len(expected[0].unique()) > 1


def test_base64_is_the_same_numbers(url: str) -> None:
    def ask(form: str) -> Any:
        return httpx.post(f"{url}/v1/embeddings", json={"input": TEXTS[0], "encoding_format": form}).json()["data"][0]["embedding"]

    raw = base64.b64decode(ask("base64"))
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(ask("float"), rel=1e-6)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"input": "a", "dimensions": 8}, "dimensions", "not cut"),
        ({"input": ""}, "input", "input 0 is empty"),
        ({"input": ["a", ""]}, "input", "input 1 is empty"),
        ({"input": []}, "input", "at least 1"),
        ({"input": ["a", "a" * 2000]}, "input", "input 1 has .* tokens, and the context is 256"),
        ({"input": [3, 999_999]}, "input", "not in the vocabulary"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input", "at most 2048"),
        ({"input": [[-1]]}, "input", "greater than or equal"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float"),
        ({"input": "a", "truncate": True}, "truncate", "unknown parameter"),
        ({}, "input", "required"),
    ],
)
def test_refused_inputs(url: str, body: dict[str, Any], param: str, message: str) -> None:
    status, named, said = refusal(url, "/v1/embeddings", **body)
    assert status == 400
    assert (named or "").partition(".")[0] == param
    assert re.search(message, said), said


def test_long_lists_of_tokens_and_bodies_are_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmbot.serving.embeddings_api.MAX_INPUT_TOKENS", 100)
    assert "more than 100 tokens together" in refusal(url, "/v1/embeddings", input=[[5] * 60, [5] * 60])[2]
    assert httpx.post(f"{url}/v1/embeddings", json={"input": "a" * 100_001}).status_code == 413
    assert httpx.post(f"{url}/v1/embeddings", json={"input": "a", "model": "nobody"}).status_code == 404
    assert httpx.post(f"{url}/tokenize", json={"prompt": "a" * 100_001}).status_code == 413


@register_backend("slow-embeddings")
class SlowEmbedder:
    "Computes no vector before `gate` opens; `running` and `most` count those that it was asked for."

    name, context_length = "slow-embeddings", 1000
    gate = threading.Event()
    running = most = 0

    def __init__(self, bot_ref: str, cfg: Config) -> None:
        self.chat = load_bot(bot_ref).chat

    def capabilities(self) -> Capabilities:
        return Capabilities(embeddings=True)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        yield Chunk("", (), "stop")

    async def embed(self, prompt_ids: Sequence[int], adapter: str | None = None) -> list[float]:
        kind = type(self)
        kind.running += 1
        kind.most = max(kind.most, kind.running)
        try:
            while not self.gate.is_set():
                await asyncio.sleep(0.002)
            return [float(len(prompt_ids))]
        finally:
            kind.running -= 1


def until_running(count: int) -> None:
    limit = time.monotonic() + 20
    while SlowEmbedder.running != count:
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.005)


def slow(bot: Path, **serving: Any) -> Any:
    SlowEmbedder.gate.clear()
    SlowEmbedder.most = 0
    settings = ServingConfig(models=[str(bot)], port=0, backend="slow-embeddings", **serving)
    return running_server(Config(model=ModelConfig(device="cpu"), serving=settings))


def test_a_client_that_leaves_ends_the_work(bot: Path) -> None:
    with slow(bot) as url:
        leaver = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
        body = b'{"input": ["a", "b", "c", "d", "e", "f"]}'
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        leaver.sendall(head.encode() + body)
        until_running(SIDE_BY_SIDE)
        leaver.close()
        until_running(0)
        stats = httpx.get(f"{url}/stats").json()
        assert (stats["running"], stats["waiting"]) == (0, 0)
        SlowEmbedder.gate.set()
        answer = httpx.post(f"{url}/v1/embeddings", json={"input": ["a", "a b c", "a b"]}).json()
        lengths = [item["embedding"][0] for item in answer["data"]]
        assert lengths[0] < lengths[2] < lengths[1]
    assert SlowEmbedder.most == SIDE_BY_SIDE  # never more of one request at a time


def test_the_deadline_is_that_of_the_list(bot: Path) -> None:
    with slow(bot, request_timeout_s=0.3) as url:
        answer = httpx.post(f"{url}/v1/embeddings", json={"input": ["a"] * 6})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        until_running(0)


def test_answers_are_written_beside_the_event_loop(bot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "In a thread, and there in pieces: one call of the JSON encoder for all of it would hold every stream up."
    threads: dict[str, set[int]] = {"loop": set(), "numbers": set(), "json": set()}
    embed, written, pieces, lengths = SlowEmbedder.embed, embeddings_api.written, http_exchange.json_pieces, list[int]()

    async def embed_wide(self: SlowEmbedder, prompt_ids: Sequence[int], adapter: str | None = None) -> list[float]:
        threads["loop"].add(threading.get_ident())
        return await embed(self, prompt_ids, adapter) * 1024

    def noted(*given: Any) -> Any:
        threads["numbers"].add(threading.get_ident())
        return written(*given)

    def measured(*given: Any) -> Iterator[str]:
        for piece in pieces(*given):
            threads["json"].add(threading.get_ident())
            lengths.append(len(piece))
            yield piece

    monkeypatch.setattr(SlowEmbedder, "embed", embed_wide)
    monkeypatch.setattr(embeddings_api, "written", noted)
    monkeypatch.setattr(http_exchange, "json_pieces", measured)
    with slow(bot) as url:
        SlowEmbedder.gate.set()
        answer = httpx.post(f"{url}/v1/embeddings", json={"input": ["a"] * 100}, timeout=60)
    assert [len(item["embedding"]) for item in answer.json()["data"]] == [1024] * 100
    assert len(threads["loop"]) == 1
    assert threads["json"].isdisjoint(threads["loop"])
    assert threads["numbers"].isdisjoint(threads["loop"])
    assert max(lengths) < len(answer.content) / 100  # no call writes as much as one vector


def test_a_key_is_asked_for_and_a_backend_may_have_none(bot: Path) -> None:
    GatedBackend.gate.set()
    serving = ServingConfig(models=[str(bot)], port=0, backend="gated", token="a-secret-token")  # type: ignore[arg-type]
    with running_server(Config(model=ModelConfig(device="cpu"), serving=serving)) as url:
        for path, body in (("/v1/embeddings", {"input": "a"}), ("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
            answer = httpx.post(url + path, json=body)
            assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
            assert answer.headers["x-request-id"]
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="a-secret-token", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="'gated' backend has no embeddings") as refused:
            client.embeddings.create(model="tiny", input="a")
        assert refused.value.code == "unsupported_endpoint"


# Tokens


def test_tokens_are_transformers(url: str, bot: Path) -> None:
    "A text, and a conversation as the template writes it; what a user spells is never a control token."
    tokenizer = AutoTokenizer.from_pretrained(bot)
    for text in TEXTS:
        answer = httpx.post(f"{url}/tokenize", json={"prompt": text, "return_token_strs": True}).json()
        assert answer["tokens"] == tokenizer(text).input_ids
        assert answer["token_strs"] == tokenizer.convert_ids_to_tokens(answer["tokens"])
        assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 256)
        assert httpx.post(f"{url}/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    plain = [{"role": "user", "content": "What is 12 + 30?"}]
    for more in ({}, {"add_generation_prompt": True}, {"add_generation_prompt": False}):
        answer = httpx.post(f"{url}/tokenize", json={"messages": plain, **more}).json()
        opens = more.get("add_generation_prompt", True)
        assert answer["tokens"] == tokenizer.apply_chat_template(plain, add_generation_prompt=opens, return_dict=False)
        assert answer["token_strs"] is None
    answer = httpx.post(f"{url}/tokenize", json={"messages": MESSAGES}).json()
    assert answer["tokens"] == load_bot(bot).chat.prompt_ids(MESSAGES)
    assert answer["tokens"].count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert httpx.post(f"{url}/detokenize", json={"tokens": []}).json() == {"prompt": ""}


def test_tokens_are_those_that_the_bot_is_given(url: str, client: openai.OpenAI) -> None:
    count = httpx.post(f"{url}/tokenize", json={"messages": MESSAGES}).json()["count"]
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=1)  # type: ignore[arg-type]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == count


def test_special_tokens_are_added_unless_they_are_not_wanted(tmp_path: Path) -> None:
    "A tokenizer that begins every text with a token of its own."
    from tokenizers.processors import TemplateProcessing

    from llmbot.core.model_manager import new_model, save_bot, train_tokenizer

    tokenizer = train_tokenizer(TEXTS * 20, vocab_size=340)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)])
    bot = save_bot(tmp_path / "starts", new_model(ModelConfig(preset="qwen3-0.2m"), tokenizer), tokenizer)
    with running_server(Config(model=ModelConfig(device="cpu"), serving=ServingConfig(models=[str(bot)], port=0))) as url:
        ids = [httpx.post(f"{url}/tokenize", json={"prompt": "What", **more}).json()["tokens"]
               for more in ({}, {"add_special_tokens": True}, {"add_special_tokens": False})]
    assert ids[0] == ids[1] == [start, *ids[2]]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": MESSAGES, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": MESSAGES, "add_generation_prompt": True, "continue_final_message": True}, "add_generation_prompt"),
        ("/tokenize", {"messages": MESSAGES, "continue_final_message": True}, "messages"),
        ("/tokenize", {"messages": [{"role": "tool", "content": "a"}]}, "messages"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/detokenize", {"tokens": [5, 999_999]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_refused_tokens(url: str, path: str, body: dict[str, Any], param: str) -> None:
    status, named, _ = refusal(url, path, **body)
    assert (status, named.partition(".")[0]) == (400, param)
