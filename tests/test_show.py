"""What a person is shown of a batch is what the trainer gets, and a suggested learning rate is better than others."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import recipes
from recipes import on, talk, train, write
from rich.console import Console

from llmbot.core.config import Config
from llmbot.core.errors import ConfigError, LLMBotError
from llmbot.core.packing import IGNORED
from llmbot.training.lr_find import aside, lr_find
from llmbot.training.show import show_batch, show_results


def recipe(tmp: Path, **changes: object) -> Config:
    rows = [
        talk(f"<{a}> + {b}?", f"<b>{a + b}</b> \x1b[31mred{'!' * b}")
        for a in range(12)
        for b in range(8)
    ]  # fmt: skip
    changes = {"data.max_seq_length": 96, "training.per_device_batch_size": 4} | changes
    return recipes.recipe(tmp, write(tmp / "sums.jsonl", rows), **changes)


class Pieces(HTMLParser):
    "Reads the pieces of each row back out of the HTML."

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[tuple[str, int, bool, str]]] = []  # state, tokens, whether a document begins, text
        self.border = self.inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert tag in ("style", "div", "p", "b", "pre", "mark", "span"), f"the data made a <{tag}> element"
        if tag == "pre":
            self.rows.append([])
        elif found.get("class") == "border":
            self.border = True
        elif "data-tokens" in found:
            self.rows[-1].append((str(found["class"]), int(found["data-tokens"] or 0), self.border, ""))
            self.border, self.inside = False, True

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag not in ("mark", "span")

    def handle_data(self, data: str) -> None:
        if self.inside:
            state, tokens, border, text = self.rows[-1][-1]
            self.rows[-1][-1] = (state, tokens, border, text + data)


def first_batch(cfg: Config) -> tuple[dict[str, Any], Any]:
    with aside(cfg) as (run, trainer):
        return next(iter(trainer.get_train_dataloader())), run.tokenizer


@pytest.mark.parametrize("packing", [True, False])
def test_the_masks_that_are_shown_are_the_labels(tmp_path: Path, packing: bool) -> None:
    cfg = recipe(tmp_path, **{"training.packing": packing})
    batch, tokenizer = first_batch(cfg)
    rows = Pieces(show_batch(cfg, n=4)._repr_html_()).rows
    assert len(rows) == 4
    for i, row in enumerate(rows):
        states = [state for state, tokens, _, _ in row for _ in range(tokens)]
        assert [state == "learned" for state in states] == [label != IGNORED for label in batch["labels"][i].tolist()]
        real = sum(state != "padding" for state in states)
        assert "".join(text for state, _, _, text in row if state != "padding") == tokenizer.decode(batch["input_ids"][i, :real])
        if packing:  # a border for each document that begins, and none inside of one
            starts = [at for at, position in enumerate(batch["position_ids"][i, :real].tolist()) if position == 0]
            places = [sum(tokens for _, tokens, _, _ in row[:at]) for at, (_, _, border, _) in enumerate(row) if border]
            assert places == (starts if len(starts) > 1 else [])
        else:
            assert real == batch.get("attention_mask", batch["labels"] * 0 + 1)[i].sum()


def test_control_characters_of_the_data_do_not_reach_the_terminal(tmp_path: Path) -> None:
    console = Console(width=100, record=True, force_terminal=False, file=(tmp_path / "out.txt").open("w"))
    console.print(show_batch(recipe(tmp_path), n=2))
    text = console.export_text()
    assert "red" in text
    assert "\x1b" not in text


def test_nothing_stays_of_a_look(tmp_path: Path) -> None:
    show_batch(recipe(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "sums.jsonl"]


def test_pairs_show_both_answers(tmp_path: Path) -> None:
    pairs = [{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no, never {i}"} for i in range(30)]
    write(tmp_path / "pairs.jsonl", pairs)
    cfg = recipe(tmp_path, **{"training.method": "dpo", "data.train": f"[{tmp_path}/pairs.jsonl]"})
    view = show_batch(cfg, n=2)
    assert [row.title for row in view.rows] == ["pair 1, chosen", "pair 1, rejected", "pair 2, chosen", "pair 2, rejected"]
    learned = ["".join(piece.text for piece in row.pieces if piece.state == "learned") for row in view.rows]
    assert [text.split()[0] for text in learned] == ["yes", "no,", "yes", "no,"]


def test_results_stand_beside_those_of_the_parent(tmp_path: Path) -> None:
    base = recipe(tmp_path, **{"training.max_steps": 2})
    train(base)
    child = recipe(tmp_path, **{"training.max_steps": 2, "training.output_dir": tmp_path / "child", "training.learning_rate": 0.01},
                   **on(tmp_path / "bot"))
    found = show_results(train(child), tmp_path / "sums.jsonl", n=3, max_new_tokens=6, device="cpu")
    alone = show_results(tmp_path / "bot", tmp_path / "sums.jsonl", n=3, max_new_tokens=6, device="cpu")
    assert (found.bot, found.parent, alone.parent) == ("child", "bot", None)
    assert [r.before for r in found.results] == [r.answer for r in alone.results]
    assert [r.prompt for r in found.results] == ["<0> + 0?", "<4> + 0?", "<8> + 0?"]
    assert "&lt;b&gt;" in found._repr_html_()
    assert "<b>0" not in found._repr_html_()


def test_the_suggested_rate_trains_better_than_others(tmp_path: Path) -> None:
    "Thirty times less learns too little in the same number of steps, thirty times more breaks."
    base = {"training.packing": False, "training.per_device_batch_size": 16, "training.max_steps": 60, "training.logging_steps": 1,
            "training.warmup_steps": 0.1, "data.validation_split": 0.2, "data.max_seq_length": 64}  # fmt: skip
    found = lr_find(recipe(tmp_path, **base), start=1e-5, end=3.0, steps=60)
    losses = {}
    for factor in (1 / 30, 1, 30):
        changes = base | {"training.learning_rate": found.suggestion * factor, "training.output_dir": tmp_path / f"bot{factor}",
                          "training.stop_on_divergence": False}  # fmt: skip
        losses[factor] = train(recipe(tmp_path, **changes)).metrics["validation_loss"]
    assert losses[1] < losses[1 / 30]
    assert not losses[1] > losses[30]  # the largest rate may also end in no number


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda cfg: lr_find(cfg, steps=3), "at least 10 steps"),
        (lambda cfg: show_batch(cfg, 0), "at least one row"),
        (lambda cfg: show_results("no-such-bot", cfg.data.train), "No bot at 'no-such-bot'"),
    ],
)
def test_mistakes(tmp_path: Path, action: Any, message: str) -> None:
    with pytest.raises(LLMBotError, match=message):
        action(recipe(tmp_path))


def test_methods_without_comparable_losses_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmbot.training.methods import get_method

    cfg = recipe(tmp_path)
    monkeypatch.setattr(get_method("sft"), "data_kind", "prompt", raising=False)
    with pytest.raises(ConfigError, match="lr_find cannot try the method"):
        lr_find(cfg)
