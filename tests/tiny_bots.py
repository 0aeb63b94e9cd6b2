"""Bots of random weights and a backend with a gate, for the tests of serving and evaluation."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

import torch

from llmbot.core.config import Config, ModelConfig
from llmbot.core.model_manager import load_bot, new_model, save_bot, train_tokenizer
from llmbot.serving.backends import Capabilities, register_backend
from llmbot.serving.sampling_params import Chunk, GenerationRequest

torch.set_num_threads(1)  # models this small are fastest on one thread, and two wait for each other on a busy machine
CORPUS = ["Grüße, 世界! 😀 What is 12 + 30? It is 42.", "Once upon a time there was a bot.\u2028Ünïcödé 字字 😀😁"]


def make_bot(folder: Path, name: str, seed: int = 1, words: list[str] = CORPUS, **shape: int) -> Path:
    "A Qwen3 of random weights whose greedy answers are not all alike, and are full of broken characters."
    tokenizer = train_tokenizer(words * 20, vocab_size=340)
    model = new_model(ModelConfig(preset="qwen3-0.2m", **shape), tokenizer, seed=seed)
    for weight in model.parameters():
        weight.data *= 3
    return save_bot(folder / name, model, tokenizer)


@register_backend("gated")
class GatedBackend:
    "Yields one word each step while `gate` is open; `seen` has the requests that it was given."

    name = "gated"
    context_length = 1000
    gate = threading.Event()
    seen: list[GenerationRequest] = []
    ended: list[str] = []  # requests whose generator was closed

    def __init__(self, bot_ref: str, cfg: Config) -> None:
        self.chat = load_bot(bot_ref).chat

    def capabilities(self) -> Capabilities:
        return Capabilities(frozenset({"max_new_tokens", "temperature", "top_p", "seed", "stop"}))

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chunk, None]:
        self.seen.append(request)
        prompt, limit = len(request.prompt_ids), request.params.max_new_tokens
        try:
            for count in range(1, limit + 1):
                while not self.gate.is_set():
                    await asyncio.sleep(0.002)
                yield Chunk("word ", (5,), "length" if count == limit else None, prompt, count)
        finally:
            self.ended.append(request.request_id)
