"""Evaluation against closed formulas, naive loops and hand-made data."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_bots import make_bot

from llmbot.core.config import Config, DataConfig, ModelConfig
from llmbot.core.errors import BotError, ConfigError, DataError
from llmbot.core.model_manager import load_bot, new_model, save_bot, train_tokenizer
from llmbot.core.registry_aliases import check_gate
from llmbot.evaluation.compare import compare_bots
from llmbot.evaluation.evaluate import evaluate_bot
from llmbot.evaluation.html_report import comparison_page, evaluation_page
from llmbot.evaluation.page import round_ends
from llmbot.evaluation.recording import figures_of
from llmbot.evaluation.report import ALIKE
from llmbot.monitoring.text_metrics import corpus_metric, exact_match, get_metric, token_f1

CPU = ModelConfig(device="cpu")


def talk(n: int, skill: str) -> dict[str, Any]:
    question, answer = f"What is {n} + {n + 1}?", f"It is {2 * n + 1}. 😀"
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "skill": skill}


TALKS = [talk(n, "easy") for n in range(4)] + [talk(n, "hard") for n in range(90, 97)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_bot(tmp_path_factory.mktemp("bots"), "tiny", seed=3))


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> str:
    "A model whose output head is zero: every token is as likely as any other."
    tokenizer = train_tokenizer(["What is 1 + 2? It is 3."] * 20, vocab_size=300)
    model = new_model(ModelConfig(preset="qwen3-0.2m"), tokenizer)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    return str(save_bot(tmp_path_factory.mktemp("bots") / "uniform", model, tokenizer))


def test_perplexity_of_a_uniform_model_is_the_vocabulary(uniform: str, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", TALKS)
    report = evaluate_bot(uniform, data, ["loss", "perplexity", "bits_per_byte"], model=CPU)
    loaded = load_bot(uniform)
    vocabulary = loaded.config.vocab_size
    assert report.metrics["perplexity"] == pytest.approx(vocabulary, rel=1e-4)
    assert report.metrics["loss"] == pytest.approx(math.log(vocabulary), rel=1e-5)
    answers = [row["messages"][1]["content"] for row in TALKS]
    tokens = sum(len(loaded.tokenizer(a).input_ids) + 1 for a in answers)  # and the stop token, which has no bytes
    bits = tokens * math.log2(vocabulary)
    assert report.metrics["bits_per_byte"] == pytest.approx(bits / sum(len(a.encode()) for a in answers), rel=1e-4)
    assert report.rows == len(TALKS)


def test_likelihood_equals_transformers_loss(bot: str, tmp_path: Path) -> None:
    "Row by row with transformers' own loss, weighted by tokens; batches and padding change nothing."
    loaded = load_bot(bot, device="cpu")
    nll, tokens = 0.0, 0
    for row in TALKS:
        one = loaded.chat.render(row["messages"])
        labels = torch.tensor([[i if on else -100 for i, on in zip(one.input_ids, one.assistant_mask, strict=True)]])
        with torch.no_grad():
            loss = loaded.model(input_ids=torch.tensor([one.input_ids]), labels=labels).loss.item()
        nll, tokens = nll + loss * sum(one.assistant_mask), tokens + sum(one.assistant_mask)
    data = write(tmp_path / "rows.jsonl", TALKS)
    for batch_size in (1, 4, 64):
        report = evaluate_bot(bot, data, ["perplexity", "loss"], model=CPU, batch_size=batch_size)
        assert report.metrics["loss"] == pytest.approx(nll / tokens, rel=1e-4)
        assert report.metrics["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-3)


@pytest.mark.parametrize("backend", ["torch", "llmbot.serving.torch_backend:TorchBackend"])
def test_exact_match_equals_a_naive_loop(bot: str, tmp_path: Path, backend: str) -> None:
    "Half of the references are what transformers' `generate` says, so half of the rows must match; by both ways to ask."
    loaded = load_bot(bot, device="cpu")
    rows, right = [], 0
    for k, row in enumerate(TALKS):
        messages = list(row["messages"])
        ids = torch.tensor([loaded.chat.prompt_ids(messages[:1])])
        out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6 + k, do_sample=False)[0, ids.shape[1] :]
        said = loaded.chat.decode(out.tolist())
        if k % 2 == 0:
            messages[1] = {"role": "assistant", "content": said}
        right += exact_match(said, messages[1]["content"]) == 1
        rows.append({"messages": messages})
    assert 0 < right < len(rows)
    for k, row in enumerate(rows):  # each with its own limit, as the naive loop had
        report = evaluate_bot(bot, write(tmp_path / f"{k}.jsonl", [row]), ["exact_match"], model=CPU, backend=backend, max_new_tokens=6 + k)
        assert report.metrics["exact_match"] == float(k % 2 == 0), (k, report.examples)
        assert report.unfinished == 1


def test_groups_and_examples(bot: str, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", TALKS)
    report = evaluate_bot(bot, [data], ["token_f1", "exact_match", "perplexity"], model=CPU, group_by="skill", examples=3)
    assert [(g.name, g.rows) for g in report.groups] == [("easy", 4), ("hard", 7)]
    assert list(report.metrics) == ["token_f1", "exact_match", "perplexity"]
    weighted = sum(g.rows * g.metrics["token_f1"] for g in report.groups) / report.rows
    assert report.metrics["token_f1"] == pytest.approx(weighted)
    whole = evaluate_bot(bot, [data], ["perplexity"], model=CPU)
    assert report.metrics["perplexity"] == pytest.approx(whole.metrics["perplexity"], rel=1e-4)
    assert report.groups[0].metrics["perplexity"] != pytest.approx(whole.metrics["perplexity"], rel=1e-3)
    assert [e.group for e in report.examples] == ["easy"] * 3 + ["hard"] * 3
    first = report.examples[0]
    assert (first.prompt, first.reference) == ("What is 0 + 1?", "It is 1. 😀")
    assert first.where.endswith("rows.jsonl, line 1")
    report.save(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["metrics"] == report.metrics


def test_rows_left_out_are_counted(bot: str, tmp_path: Path) -> None:
    too_long = {"prompt": "word " * 3000, "completion": "x"}
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    tool = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]}
    bad = ['{"prompt": "cut in ha', {"text": "plain"}, too_long, tool, {"prompt": "no answer"}]
    data = write(tmp_path / "rows.jsonl", [*TALKS[:3], *bad])
    report = evaluate_bot(bot, data, model=CPU)
    assert report.rows == 3
    assert sum(loss.count for loss in report.dropped.values()) == len(bad)
    assert {loss.where.rpartition(" ")[2] for loss in report.dropped.values()} == {"4", "5", "6", "7", "8"}
    with pytest.raises(DataError, match="line 4"):
        evaluate_bot(bot, data, model=CPU, config=DataConfig(on_bad_row="raise"))
    assert evaluate_bot(bot, data, ["exact_match"], model=CPU, max_rows=2).rows == 2


def test_one_row_has_no_interval(bot: str, tmp_path: Path) -> None:
    "It is said in the report, on the page and in what a manifest would keep; for a group too, and for a difference."
    data = write(tmp_path / "rows.jsonl", TALKS)
    report = evaluate_bot(bot, data, ["exact_match", "distinct1", "perplexity"], model=CPU, max_rows=1, max_new_tokens=4)
    said = "no interval of exact_match, perplexity: from one row alone none can be given"
    assert (report.intervals, said in report.notes, said in evaluation_page(report)) == ({}, True, True)
    kept = figures_of(report)[f"{report.split}/exact_match"]
    assert ("interval" in kept, kept["settings"]["no_interval"]) == (False, ["exact_match", "perplexity"])
    grouped = evaluate_bot(bot, data, ["exact_match"], model=CPU, max_rows=5, max_new_tokens=4, group_by="skill")
    assert list(grouped.intervals) == ["exact_match"]
    assert grouped.notes == [f"no spread of exact_match: {ALIKE}", f"no spread of exact_match, easy: {ALIKE}",
                             "no interval of exact_match, hard: from one row alone none can be given"]  # fmt: skip
    pair = compare_bots(bot, bot, data, ["token_f1"], model=CPU, max_rows=1, max_new_tokens=4, resamples=20)
    assert math.isnan(pair.differences["token_f1"].p_value)
    assert "no interval and no p of the difference of token_f1: from one row alone none can be given" in comparison_page(pair)
    pair.save(tmp_path / "pair.json")
    assert json.loads((tmp_path / "pair.json").read_text())["differences"]["token_f1"]["interval"] == {"low": None, "high": None}


def test_rows_that_are_alike_have_no_spread(bot: str, tmp_path: Path) -> None:
    "An interval of width zero is marked and explained: in the report, on the page, in a notebook, to a gate, and for a difference."
    data = write(tmp_path / "rows.jsonl", TALKS)
    report = evaluate_bot(bot, data, ["exact_match", "perplexity"], model=CPU, max_rows=4, max_new_tokens=4, group_by="skill")
    assert (report.metrics["exact_match"], report.intervals["exact_match"].flat, report.intervals["perplexity"].flat) == (0.0, True, False)
    said = f"no spread of exact_match: {ALIKE}"
    assert all(said in text for text in (report.notes, evaluation_page(report), report._repr_html_()))
    assert any(note.startswith("no spread of exact_match, ") for note in report.notes), "and of a group"
    assert "0 [0, 0] no spread" in evaluation_page(report)
    figures = figures_of(report)
    gate = check_gate(figures, "exact_match.high<=0.5", report.digest or "")
    assert (gate.passed, "exact_match is 0 (0 to 0, no spread)" in str(gate)) == (True, True)
    pair = compare_bots(bot, bot, data, ["exact_match"], model=CPU, max_rows=4, max_new_tokens=4, resamples=20)
    assert f"no spread of the difference of exact_match: {ALIKE}" in comparison_page(pair)
    assert pair.differences["exact_match"].p_value == 1  # equal in all rows


def test_earlier_turns_and_system_prompt_are_part_of_the_question(bot: str, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "One?"}, {"role": "assistant", "content": "First."},
        {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Second."},
    ]  # fmt: skip
    data = write(tmp_path / "rows.jsonl", [{"messages": messages}])
    config = DataConfig(system_prompt="Be brief.")
    report = evaluate_bot(bot, data, ["exact_match"], model=CPU, config=config, max_new_tokens=12)
    loaded = load_bot(bot, device="cpu")
    ids = torch.tensor([loaded.chat.prompt_ids([{"role": "system", "content": "Be brief."}, *messages[:-1]])])
    out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert report.examples[0].answer == loaded.chat.decode(out.tolist())
    assert (report.examples[0].prompt, report.examples[0].reference) == ("Two?", "Second.")


def test_long_text_is_predicted_once(bot: str, tmp_path: Path) -> None:
    "A text beyond the context is measured in windows; every token but the first counts once."
    loaded = load_bot(bot, device="cpu")
    text = "Once upon a time there was a bot. Grüße! " * 400
    tokens = len(loaded.tokenizer(text).input_ids)
    assert tokens > 2 * loaded.config.max_position_embeddings
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    report = evaluate_bot(bot, str(tmp_path / "text.jsonl"), ["loss", "bits_per_byte"], model=CPU)
    first = len(loaded.tokenizer.decode(loaded.tokenizer(text).input_ids[:1]).encode())
    # nats of all tokens but the first, and of the end token; bytes of all but the first token
    nats = report.metrics["bits_per_byte"] * math.log(2) * (len(text.encode()) - first)
    assert nats / report.metrics["loss"] == pytest.approx(tokens, rel=1e-6)


def test_windows_by_brute_force(bot: str, tmp_path: Path) -> None:
    "Each token predicted from the window that first holds it, one forward pass a window; and an interval that numpy finds, too."
    loaded, size, stride = load_bot(bot, device="cpu"), 32, 12
    text = "Once upon a time there was a bot. What is 12 + 30? It is 42. Grüße! " * 6
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    report = evaluate_bot(bot, str(tmp_path / "text.jsonl"), ["loss", "perplexity", "bits_per_byte"], model=CPU, window=size, stride=stride)
    ids = [*loaded.tokenizer(text).input_ids, loaded.tokenizer.eos_token_id]
    starts = range(0, len(ids) - size + stride, stride)
    windows: dict[int, list[float]] = {}
    for i in range(1, len(ids)):
        start = next(s for s in starts if s + size > i)
        with torch.no_grad():
            logits = loaded.model(torch.tensor([ids[start : min(start + size, len(ids))]])).logits[0, i - start - 1]
        windows.setdefault(start, []).append(-float(logits.log_softmax(-1)[ids[i]]))
    nll = sum(map(sum, windows.values()))
    first = len(loaded.tokenizer.decode(ids[:1]).encode())
    assert report.metrics["loss"] == pytest.approx(nll / (len(ids) - 1), rel=1e-4)
    assert report.metrics["perplexity"] == pytest.approx(math.exp(nll / (len(ids) - 1)), rel=1e-3)
    assert report.metrics["bits_per_byte"] == pytest.approx(nll / math.log(2) / (len(text.encode()) - first), rel=1e-4)
    assert (report.settings["window"], report.settings["stride"], report.settings["resampled"]) == (size, stride, "windows of the texts")
    parts = np.array([[sum(w), len(w)] for w in windows.values()])
    drawn = parts[np.random.default_rng(0).integers(0, len(parts), (20_000, len(parts)))].sum(1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
    assert (report.intervals["loss"].low, report.intervals["loss"].high) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_blocks_of_a_text_file_are_one_text(bot: str, tmp_path: Path) -> None:
    text = "Once upon a time there was a bot.\n\n" * 300
    (tmp_path / "story.txt").write_text(text)
    (tmp_path / "story.jsonl").write_text(json.dumps({"text": text}))
    one, two = (evaluate_bot(bot, str(tmp_path / name), ["loss"], model=CPU, window=64) for name in ("story.txt", "story.jsonl"))
    assert one.metrics["loss"] == pytest.approx(two.metrics["loss"], rel=1e-5)
    assert (one.rows > 1, two.rows) == (True, 1)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    "Two bots without a chat template."
    home = tmp_path_factory.mktemp("bases")
    for seed in (5, 6):
        loaded = load_bot(make_bot(home, f"chat-{seed}", seed=seed), device="cpu")
        loaded.tokenizer.chat_template = None
        save_bot(home / f"base-{seed}", loaded.model, loaded.tokenizer)
    return [str(home / f"base-{seed}") for seed in (5, 6)]


def test_a_base_without_a_template(bases: list[str], tmp_path: Path) -> None:
    "It continues the layout, as `generate` does, and its surprise is transformers' own loss; without a layout it is refused."
    rows, limit = [{"prompt": f"What is {n} + 30?", "completion": f"It is {n + 30}."} for n in (12, 5, 7)], 9
    data = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(BotError, match="no chat template.*layout"):
        evaluate_bot(bases[0], data, model=CPU)
    report = evaluate_bot(bases[0], data, ["token_f1", "loss"], model=CPU, layout="Q: {prompt}\nA:", max_new_tokens=limit)
    loaded, nll, tokens = load_bot(bases[0], device="cpu"), 0.0, 0
    for row, seen in zip((12, 5, 7), report.examples, strict=True):
        prompt = loaded.tokenizer(f"Q: What is {row} + 30?\nA:", return_tensors="pt").input_ids
        out = loaded.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit, do_sample=False)[0]
        assert seen.answer == loaded.chat.decode(out[prompt.shape[1] :].tolist())
        whole = loaded.tokenizer(f"Q: What is {row} + 30?\nA:It is {row + 30}.").input_ids
        whole = torch.tensor([[*whole, loaded.tokenizer.eos_token_id]])
        labels = whole.clone()
        labels[:, : prompt.shape[1]] = -100
        count = int((labels != -100).sum())
        with torch.no_grad():
            nll, tokens = nll + float(loaded.model(whole, labels=labels).loss) * count, tokens + count
    assert report.metrics["loss"] == pytest.approx(nll / tokens, rel=1e-4)
    assert report.settings["layout"] == "Q: {prompt}\nA:"
    stop = report.examples[0].answer[2:4]
    cut = evaluate_bot(bases[0], data, ["token_f1"], model=CPU, layout="{prompt}", max_new_tokens=limit, stop=stop)
    assert stop not in "".join(e.answer for e in cut.examples)


def test_bases_are_compared(bases: list[str], bot: str, tmp_path: Path) -> None:
    "By what they say to completions, with a bot that has a template too; and by their surprise at texts, row by row."
    rows = write(tmp_path / "rows.jsonl", [{"prompt": f"What is {n} + 30?", "completion": f"It is {n + 30}."} for n in range(6)])
    found = compare_bots(bases[0], bot, rows, ["chrf"], model=CPU, layout="{prompt}\n", max_new_tokens=8, resamples=30)
    assert (found.rows, found.left_out) == (6, 0)
    assert found.settings["layout"] == {"first": "{prompt}\n", "second": None}  # the one that has a template is asked by it
    texts = write(tmp_path / "texts.jsonl", [{"text": f"Once upon a time there were {n} bots. " * (n + 1)} for n in range(6)])
    found = compare_bots(*bases, texts, ["loss", "bits_per_byte"], model=CPU, resamples=200)
    one, two = (evaluate_bot(base, texts, ["loss", "bits_per_byte"], model=CPU).metrics for base in bases)
    for name, difference in found.differences.items():
        assert (difference.first, difference.second) == pytest.approx((one[name], two[name]), rel=1e-5)
    assert found.wins + found.losses == 6
    same = compare_bots(bases[0], bases[0], texts, ["loss"], model=CPU, resamples=20)
    assert (same.differences["loss"].value, same.differences["loss"].p_value, same.ties) == (0.0, 1.0, 6)


def test_refusals(bot: str, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", TALKS)
    with pytest.raises(ConfigError, match="Did you mean 'exact_match'"):
        evaluate_bot(bot, data, ["exact_mach"])
    with pytest.raises(ConfigError, match="no metric"):
        evaluate_bot(bot, data, [])
    with pytest.raises(ConfigError, match="use backend 'torch'"):
        evaluate_bot(bot, data, ["perplexity"], backend="other")
    with pytest.raises(DataError):
        evaluate_bot(bot, str(tmp_path / "absent.jsonl"))
    with pytest.raises(DataError, match="empty"):
        evaluate_bot(bot, write(tmp_path / "empty.jsonl", []))
    with pytest.raises(BotError, match="No bot at"):
        evaluate_bot(str(tmp_path / "no-bot"), data)
    assert Config().model.device == "auto"


def test_corpus_metric_of_ones_own(bot: str, tmp_path: Path) -> None:
    @corpus_metric("distinct_answers")
    def distinct(answers: Any, references: Any) -> float:
        "How many different answers there are."
        return float(len(set(answers)))

    report = evaluate_bot(bot, write(tmp_path / "rows.jsonl", [*TALKS, *TALKS]), ["distinct_answers"], model=CPU)
    assert 1 <= report.metrics["distinct_answers"] <= len(TALKS)
    assert get_metric("distinct_answers").description == "How many different answers there are."


@given(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9))
def test_an_axis_has_room_for_what_is_drawn(one: float, two: float) -> None:
    low, high = min(one, two), max(one, two)
    first, last, step = round_ends(low, high)
    slack = 1e-6 * step
    assert first <= low + slack
    assert last >= high - slack
    assert 1 <= round((last - first) / step) <= 9


few_words = st.lists(st.sampled_from(["cat", "sat", "mat", "42"]), max_size=6)


@given(few_words, few_words)
def test_token_f1_by_brute_force(said: list[str], wanted: list[str]) -> None:
    left, common = list(wanted), 0
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    if not said or not wanted:
        expected = float(said == wanted)
    elif not common:
        expected = 0.0
    else:
        precision, recall = common / len(said), common / len(wanted)
        expected = 2 * precision * recall / (precision + recall)
    assert token_f1(" ".join(said), "the " + " ".join(wanted) + "!") == pytest.approx(expected)


def test_real_rows(shared: Path) -> None:
    "GSM8K on stories260K without a template is refused; its text can be measured, and bits per byte is the same in any batch."
    bot, data = str(shared / "models" / "stories260K"), str(shared / "data" / "sft" / "gsm8k-train.jsonl")
    with pytest.raises(BotError, match="no chat template"):
        evaluate_bot(bot, data, max_rows=5)
    text = str(shared / "data" / "text" / "genesis-web.txt")
    figures = [evaluate_bot(bot, text, ["bits_per_byte"], model=CPU, max_rows=1, batch_size=b).metrics["bits_per_byte"] for b in (1, 8)]
    assert figures[0] == pytest.approx(figures[1], rel=1e-4)
    assert 1 < figures[0] < 8


def test_the_mark_before_a_text_is_no_text(shared: Path, tmp_path: Path) -> None:
    "SentencePiece puts a ▁ before the first word, which follows the begin token and is predicted: it stands for no byte."
    bot, text = str(shared / "models" / "stories260K"), "Once upon a time"
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    report = evaluate_bot(bot, str(tmp_path / "text.jsonl"), ["loss", "bits_per_byte"], model=CPU)
    ids = load_bot(bot, device="cpu").tokenizer(text).input_ids  # its begin token first; the end token is predicted too
    assert report.metrics["bits_per_byte"] == pytest.approx(report.metrics["loss"] * len(ids) / math.log(2) / len(text), rel=1e-6)
