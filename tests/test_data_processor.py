"""core.data_processor and core.packing: no token lost, none leaked, every row accounted for, caches that never lie."""

import dataclasses
import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from llmbot.core.chat import ChatFormat, attach_chat_template
from llmbot.core.chat_template import CHATML_TEMPLATE
from llmbot.core.config import DataConfig
from llmbot.core.data_examples import prompt_group
from llmbot.core.data_formats import normalise, recognise
from llmbot.core.data_processor import PreparedData, prepare_data
from llmbot.core.data_report import DataReport
from llmbot.core.errors import DataError
from llmbot.core.packing import IGNORED, Collator, Encoded, best_fit, columns_of, cut, join_continued, windows
from llmbot.core.preflight import preflight


def make_chat() -> ChatFormat:
    "A byte tokenizer with the ChatML template: one token a byte, so lengths can be counted by hand."
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    attach_chat_template(tokenizer)
    return ChatFormat(tokenizer)


CHAT = make_chat()


def talk(*said: str, system: str = "") -> dict:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
    return {"messages": [{"role": "system", "content": system}] * bool(system) + messages}


def write(folder: Path, rows: list[dict | str], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(folder / name)


def prepare(folder: Path, rows: list[dict | str], length: int = 256, packing: bool = False, **settings: object) -> PreparedData:
    config = DataConfig(train=[write(folder, rows)], cache_dir=str(folder / "cache"), **settings)  # type: ignore[arg-type]
    return prepare_data(config, CHAT, kind="chat", max_seq_length=length, packing=packing)


def texts(dataset: Dataset | IterableDataset | None) -> list[str]:
    return [CHAT.tokenizer.decode(row["input_ids"]) for row in dataset or []]


def learned(dataset: Dataset) -> list[str]:
    return [CHAT.tokenizer.decode([i for i in row["labels"] if i != IGNORED]) for row in dataset]


# Packing


LENGTHS = st.lists(st.integers(1, 40), max_size=60)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(40, 90))
def test_best_fit_keeps_documents_whole(lengths: list[int], capacity: int) -> None:
    rows = best_fit(lengths, capacity)
    assert sorted(piece for row in rows for piece in row) == [(i, 0, n) for i, n in enumerate(lengths)]
    assert all(sum(b - a for _, a, b in row) <= capacity for row in rows)
    assert len(rows) == brute_best_fit(lengths, capacity)


def brute_best_fit(lengths: list[int], capacity: int) -> int:
    "Rows that best fit decreasing needs, found the slow way."
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return len(rooms)


@settings(max_examples=200, deadline=None)
@given(LENGTHS, st.integers(2, 30))
def test_cut_and_windows_use_every_token_once(lengths: list[int], capacity: int) -> None:
    for rows in (cut(lengths, capacity), windows(lengths, capacity)):
        tokens = [(d, t) for row in rows for d, a, b in row for t in range(a, b)]
        assert tokens == [(d, t) for d, n in enumerate(lengths) for t in range(n)]
        assert all(0 < sum(b - a for _, a, b in row) <= capacity for row in rows)
    assert all(sum(b - a for _, a, b in row) == capacity for row in cut(lengths, capacity)[:-1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=20), st.integers(20, 40))
def test_columns(lengths: list[int], capacity: int) -> None:
    "Positions count within a document; the first token of each is never a label; the rest is what it was."
    documents = [Encoded(np.arange(n, dtype=np.int32) + 100 * i, np.arange(n, dtype=np.int32) + 100 * i) for i, n in enumerate(lengths)]
    columns = columns_of(documents, best_fit(lengths, capacity), packed=True)
    ids, labels, positions = (columns[name][1] for name in ("input_ids", "labels", "position_ids"))
    assert sorted(ids) == sorted(i for d in documents for i in d.input_ids)
    assert (positions == ids % 100).all()
    assert (labels == np.where(positions == 0, IGNORED, ids)).all()


def test_too_long_for_a_row() -> None:
    with pytest.raises(ValueError, match="a row takes 8"):
        best_fit([9], 8)


def test_blocks_are_joined_only_where_nothing_is_missing() -> None:
    def block(order: int, continues: bool) -> Encoded:
        ids = np.array([order * 10, order * 10 + 1], np.int32)
        return Encoded(ids, np.where([False, True], ids, IGNORED).astype(np.int32), order=order, continues=continues)

    joined = join_continued([block(1, False), block(2, True), block(4, True), block(5, False), block(6, True)])
    assert [d.input_ids.tolist() for d in joined] == [[10, 11, 20, 21], [40, 41], [50, 51, 60, 61]]
    assert [d.labels.tolist() for d in joined] == [[-100, 11, 20, 21], [-100, 41], [-100, 51, 60, 61]]


def test_packed_batches_isolate_documents(tmp_path: Path) -> None:
    "Loss of a packed batch through a DataLoader = token-weighted loss of the documents alone."
    rows: list[dict | str] = [talk(f"Question {i}?", "a" * (i % 7 + 1)) for i in range(12)]
    packed = prepare(tmp_path, rows, packing=True, validation_split=0.0, length=200).train
    alone = prepare(tmp_path, rows, validation_split=0.0, length=200).train
    torch.manual_seed(0)
    config = Qwen3Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
                         intermediate_size=32, vocab_size=len(CHAT.tokenizer))  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    assert len(packed) < len(alone) == 12

    def mean_loss(data: Dataset, batch_size: int) -> float:
        total = count = 0.0
        for batch in DataLoader(data, batch_size=batch_size, collate_fn=Collator(CHAT.tokenizer.pad_token_id)):
            known = (batch["labels"][:, 1:] != IGNORED).sum().item()
            with torch.no_grad():
                total += model(**batch).loss.item() * known
            count += known
        return total / count

    expected = mean_loss(alone, 1)
    for batch_size in (1, 3):
        assert mean_loss(packed, batch_size) == pytest.approx(expected, abs=1e-5)
        assert mean_loss(alone, batch_size) == pytest.approx(expected, abs=1e-5)


def test_collator() -> None:
    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [-100]}]
    batch = Collator(9)(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert "attention_mask" not in Collator(9)(rows[:1])
    assert Collator(9, multiple_of=8)(rows)["input_ids"].shape == (2, 8)
    packed = Collator(9)([rows[0] | {"position_ids": [0, 0, 1]}, rows[1] | {"position_ids": [0]}])
    assert packed["position_ids"].tolist() == [[0, 0, 1], [0, 0, 1]]
    assert "attention_mask" not in packed
    assert packed["use_cache"] is False


# The books


BAD: dict[str, str | dict] = {
    "cut in half": '{"messages": [{"role": "us',
    "not UTF-8": json.dumps(talk("a", "X")).replace("X", "\udcff"),
    "half of a surrogate pair": json.dumps(talk("a", "\ud83d")),
    "no answer": {"messages": [{"role": "user", "content": "Hi"}]},
    "empty answer": talk("Hi", " "),
    "assistant first": {"messages": [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Hi"}]},
    "two users": {"messages": [{"role": "user", "content": "a"}, *talk("b", "c")["messages"]]},
    "late system": {"messages": [*talk("a", "b")["messages"], {"role": "system", "content": "s"}]},
    "unknown role": {"messages": [{"role": "wizard", "content": "a"}]},
    "no messages": {"messages": []},
    "wrong type": {"messages": "Hi"},
    "a list": "[1, 2]",
    "plain text": {"text": "Once upon a time"},
    "too long": talk("Hi", "x" * 500),
    "stray tool": {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}]},
}


@pytest.mark.parametrize("fault", BAD)
def test_each_fault_is_counted_or_raised(tmp_path: Path, fault: str) -> None:
    "One bad row among two good ones: counted with its place and reason, or raised with its place and a way out."
    path = tmp_path / "rows.jsonl"
    bad = BAD[fault] if isinstance(BAD[fault], str) else json.dumps(BAD[fault])
    path.write_bytes("\n".join([json.dumps(talk("a", "b")), bad, json.dumps(talk("c", "d"))]).encode("utf-8", "surrogateescape"))
    config = DataConfig(train=[str(path)], cache_dir=str(tmp_path / "cache"))
    report = prepare_data(config, CHAT, kind="chat", max_seq_length=256, packing=False).report
    assert (report.rows_read, report.rows_kept) == (3, 2)
    [loss] = report.dropped.values()
    assert loss.where == f"{path}, line 2"
    assert fault not in ("not UTF-8", "half of a surrogate pair") or fault in loss.detail
    strict = dataclasses.replace(config, on_bad_row="raise")
    if fault == "too long":
        assert prepare_data(strict, CHAT, kind="chat", max_seq_length=256, packing=False).report.rows_kept == 2
    else:
        with pytest.raises(DataError, match=r"rows.jsonl, line 2: .*data.on_bad_row=drop"):
            prepare_data(strict, CHAT, kind="chat", max_seq_length=256, packing=False)


SAID = st.text(alphabet="ab {<|", max_size=6)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant", "tool", "x"]), "content": SAID | st.none()})
RECORD = st.one_of(
    st.fixed_dictionaries({"messages": st.lists(MESSAGE, max_size=5)}),
    st.lists(SAID, max_size=6).map(lambda said: talk(*said)),
    st.fixed_dictionaries({"prompt": SAID, "completion": SAID}),
    st.fixed_dictionaries({"text": SAID}),
    st.just({"nothing": 1}),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(RECORD | st.text(max_size=5).filter(lambda t: t.strip() and "\n" not in t and "\r" not in t), min_size=1, max_size=12),
       st.sampled_from(["drop", "truncate_left", "truncate_right", "split"]), st.booleans())  # fmt: skip
def test_every_row_is_accounted_for(tmp_path_factory: pytest.TempPathFactory, rows: list, policy: str, packing: bool) -> None:
    "Read = kept + lost, in whatever mixture, and each document is at most as long as allowed and learns something."
    folder = tmp_path_factory.mktemp("books")
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    (folder / "rows.jsonl").write_bytes("\n".join([json.dumps(talk("a", "b")), *lines]).encode("utf-8", "surrogatepass"))
    config = DataConfig(train=[str(folder / "rows.jsonl")], cache_dir=str(folder), on_overlong=policy)  # type: ignore[arg-type]
    data = prepare_data(config, CHAT, kind="chat", max_seq_length=60, packing=packing)
    report = data.report
    assert report.rows_read == report.rows_kept + report.rows_dropped == len(lines) + 1
    assert sum(report.formats.values()) <= report.rows_read
    assert DataReport.from_json(report.to_json()) == report
    for split in filter(None, (data.train, data.validation)):
        for row in split:
            assert len(row["input_ids"]) == len(row["labels"]) <= 60
            assert any(label != IGNORED for label in row["labels"])
            assert all(label in (IGNORED, i) for i, label in zip(row["input_ids"], row["labels"], strict=True))
    assert report.splits["train"].tokens == sum(len(row["input_ids"]) for row in data.train)


def test_nothing_left_says_why(tmp_path: Path) -> None:
    rows: list[dict | str] = [talk("Hi", "x" * 500)] * 2
    with pytest.raises(DataError, match=r"Nothing is left to train on, of 2 rows: 1 x an exact duplicate.*; 1 x too long .*line 1\)"):
        prepare(tmp_path, rows, length=100)
    with pytest.raises(DataError, match="1 x a plain text is no conversation: learn it with training.method=scratch"):
        prepare(tmp_path, [{"text": "Once upon a time."}])


def test_labels_follow_train_on(tmp_path: Path) -> None:
    rows: list[dict | str] = [talk("a", "b", "c", "d", system="s")]
    assert learned(prepare(tmp_path, rows).train) == ["b<|im_end|>d<|im_end|>"]
    assert learned(prepare(tmp_path, rows, train_on="last_assistant").train) == ["d<|im_end|>"]
    whole = CHAT.render(rows[0]["messages"]).text  # type: ignore[index]
    assert learned(prepare(tmp_path, rows, train_on="all").train) == [whole.removeprefix("<|im_start|>")]


def test_system_prompt_variables_and_trailing_turns(tmp_path: Path) -> None:
    rows: list[dict | str] = [talk("Who?", "I am {{name}} of {{place}}", "And?"), talk("a", "b", system="own")]
    data = prepare(tmp_path, rows, system_prompt="You are {{name}}", variables={"name": "Bo"}, validation_split=0.0)
    first, second = texts(data.train)
    assert "system\nYou are Bo<|im_end|>" in first
    assert first.endswith("I am Bo of {{place}}<|im_end|>\n")
    assert "system\nown<|im_end|>" in second
    assert data.report.changed["messages after the last answer were cut off"].count == 1
    assert any("{{place}} has no value" in warning and "line 1" in warning for warning in data.report.warnings)


# Too long


LONG = talk("q1", "a" * 30, "q2", "b" * 30, "q3", "c" * 30, system="s")


def test_truncate_left_keeps_system_and_newest(tmp_path: Path) -> None:
    whole = CHAT.render(LONG["messages"])
    for length, oldest in ((len(whole.input_ids) - 1, 3), (100, 5)):
        data = prepare(tmp_path, [LONG], length=length, on_overlong="truncate_left")
        [text] = texts(data.train)
        assert text == CHAT.render([LONG["messages"][0], *LONG["messages"][oldest:]]).text
    assert "oldest exchanges" in next(iter(data.report.changed))
    assert data.report.splits["train"].stop_supervised == 1


def test_truncate_right_does_not_learn_to_stop(tmp_path: Path) -> None:
    data = prepare(tmp_path, [talk("q", "a" * 200)], length=100, on_overlong="truncate_right")
    assert len(data.train[0]["input_ids"]) == 100
    assert data.report.splits["train"].stop_supervised == 0
    with pytest.raises(DataError, match="never learned: all answers were cut off"):
        preflight(data, CHAT).raise_if_fatal()


def test_split_at_exchanges(tmp_path: Path) -> None:
    "Every exchange that fits alone is in exactly one part, in order, with the system prompt."
    row = talk("q1", "a" * 30, "q2", "b" * 30, "q3", "c" * 300, "q4", "d", system="s")
    data = prepare(tmp_path, [row], length=150, on_overlong="split")
    parts = texts(data.train)
    assert all(part.startswith("<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq") for part in parts)
    assert [[q for q in ("q1", "q2", "q3", "q4") if q in part] for part in parts] == [["q1", "q2"], ["q4"]]
    assert {loss.count for loss in data.report.changed.values()} == {1}
    assert data.report.rows_kept == 1


def test_texts_are_never_dropped_for_length(tmp_path: Path) -> None:
    "Packed or not, every token of a text is used, and its end is learned once."
    text = "".join(f"paragraph {i} says something.\n\n" for i in range(500))
    (tmp_path / "book.txt").write_text(text)
    for packing in (True, False):
        config = DataConfig(train=[str(tmp_path / "book.txt")], cache_dir=str(tmp_path / "cache"), validation_split=0.0)
        data = prepare_data(config, CHAT, kind="text", max_seq_length=128, packing=packing)
        ids = [i for row in data.train for i in row["input_ids"]]
        assert CHAT.tokenizer.decode(ids) == text + CHAT.tokenizer.eos_token
        assert data.report.splits["train"].documents == 1
        assert max(len(row["input_ids"]) for row in data.train) <= 128


def test_held_out_text_is_not_learned(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("".join(f"paragraph {i} says something.\n\n" for i in range(3000)))
    config = DataConfig(train=[str(tmp_path / "book.txt")], cache_dir=str(tmp_path / "cache"), validation_split=0.2)
    data = prepare_data(config, CHAT, kind="text", max_seq_length=128, packing=True)
    train, held = "".join(texts(data.train)), "".join(texts(data.validation))
    both = [i for i in range(3000) if f"paragraph {i} says something." in train and f"paragraph {i} says something." in held]
    assert not both
    assert 0.05 < len(held) / (len(train) + len(held)) < 0.4


# Splits


PAIRS = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("xyz")), min_size=2, max_size=40)


@settings(max_examples=40, deadline=None)
@given(PAIRS, st.floats(0.05, 0.9), st.integers(0, 9))
def test_splits_share_no_prompt(tmp_path_factory: pytest.TempPathFactory, pairs: list, share: float, seed: int) -> None:
    folder = tmp_path_factory.mktemp("split")
    rows: list[dict | str] = [talk(question.upper() + " " * (i % 3), answer) for i, (question, answer) in enumerate(pairs)]
    data = prepare(folder, rows, validation_split=share, split_seed=seed)
    sides = [{text.split("user\n")[1].split("<|im_end|>")[0].strip() for text in texts(split)} for split in (data.train, data.validation)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == {q.upper() for q, _ in pairs}
    assert bool(data.validation) == (len({q for q, _ in pairs}) > 1)


def test_split_is_stable_when_data_grows(tmp_path: Path) -> None:
    rows: list[dict | str] = [talk(f"question {i}", "a") for i in range(300)]
    few, many = (set(texts(prepare(tmp_path, rows[:n], validation_split=0.2).validation)) for n in (200, 300))
    assert few < many
    other = set(texts(prepare(tmp_path, rows, validation_split=0.2, split_seed=7).validation))
    assert other != many
    assert 30 < len(many) < 90


def test_validation_files(tmp_path: Path) -> None:
    "What is in the validation file is not learned; a question with another answer is warned about."
    held = write(tmp_path, [talk("a", "1"), talk("b", "2")], "held.jsonl")
    data = prepare(tmp_path, [talk("a", "1"), talk("b", "other"), talk("c", "3")], validation=[held])
    assert len(data.train) == len(data.validation) == 2
    assert data.report.dropped["an exact duplicate of an earlier row"].count == 1
    assert any("also in data.train" in warning for warning in data.report.warnings)


def test_groups_ignore_case_and_space() -> None:
    def group(*said: str, system: str = "") -> int:
        record = talk(*said, system=system)
        return prompt_group(normalise(record, recognise(record))[0])

    assert group("Who  are you?\n", "x") == group("who are YOU?", "y", "z", "w")
    assert len({group("a", "x"), group("b", "x"), group("a", "x", system="s")}) == 3


# The cache


def test_cache_hits_and_misses(tmp_path: Path) -> None:
    "The same again is a hit; anything that changes the result is a miss; a damaged entry is made anew."
    rows: list[dict | str] = [talk(f"question {i}", "an answer") for i in range(20)]
    config = DataConfig(train=[write(tmp_path, rows)], cache_dir=str(tmp_path / "cache"))
    base = {"kind": "chat", "max_seq_length": 128, "packing": True, "seed": 1}

    def run(cfg: DataConfig = config, chat: ChatFormat = CHAT, **changes: object) -> PreparedData:
        return prepare_data(cfg, chat, **(base | changes))  # type: ignore[arg-type]

    first = run()
    assert not first.report.cached
    again = run()
    assert again.report.cached
    assert again.train[:] == first.train[:]
    assert again.fingerprint == first.fingerprint
    assert dataclasses.replace(again.report, cached=False) == first.report
    other = make_chat()
    other.tokenizer.chat_template = CHATML_TEMPLATE.replace("assistant\\n", "bot\\n")
    seen = {first.fingerprint}
    for changed in (
        run(max_seq_length=120), run(packing=False), run(seed=2), run(dataclasses.replace(config, train_on="all")),
        run(dataclasses.replace(config, on_overlong="split")), run(dataclasses.replace(config, variables={"a": "b"})),
        run(dataclasses.replace(config, split_seed=7)), run(dataclasses.replace(config, system_prompt="s")),
        run(chat=ChatFormat(other.tokenizer)),
    ):  # fmt: skip
        assert not changed.report.cached
        seen.add(changed.fingerprint)
    assert len(seen) == 10
    (tmp_path / "rows.jsonl").write_text((tmp_path / "rows.jsonl").read_text().replace("question 3", "question x"))
    assert not run().report.cached
    entry = tmp_path / "cache" / run().fingerprint
    (entry / "train.arrow").write_bytes(b"damaged")
    assert not run().report.cached
    assert run().report.cached
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.startswith(".")]
    assert {p.suffix for p in entry.iterdir()} == {".arrow", ".json"}


def _in_process(folder: str) -> tuple[str, list]:
    config = DataConfig(train=[f"{folder}/rows.jsonl"], cache_dir=f"{folder}/cache")
    data = prepare_data(config, make_chat(), kind="chat", max_seq_length=128, packing=True)
    return data.fingerprint, data.train[:]["input_ids"]


def test_two_processes_at_once(tmp_path: Path) -> None:
    write(tmp_path, [talk(f"question {i}", "an answer") for i in range(300)])
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        one, two = pool.map(_in_process, [str(tmp_path)] * 2)
    assert one == two
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [one[0]]


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    "The data is prepared all the same, and the report says why it is not cached."
    (tmp_path / "cache").write_text("a file")
    data = prepare(tmp_path, [talk("a", "b"), talk("c", "d")])
    assert len(data.train) + len(data.validation) == 2
    assert any("could not be cached" in warning and "data.cache_dir" in warning for warning in data.report.warnings)


# Streaming


def test_stream_is_the_same_documents(tmp_path: Path) -> None:
    "Same training documents, twice the same order, nothing held out among them, in a DataLoader too."
    rows: list[dict | str] = [talk(f"question {i}", "a" * (i % 30 + 1)) for i in range(3000)]
    whole = prepare(tmp_path, rows, packing=True, validation_split=0.1)
    stream = prepare(tmp_path, rows, packing=True, validation_split=0.1, streaming=True)
    assert isinstance(stream.train, IterableDataset)
    first, second = ([{name: list(map(int, row[name])) for name in row} for row in stream.train] for _ in range(2))
    assert first == second
    assert {tuple(row) for row in first} == {("input_ids", "labels", "position_ids")}

    def documents(rows: object) -> list[str]:
        return sorted(part for text in texts(rows) for part in text.split("<|im_start|>user") if part)  # type: ignore[arg-type]

    assert documents(first) == documents(whole.train)
    assert documents(stream.validation) == documents(whole.validation)
    assert max(len(row["input_ids"]) for row in first) <= 256
    batch = next(iter(DataLoader(stream.train, batch_size=4, collate_fn=Collator(0))))
    assert batch["input_ids"].shape[0] == 4
    assert stream.report.partial


def test_stream_leaves_out_what_is_held_out(tmp_path: Path) -> None:
    "Rows of the validation file, and rows that the hash holds out far behind the preview."
    held = write(tmp_path, [talk("a", "1")], "held.jsonl")
    rows: list[dict | str] = [talk("a", "1"), talk("a", "2"), talk("b", "3")]
    data = prepare(tmp_path, rows, validation=[held], streaming=True)
    assert [learned([row])[0] for row in data.train] == ["2<|im_end|>", "3<|im_end|>"]
    assert len(data.validation) == 1
    tiny = prepare(tmp_path, rows[1:], validation_split=0.01, streaming=True)
    assert (tiny.validation, len(list(tiny.train))) == (None, 2)


def test_stream_of_text_loses_no_token(tmp_path: Path) -> None:
    text = "".join(f"paragraph {i} says something.\n\n" for i in range(20_000))
    (tmp_path / "book.txt").write_text(text)
    config = DataConfig(train=[str(tmp_path / "book.txt")], cache_dir=str(tmp_path), validation_split=0.0, streaming=True)
    rows = list(prepare_data(config, CHAT, kind="text", max_seq_length=512, packing=True).train)
    assert CHAT.tokenizer.decode([i for row in rows for i in row["input_ids"]]) == text + CHAT.tokenizer.eos_token
    assert {len(row["input_ids"]) for row in rows[:-1]} == {512}


def test_stream_obeys_on_bad_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 2"):
        prepare(tmp_path, [talk("a", "b"), "{"], streaming=True, on_bad_row="raise")


# Real data


EXPECTED = {  # file -> format, rows, rows that are dropped for another reason than length and duplicates
    "sft/gsm8k-train.jsonl": ("prompt_completion", 7473, 0),
    "sft/alpaca-en-demo.json": ("alpaca", 999, 0),
    "sft/identity.json": ("alpaca", 91, 0),
    "sft/sharegpt-toolcall-demo.json": ("sharegpt", 300, 0),
    "sft/oasst-trees.jsonl": ("oasst", 70, 0),
    "sft/chatterbot": ("chatterbot", 2026, 1),
    "preference/dpo-en-demo.json": ("preference", 300, 0),
    "preference/kto-en-demo.json": ("preference", 300, 150),
}


@pytest.fixture(scope="module")
def stories(shared: Path) -> ChatFormat:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    attach_chat_template(tokenizer)
    return ChatFormat(tokenizer)


@pytest.mark.parametrize("name", EXPECTED)
def test_real_conversations(shared: Path, stories: ChatFormat, tmp_path: Path, name: str) -> None:
    format, rows, lost = EXPECTED[name]
    config = DataConfig(train=[str(shared / "data" / name)], cache_dir=str(tmp_path))
    data = prepare_data(config, stories, kind="chat", max_seq_length=1024, packing=True)
    report = data.report
    assert report.formats == {format: rows}
    assert report.rows_read == rows == report.rows_kept + report.rows_dropped
    assert sum(loss.count for reason, loss in report.dropped.items() if "too long" not in reason and "duplicate" not in reason) == lost
    found = preflight(data, stories)
    found.raise_if_fatal()
    assert report.splits["train"].stop_supervised == report.splits["train"].documents
    assert os.path.basename(name).split(".")[0] in json.dumps(json.loads(found.to_json())["data"]["sources"])
    if name == "sft/identity.json":
        assert sum("has no value" in warning for warning in found.warnings) == 2
    if name == "sft/chatterbot":
        assert report.changed["a question with several answers, each became a conversation"].count == 58


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "inaugural.txt", "genesis-web.txt"])
def test_real_texts(shared: Path, stories: ChatFormat, tmp_path: Path, name: str) -> None:
    path = shared / "data" / "text" / name
    data = prepare_data(DataConfig(train=[str(path)], cache_dir=str(tmp_path)), stories, kind="text", max_seq_length=256, packing=True)
    assert data.report.rows_dropped == 0
    stats = data.report.splits["train"]
    assert stats.tokens > 0.99 * (stats.sequences - 1) * 256
    assert data.report.splits["validation"].tokens > 1000
    preflight(data, stories).raise_if_fatal()
