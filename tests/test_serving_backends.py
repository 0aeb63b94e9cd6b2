"""The torch backend and the pieces of a stream, without a network."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_bots import make_bot

from llmbot.core.config import Config, ModelConfig
from llmbot.serving.backends import create_backend
from llmbot.serving.decoding import generate_batch
from llmbot.serving.http_exchange import PING, EventStream
from llmbot.serving.sampling_params import Chunk, GenerationRequest, RequestError, SamplingParams
from llmbot.serving.torch_backend import TorchBackend


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bot(tmp_path_factory.mktemp("bots"), "tiny", seed=5)


def request(backend: TorchBackend, prompt: str, **params: Any) -> GenerationRequest:
    return GenerationRequest(tuple(backend.chat.tokenizer(prompt).input_ids), SamplingParams(**params), prompt)


async def started(path: Path, batching: bool = True, **model: Any) -> TorchBackend:
    cfg = Config(model=ModelConfig(**{"device": "cpu", **model}), engine={"batching": batching})
    backend = create_backend("torch", str(path), cfg)
    assert isinstance(backend, TorchBackend)
    await backend.start()
    return backend


async def read(backend: TorchBackend, asked: GenerationRequest) -> list[Chunk]:
    async with aclosing(backend.generate(asked)) as stream:
        return [chunk async for chunk in stream]


def test_text_is_that_of_all_tokens(tiny: Path) -> None:
    "No piece ends inside a character, and the pieces together are what decoding everything at once gives."

    async def main() -> None:
        backend = await started(tiny)
        for seed in range(8):
            chunks = await read(backend, request(backend, "Grüße", temperature=1.5, top_p=1, seed=seed, max_new_tokens=120))
            ids = [i for chunk in chunks for i in chunk.token_ids]
            assert "".join(chunk.text for chunk in chunks) == backend.chat.decode(ids)
            assert [chunk.completion_tokens for chunk in chunks] == list(range(1, len(ids) + 1))
            assert any(chunk.text == "" for chunk in chunks[:-1])  # something was held back, so this tests something
        await backend.stop()

    asyncio.run(main())


def test_closing_the_stream_stops_the_model_within_one_step(tiny: Path) -> None:
    async def main() -> tuple[int, int]:
        backend = await started(tiny)
        passes = []
        backend._bot.model.register_forward_hook(lambda *_: passes.append(1))
        reader = asyncio.create_task(read(backend, request(backend, "Once", temperature=0, max_new_tokens=2000)))
        while len(passes) < 5:
            await asyncio.sleep(0)
        reader.cancel()  # as a server does when a client leaves
        await asyncio.gather(reader, return_exceptions=True)
        at_close = len(passes)
        await read(backend, request(backend, "What", temperature=0, max_new_tokens=30))
        await backend.stop()
        return at_close, len(passes) - 30

    at_close, others = asyncio.run(main())
    assert others <= at_close + 1


def test_one_bad_answer_leaves_the_others_alone(tiny: Path) -> None:
    "A failure belongs to its own reader."

    async def main() -> None:
        backend = await started(tiny)
        expected = await read(backend, request(backend, "Once", temperature=0, max_new_tokens=25))
        good = asyncio.create_task(read(backend, request(backend, "Once", temperature=0, max_new_tokens=25)))
        beyond = GenerationRequest((10**6,), SamplingParams(temperature=0), "no such token")
        with pytest.raises(RequestError, match="not in the vocabulary"):
            await read(backend, beyond)
        assert await good == expected
        await backend.stop()

    asyncio.run(main())


def test_seed_is_the_requests_own(tiny: Path) -> None:
    "Same seed, same answer, whatever else runs and whatever the global generator does."

    async def main() -> None:
        backend = await started(tiny)
        asked = request(backend, "Once", temperature=1.2, seed=11, max_new_tokens=30)
        torch.manual_seed(0)
        alone = await read(backend, asked)
        torch.manual_seed(1)
        others = [request(backend, "What " * k, temperature=1.2, seed=k, max_new_tokens=30) for k in range(1, 4)]
        together = await asyncio.gather(*(read(backend, r) for r in [*others, asked]))
        assert together[-1] == alone
        assert await read(backend, request(backend, "Once", temperature=1.2, seed=12, max_new_tokens=30)) != alone
        free = [await read(backend, request(backend, "Once", temperature=1.2, max_new_tokens=30)) for _ in range(2)]
        assert free[0] != free[1]
        await backend.stop()

    asyncio.run(main())


def test_the_whole_context_can_be_used_and_no_more(tiny: Path) -> None:
    async def main() -> None:
        backend = await started(tiny)
        context = backend.context_length
        prompt = tuple(range(10, 20)) * (context // 10 + 1)
        asked = GenerationRequest(prompt[: context - 3], SamplingParams(max_new_tokens=3, temperature=0), "fits")
        assert len(await read(backend, asked)) == 3
        with pytest.raises(RequestError, match="at most 2 new tokens") as caught:
            await read(backend, GenerationRequest(prompt[: context - 2], asked.params, "too long"))
        assert caught.value.code == "context_length_exceeded"
        await backend.stop()

    asyncio.run(main())


@pytest.mark.parametrize(("dtype", "batching"), [("float32", True), ("float32", False), ("bfloat16", False)])
def test_greedy_equals_transformers(tiny: Path, dtype: str, batching: bool) -> None:
    async def main() -> None:
        backend = await started(tiny, batching, dtype=dtype)
        for prompt in ("What is 12 + 30?", "字", "Once upon a time " * 9):
            asked = request(backend, prompt, temperature=0, max_new_tokens=50)
            ids = torch.tensor([asked.prompt_ids])
            out = backend._bot.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=50, do_sample=False)
            got = [i for chunk in await read(backend, asked) for i in chunk.token_ids]
            assert got == out[0, ids.shape[1] :].tolist()
        await backend.stop()

    asyncio.run(main())


def test_bfloat16_takes_the_likeliest_token_but_for_rounding(tiny: Path) -> None:
    "In a batch, attention with a mask rounds otherwise than without one, so a near tie may turn; nothing worse may happen."

    async def main() -> None:
        backend = await started(tiny, dtype="bfloat16")
        for prompt in ("What is 12 + 30?", "字", "Once upon a time " * 9):
            asked = request(backend, prompt, temperature=0, max_new_tokens=50)
            got = [i for chunk in await read(backend, asked) for i in chunk.token_ids]
            ids = torch.tensor([[*asked.prompt_ids, *got]])
            with torch.no_grad():
                logits = backend._bot.model(ids).logits[0, len(asked.prompt_ids) - 1 : -1].float()
            lost = logits.amax(1) - logits.gather(1, torch.tensor(got)[:, None])[:, 0]
            assert (lost <= 2**-5 * logits.abs().amax(1)).all()  # a few times the dtype's precision of 2**-8
            assert (lost == 0).float().mean() > 0.8
        await backend.stop()

    asyncio.run(main())


def test_batches_equal_single_answers(tiny: Path) -> None:
    "Left padding, early ends and any batch size change nothing."

    async def main() -> tuple[TorchBackend, list[list[int]], list[list[int]]]:
        backend = await started(tiny)
        prompts = [list(backend.chat.tokenizer("What is it? " * k + "字" * (k % 3)).input_ids) for k in range(1, 14)]
        params = SamplingParams(max_new_tokens=30, temperature=0)
        chunks = [await read(backend, GenerationRequest(tuple(p), params, str(i))) for i, p in enumerate(prompts)]
        await backend.stop()
        return backend, prompts, [[i for chunk in one for i in chunk.token_ids] for one in chunks]

    backend, prompts, alone = asyncio.run(main())
    stop = [alone[2][3], alone[7][15], *backend.chat.stop_token_ids]
    expected = [ids[: min([ids.index(s) for s in stop if s in ids], default=len(ids))] for ids in alone]
    assert len({len(ids) for ids in expected}) > 2  # they do end at different times
    for batch_size in (1, 2, 5, 13, 64):
        assert generate_batch(backend._bot.model, prompts, 30, stop, batch_size) == expected


async def ends_unread(leaves: bool, **seconds: float) -> bool:
    "Whether the chunks of a stream are closed whose client stops reading at once, and then leaves or stays."
    closed, writing = [], asyncio.Event()

    async def chunks() -> Any:
        try:
            while True:
                yield Chunk("word ")
        finally:
            closed.append(True)

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            writing.set()
            await asyncio.Event().wait()  # the socket's buffer is full

    async def receive() -> Any:
        await (writing if leaves else asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    stream = chunks()
    response = EventStream(await anext(stream), stream, lambda chunk: [{"text": chunk.text}], **seconds)
    await asyncio.wait_for(response({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send), 20)
    return closed == [True]


def test_a_stream_is_closed_when_its_reader_leaves_in_the_middle_of_a_write() -> None:
    "A client that stops reading blocks the write; when it then disconnects, the chunks must be closed at once."
    assert asyncio.run(ends_unread(leaves=True))


@pytest.mark.parametrize("leaves", [True, False])
def test_a_stream_is_closed_that_has_not_begun(leaves: bool) -> None:
    "Pings went out while the first token was waited for; the client leaves then, or the response is cancelled."
    closed = []

    async def chunks() -> Any:
        try:
            await asyncio.Event().wait()
            yield Chunk("never")
        finally:
            closed.append(True)

    async def main() -> None:
        pinged, stream = asyncio.Event(), chunks()

        async def send(message: Any) -> None:
            if message.get("body") == PING:
                pinged.set()

        async def receive() -> Any:
            await (pinged if leaves else asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        first = asyncio.ensure_future(asyncio.wait_for(anext(stream), None))
        response = asyncio.create_task(EventStream(first, stream, lambda chunk: [])({"type": "http", "asgi": {"spec_version": "2.3"}},
                                                                                   receive, send))
        await pinged.wait()
        if not leaves:
            response.cancel()
        await asyncio.wait_for(asyncio.gather(response, return_exceptions=True), 20)
        assert first.cancelled()

    asyncio.run(main())
    assert closed == [True]


def test_a_client_that_stays_and_reads_nothing_is_given_up() -> None:
    "Otherwise it would keep its place in the engine for as long as it likes."
    assert asyncio.run(ends_unread(leaves=False, ping_s=0.01, patience_s=0.01))


def test_past_its_deadline_it_is_given_up_at_once() -> None:
    "A deadline is told to whoever asks for the next chunk; this client asks for none."
    assert asyncio.run(ends_unread(leaves=False, ping_s=0.01, deadline=0.0))
