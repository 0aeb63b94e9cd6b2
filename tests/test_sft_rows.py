"""What is learned, and from what: packed documents are apart on each architecture, and only the assistant's tokens are learned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    Qwen3Config,
)  # fmt: skip

from llmbot.core.batching import check_isolation, documents_leak
from llmbot.core.chat import ChatFormat
from llmbot.core.config import DataConfig
from llmbot.core.data_formats import Example
from llmbot.core.data_processor import prepare_data
from llmbot.core.data_tokens import EARLY, TrainOn, encode_chats, labelled
from llmbot.core.errors import ConfigError
from llmbot.core.model_manager import load_bot, train_tokenizer
from llmbot.core.packing import IGNORED, Collator

SIZE = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT2 = {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
WIDE = SIZE | {"intermediate_size": 64, "max_position_embeddings": 64}
HEADS = WIDE | {"num_key_value_heads": 2, "head_dim": 8}
ISOLATED: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**HEADS),
    "llama": LlamaConfig(**WIDE),
    "mistral": MistralConfig(**HEADS, sliding_window=6),
    "gemma3": Gemma3TextConfig(**HEADS, sliding_window=6, layer_types=["sliding_attention", "full_attention"], pad_token_id=0),
    "gpt2": GPT2Config(**GPT2),
    "gpt_neox": GPTNeoXConfig(**WIDE),
}
LEAKING: dict[str, PreTrainedConfig] = {
    "mamba": MambaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, state_size=4),
    "opt": OPTConfig(**SIZE, ffn_dim=64, max_position_embeddings=64, word_embed_proj_dim=32),
    "falcon": FalconConfig(**SIZE),
    "bloom": BloomConfig(vocab_size=90, hidden_size=32, n_layer=2, n_head=4),
}


def build(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    attention = "eager" if config.model_type in ("bloom", "mamba") else "sdpa"
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def packed_and_alone(model: Any, vocab: int) -> float:
    "The largest difference between the logits of three documents packed in one row and of each on its own, through the collator."
    drawn = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, vocab, (n,), generator=drawn) for n in (5, 9, 7)]
    row = {"input_ids": torch.cat(documents).tolist(), "position_ids": [i for d in documents for i in range(len(d))]}
    short = {"input_ids": documents[0].tolist(), "position_ids": list(range(5))}  # beside a shorter row, so that there is padding
    batch = Collator(0)([row | {"labels": row["input_ids"]}, short | {"labels": short["input_ids"]}])
    with torch.no_grad():
        together = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=d[None], use_cache=False).logits[0] for d in documents])
    return float((together[: len(alone)] - alone).abs().max())


@pytest.mark.parametrize("name", ISOLATED)
def test_packed_documents_are_apart(name: str) -> None:
    model = build(ISOLATED[name])
    assert packed_and_alone(model, 90) < 2e-6
    assert documents_leak(model) == 0
    check_isolation(model)


@pytest.mark.parametrize("name", LEAKING)
def test_families_that_leak_are_refused(name: str) -> None:
    "The witness is not the check itself: packed and lone logits differ."
    model = build(LEAKING[name])
    assert packed_and_alone(model, 90) > 1e-3
    with pytest.raises(ConfigError, match=f"{name} model.*Set training.packing=false"):
        check_isolation(model)


def test_real_model_packed(shared: Path) -> None:
    "stories260K, whose weights are trained: a leak would show at once."
    model = load_bot(shared / "models" / "stories260K", device="cpu", dtype="float32").model
    assert AutoConfig.from_pretrained(shared / "models" / "stories260K").model_type == "llama"
    assert packed_and_alone(model, 500) < 2e-4
    assert documents_leak(model) == 0


WORDS = "system user assistant tool You are terse. What is 2 + 3? 5 And twice that? 10 Weather in Bonn rain name arguments city"
CHAT = ChatFormat(train_tokenizer([WORDS, '<tool_call>{"name": "look_up", "arguments": {"city": "Bonn"}}</tool_call>'] * 9, vocab_size=400))
CALL = {"type": "function", "function": {"name": "look_up", "arguments": '{"city": "Bonn"}'}}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "Weather in Bonn?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "rain"},
    {"role": "assistant", "content": "rain in Bonn"},
]
CALLED = '<tool_call>{"name": "look_up", "arguments": {"city": "Bonn"}}</tool_call>'
WRITTEN = (  # by hand: what the conversation is as ChatML, and which parts of it are the assistant's
    ("<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n", False),
    ("5<|im_end|>", True),
    ("\n<|im_start|>user\nWeather in Bonn?<|im_end|>\n<|im_start|>assistant\n", False),
    (f"{CALLED}<|im_end|>", True),
    ("\n<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n", False),
    ("rain in Bonn<|im_end|>", True),
    ("\n", False),
)  # fmt: skip


@pytest.mark.parametrize(("train_on", "learned"), [("assistant", (1, 3, 5)), ("last_assistant", (5,)), ("all", range(7))])
def test_learned_tokens_of_a_conversation(train_on: TrainOn, learned: Any) -> None:
    "Turn by turn: the pieces of the row that carry labels are the hand-written ones, and the rest carries none."
    rendered = CHAT.render(TALK)
    document = labelled(rendered.input_ids, rendered.assistant_mask, train_on)
    at = 0
    for number, (text, _) in enumerate(WRITTEN):
        ids = CHAT.tokenizer(text, add_special_tokens=False).input_ids if number not in (1, 3, 5) else None
        end = at
        while CHAT.tokenizer.decode(document.input_ids[at:end].tolist()) != text:
            end += 1
            assert end <= len(document.input_ids), f"{text!r} does not stand at token {at}"
        assert ids is None or document.input_ids[at:end].tolist() == ids
        labels = document.labels[max(at, 1) : end]  # nothing comes before the first token
        assert (labels == document.input_ids[max(at, 1) : end]).all() if number in learned else (labels == IGNORED).all()
        at = end
    assert at == len(document.input_ids)


@pytest.mark.parametrize(("train_on", "spoken"), [("assistant", (1, 3, 5)), ("last_assistant", (5,)), ("all", range(7))])
@pytest.mark.parametrize("stopped", [(2,), (6,), (2, 6), ()])
def test_end_of_a_stopped_answer_is_not_learned(train_on: TrainOn, spoken: Any, stopped: tuple[int, ...]) -> None:
    "The labels differ from those of the unmarked conversation in the end tokens of the marked answers alone, whole or split."
    piece = {2: 1, 6: 5}  # where the answers stand in WRITTEN
    talk = [message | ({"stopped": True} if i in stopped else {}) for i, message in enumerate(TALK)]
    (outcome,) = encode_chats(CHAT, [Example(kind="chat", messages=talk)], 1000, train_on, "drop")
    (document,) = outcome.documents
    end, expected = CHAT.tokenizer.convert_tokens_to_ids("<|im_end|>"), list[bool]()
    for number, (text, _) in enumerate(WRITTEN):
        expected += [number in spoken and number not in [piece[i] for i in stopped]] * text.count("<|im_end|>")
    learned = (document.labels != IGNORED)[document.input_ids == end].tolist()
    assert learned == expected
    plain = labelled(document.input_ids, CHAT.render(TALK).assistant_mask, train_on).labels
    assert (document.labels != plain).sum() == sum(piece[i] in spoken for i in stopped)
    assert (EARLY in outcome.notes) == bool(stopped)

    limit = len(document.input_ids) - 1  # one token too long: split between its two exchanges
    (outcome,) = encode_chats(CHAT, [Example(kind="chat", messages=talk)], limit, "assistant", "split")
    assert [bool((part.labels == end)[-3:].any()) for part in outcome.documents] == [2 not in stopped, 6 not in stopped]
    ends = [int((part.labels == end).sum()) for part in outcome.documents]
    assert ends == [1 - (2 in stopped), 2 - (6 in stopped)]


def test_completion_rows_learn_the_completion(tmp_path: Path) -> None:
    "Prompt and completion: the completion and its end token, nothing of the prompt; packed as well."
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"prompt": "What is 2 + 3?", "completion": "5"}\n{"prompt": "And twice that?", "completion": "10"}\n')
    for packing in (False, True):
        config = DataConfig(train=[str(path)], validation_split=0, cache_dir=str(tmp_path / "cache"))
        data = prepare_data(config, CHAT, kind="chat", max_seq_length=200, packing=packing)
        assert len(data.train) == (1 if packing else 2)
        labels = [i for row in data.train for i in row["labels"] if i != IGNORED]
        assert sorted(CHAT.tokenizer.decode(labels).split("<|im_end|>")[:2]) == ["10", "5"]
