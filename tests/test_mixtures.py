"""Mixtures and curricula: how often each entry comes in an epoch, in which order, and that held-out rows never do."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipes import built, talk, train
from recipes import recipe as small_recipe
from recipes import write as write_rows

from llmbot.core.chat import ChatFormat
from llmbot.core.config import DataConfig
from llmbot.core.config_io import load_config
from llmbot.core.data_processor import fingerprint_of, prepare_data
from llmbot.core.data_store import PreparedData
from llmbot.core.errors import ConfigError, DataError
from llmbot.core.model_manager import train_tokenizer
from llmbot.core.packing import IGNORED, arrange, passes_of
from llmbot.core.preflight import preflight, summary

NAMES = ("red", "green", "blue")
CHAT = ChatFormat(train_tokenizer([f"the {name} fish 0123456789 says " for name in NAMES] * 9, vocab_size=320))


def write(folder: Path, rows: int = 20, kind: str = "chat") -> list[str]:
    "Three files; each row says which file it is from, and its number."
    said = {name: [f"{name} {i}" + " fish" * (i % 5) for i in range(rows)] for name in NAMES}
    made = {name: [{"text": text} if kind == "text" else talk(f"{name} {i}?", text) for i, text in enumerate(said[name])] for name in NAMES}
    return [str(write_rows(folder / f"{name}.jsonl", made[name])) for name in NAMES]


def prepare(tmp: Path, paths: list[str], packing: bool = False, kind: Any = "chat", length: int = 96, **changes: Any) -> PreparedData:
    config = DataConfig(train=paths, cache_dir=str(tmp / "cache"), **({"validation_split": 0.0} | changes))
    return prepare_data(config, CHAT, kind=kind, max_seq_length=length, packing=packing, seed=7)


def documents(row: dict[str, Any]) -> list[str]:
    "The answers in a row, packed or not, in order."
    found: list[list[int]] = []
    positions = row.get("position_ids") or range(len(row["input_ids"]))
    for i, label, position in zip(row["input_ids"], row["labels"], positions, strict=True):
        if position == 0:
            found.append([])
        if label != IGNORED:
            found[-1].append(i)
    return [CHAT.decode(ids).strip() for ids in found]


def seen(data: PreparedData) -> list[str]:
    return [text for row in data.train for text in documents(row)]


@pytest.mark.parametrize("packing", [False, True])
def test_weights_are_how_often(tmp_path: Path, packing: bool) -> None:
    "A quarter, once, three times: counted document by document in the rows themselves."
    data = prepare(tmp_path, write(tmp_path), packing, weights=[0.25, 1, 3])
    counts = Counter(seen(data))
    by_file = {name: Counter(count for text, count in counts.items() if text.startswith(name)) for name in NAMES}
    assert by_file == {"red": {1: 5}, "green": {1: 20}, "blue": {3: 20}}
    assert [(p.documents, p.per_epoch) for p in data.report.mixture] == [(20, 5), (20, 20), (20, 60)]
    assert data.report.splits["train"].documents == 85
    assert data.report.splits["train"].sequences == len(data.train)
    assert "an epoch takes 5 of red.jsonl, which has 20 (weight 0.25)" in summary(preflight(data, CHAT).data)


def test_a_row_holds_no_document_twice(tmp_path: Path) -> None:
    for row in prepare(tmp_path, write(tmp_path), True, weights=[1, 0, 3]).train:
        assert len(set(documents(row))) == len(documents(row))


def test_fractions_are_seeded_samples(tmp_path: Path) -> None:
    paths = write(tmp_path)
    runs = []
    for seed in (1, 1, 2):
        config = DataConfig(train=paths, weights=[0.5, 1, 1], validation_split=0, cache_dir=str(tmp_path / f"cache{len(runs)}"))
        runs.append(seen(prepare_data(config, CHAT, kind="chat", max_seq_length=96, packing=False, seed=seed)))
    assert runs[0] == runs[1]
    assert set(runs[0]) != set(runs[2])


def test_weights_of_one_change_nothing(tmp_path: Path) -> None:
    for packing in (False, True):
        plain, weighted = (prepare(tmp_path, write(tmp_path), packing, **w) for w in ({}, {"weights": [1, 1, 1]}))
        assert plain.train.to_list() == weighted.train.to_list()
        assert plain.fingerprint != weighted.fingerprint


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.lists(st.floats(0, 3.5), min_size=4, max_size=4), st.integers(0, 9))
def test_passes_have_the_right_counts(entries: list[int], weights: list[float], seed: int) -> None:
    "Every document as often as its whole weight, and as many of them once more as the rest of it says."
    counts = Counter(d for chosen in passes_of(entries, weights, seed) for d in chosen)
    for entry in set(entries):
        own = [d for d, e in enumerate(entries) if e == entry]
        whole = int(weights[entry])
        assert {counts[d] - whole for d in own} <= {0, 1}
        assert sum(counts[d] - whole for d in own) == round((weights[entry] - whole) * len(own))
    for order in ("shuffled", "as_given", "short_first"):
        groups = arrange(passes_of(entries, weights, seed), entries, [1 + d % 3 for d in range(len(entries))], order)
        assert Counter(d for group in groups for d in group) == counts


@pytest.mark.parametrize("packing", [False, True])
def test_held_out_rows_never_enter(tmp_path: Path, packing: bool) -> None:
    "Whatever the weights, what is validated on is the same and is not learned."
    paths = write(tmp_path)
    plain = prepare(tmp_path, paths, packing, validation_split=0.3)
    mixed = prepare(tmp_path, paths, packing, validation_split=0.3, weights=[3, 0, 1.5], order="as_given")
    assert plain.validation is not None
    assert mixed.validation is not None
    held = {text for row in mixed.validation for text in documents(row)}
    assert held == {text for row in plain.validation for text in documents(row)}
    assert not held & set(seen(mixed))
    assert not any(text.startswith("green") for text in seen(mixed))


@pytest.mark.parametrize("packing", [False, True])
def test_as_given_goes_entry_by_entry(tmp_path: Path, packing: bool) -> None:
    "In the order of the file on the first pass, in another on the second; no row mixes two entries."
    paths = write(tmp_path)
    data = prepare(tmp_path, [paths[2], paths[0]], packing, weights=[2, 1], order="as_given")
    order = [text.split()[0] + " " + text.split()[1] for text in seen(data)]
    assert order[:20] == [f"blue {i}" for i in range(20)]
    assert sorted(order[20:40]) == sorted(order[:20])
    assert order[20:40] != order[:20]
    assert order[40:] == [f"red {i}" for i in range(20)]
    for row in data.train:
        assert len({text.split()[0] for text in documents(row)}) == 1


def test_as_given_text_is_cut_within_entries(tmp_path: Path) -> None:
    "Packed text too: every token of both entries once, and no row with two of them."
    paths = write(tmp_path, kind="text")
    data = prepare(tmp_path, paths[:2], True, "text", length=40, order="as_given")
    texts = [CHAT.tokenizer.decode(row["input_ids"]) for row in data.train]
    owners = ["red" if "red" in text else "green" for text in texts]
    assert owners == sorted(owners, reverse=True)
    assert not any("red" in text and "green" in text for text in texts)
    shuffled = prepare(tmp_path, paths[:2], True, "text", length=40)
    assert sum(len(r["input_ids"]) for r in data.train) == sum(len(r["input_ids"]) for r in shuffled.train)


@pytest.mark.parametrize("packing", [False, True])
def test_short_first_climbs(tmp_path: Path, packing: bool) -> None:
    data = prepare(tmp_path, write(tmp_path), packing, order="short_first", weights=[1, 2, 0.5])
    lengths = [len(text) for text in seen(data)]
    tokens = [len(CHAT.tokenizer(text).input_ids) for text in seen(data)]
    assert len(lengths) == 70
    assert max(tokens[:20]) <= min(tokens[-20:])


def test_fingerprint_changes(tmp_path: Path) -> None:
    paths = write(tmp_path)
    ways: list[dict[str, Any]] = [{}, {"weights": [1, 1, 2]}, {"weights": [1, 2, 1]}, {"order": "as_given"}, {"order": "short_first"}]
    assert len({fingerprint_of(DataConfig(train=paths, **way), CHAT, {}, {}) for way in ways}) == len(ways)


def test_cache_keeps_the_mixture(tmp_path: Path) -> None:
    paths = write(tmp_path)
    first, again = (prepare(tmp_path, paths, weights=[0.5, 1, 1]) for _ in range(2))
    assert again.report.cached
    assert again.report.mixture == first.report.mixture != []


def test_nothing_left_and_nothing_taken(tmp_path: Path) -> None:
    paths = write(tmp_path, rows=3)
    with pytest.raises(DataError, match="raise a weight"):
        prepare(tmp_path, paths, weights=[0, 0, 0])
    data = prepare(tmp_path, paths, weights=[0.01, 1, 1])
    assert any("red.jsonl: data.weights takes nothing" in w for w in data.report.warnings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.weights": "[1]"}, "1 weights for 2 entries"),
        ({"data.weights": "[1, -1]"}, "weights"),
        ({"data.streaming": True, "data.order": "as_given", "training.max_steps": 2}, "read as it comes"),
        ({"data.order": "short_first", "training.packing": False, "training.group_by_length": True}, "keep one"),
        ({"data.streaming": True, "training.max_steps": 2, "training.packing": False, "training.group_by_length": True}, "not known"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    paths = write(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_config(None, overrides=[f"{k}={v}" for k, v in ({"data.train": json.dumps(paths[:2])} | changes).items()], env={})


@pytest.mark.parametrize(("order", "packing"), [("as_given", False), ("as_given", True), ("short_first", False), ("shuffled", False)])
def test_trainer_takes_rows_in_that_order(tmp_path: Path, order: str, packing: bool) -> None:
    "The loader of the trainer itself: its own shuffle is off for the ordered ones, in every epoch."
    changes = {"training.packing": packing, "training.per_device_batch_size": 2, "training.max_steps": 2, "data.order": order,
               "data.train": json.dumps(write(tmp_path)[:2]), "data.max_seq_length": 96, "data.validation_split": 0}
    cfg = small_recipe(tmp_path, **changes)
    run, trainer = built(cfg, tmp_path / "run")
    loader = trainer.get_train_dataloader()
    stored = [row["input_ids"] for row in run.data.train]
    for epoch in range(2):
        loader.set_epoch(epoch)
        taken = [ids.tolist() for batch in loader for ids in batch["input_ids"]]
        kept = [ids[: len(row)] for ids, row in zip(taken, stored, strict=True)]
        assert (kept == stored) == (order != "shuffled")
    if order == "as_given" and packing:
        assert train(cfg).steps == 2
