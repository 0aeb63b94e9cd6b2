"""Metrics and intervals against the libraries that the field quotes, scipy, and brute force."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import bootstrap

import llmbot.monitoring.generation_metrics  # noqa: F401  # registers its metrics
from llmbot.core.errors import ConfigError
from llmbot.monitoring.bootstrap import figure_difference, interval, paired_difference, percentiles
from llmbot.monitoring.text_metrics import get_metric, text_metrics

WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "a", "mat", "42", "It's", "naïve", "!"]), max_size=12).map(" ".join)
PAIRS = st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=6)


@settings(max_examples=30, deadline=None)
@given(PAIRS)
def test_bleu_and_chrf_are_those_of_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    said, wanted = [a for a, _ in pairs], [r for _, r in pairs]
    assert get_metric("bleu").corpus(said, wanted) == pytest.approx(sacrebleu.corpus_bleu(said, [wanted]).score)
    assert get_metric("chrf").corpus(said, wanted) == pytest.approx(sacrebleu.corpus_chrf(said, [wanted]).score)


@settings(max_examples=30, deadline=None)
@given(PAIRS)
def test_rouge_is_that_of_rouge_score(pairs: list[tuple[str, str]]) -> None:
    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds)
    for kind in kinds:
        expected = np.mean([scorer.score(reference, answer)[kind].fmeasure for answer, reference in pairs])
        assert get_metric(kind).corpus([a for a, _ in pairs], [r for _, r in pairs]) == pytest.approx(expected)


def test_signatures_say_how() -> None:
    for name, scorer in (("bleu", sacrebleu.BLEU()), ("chrf", sacrebleu.CHRF())):
        scorer.corpus_score(["a"], [["a"]])
        signature = get_metric(name).signature
        assert signature is not None
        assert signature() == str(scorer.get_signature())


def test_a_function_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "def longer(answer, reference):\n    'Longer.'\n    return float(len(answer) > len(reference))\nx = 3\n"
    (tmp_path / "own_metrics.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    metric = get_metric("own_metrics:longer")
    assert (metric.description, metric.corpus(["ab", "a"], ["a", "a"])) == ("Longer.", 0.5)
    for name, reason in (("own_metrics:absent", "absent"), ("absent_module:f", "absent_module"), ("own_metrics:x", "no function")):
        with pytest.raises(ConfigError, match=reason):
            get_metric(name)
    assert {"bleu", "chrf", "rouge1", "rouge2", "rougeL", "exact_match", "token_f1", "distinct1", "distinct2", "answer_words",
            "refusals"} <= set(text_metrics())


def test_a_decorated_function_by_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "A terminal names the module, and the metric takes what its decorator says: all rows at once, not the letters of one."
    code = ("from llmbot.monitoring.text_metrics import corpus_metric, row_metric\n\n"
            "@corpus_metric('openings', resampled=False)\ndef openings(answers, references):\n    'Different first words.'\n"
            "    return len({answer.split()[0] for answer in answers}) / len(answers)\n\n"
            "@row_metric('loud')\ndef loud(answer, reference):\n    'Capitals alone.'\n    return float(answer.isupper())\n")  # fmt: skip
    (tmp_path / "decorated_metrics.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    openings, loud = get_metric("decorated_metrics:openings"), get_metric("decorated_metrics:loud")
    assert (openings.name, openings.row, openings.resampled) == ("decorated_metrics:openings", None, False)
    assert openings.corpus(["It is", "It was", "No", "It"], ["", "", "", ""]) == 0.5
    assert get_metric("openings").corpus(["a b", "a"], ["", ""]) == 0.5
    assert (loud.row is not None, loud.corpus(["A", "b"], ["", ""]), loud.description) == (True, 0.5, "Capitals alone.")


def test_interval_is_that_of_scipy() -> None:
    rng = np.random.default_rng(0)
    said = [" ".join(rng.choice(["a1", "b2", "c3", "d4"], 5)) for _ in range(60)]
    wanted = [" ".join(rng.choice(["a1", "b2", "c3", "d4"], 5)) for _ in range(60)]
    metric = get_metric("token_f1")
    assert metric.row is not None
    scores = [metric.row(a, r) for a, r in zip(said, wanted, strict=True)]
    theirs = bootstrap((scores,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    ours = interval(metric, said, wanted, resamples=5000)
    width = theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.06 * width)
    assert interval(metric, said, wanted) == interval(metric, said, wanted)  # seeded
    assert interval(metric, said, wanted, seed=1) != interval(metric, said, wanted)


def test_interval_is_that_of_all_resamples() -> None:
    "Three rows have 27 resamples, each as likely: their quantiles are what drawn ones come to."
    metric, said, wanted = get_metric("exact_match"), ["a", "b", "c"], ["a", "b", "x"]
    every = [np.mean([said[i] == wanted[i] for i in rows]) for rows in itertools.product(range(3), repeat=3)]
    for confidence in (0.8, 0.9, 0.95):
        ours = interval(metric, said, wanted, resamples=4000, confidence=confidence)
        exact = np.quantile(every, [(1 - confidence) / 2, (1 + confidence) / 2], method="inverted_cdf")
        assert (ours.low, ours.high) == pytest.approx(tuple(exact), abs=1e-9)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(0.01, 0.99))
def test_percentiles_are_those_of_numpy(values: list[float], confidence: float) -> None:
    found = percentiles(values, confidence)
    exact = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    assert (found.low, found.high) == pytest.approx(tuple(exact), rel=1e-6, abs=1e-6)


def test_paired_difference_is_that_of_scipy() -> None:
    rng = np.random.default_rng(3)
    first, second = (rng.random(80) < 0.5).tolist(), (rng.random(80) < 0.62).tolist()
    one, two = (["y" if x else "n" for x in side] for side in (first, second))
    found = paired_difference(get_metric("exact_match"), one, two, ["y"] * 80, resamples=5000)
    moved = np.asarray(second, float) - np.asarray(first, float)
    theirs = bootstrap((moved,), np.mean, n_resamples=20_000, method="percentile", rng=1)
    assert found.value == pytest.approx(moved.mean())
    interval_ = theirs.confidence_interval
    assert (found.interval.low, found.interval.high) == pytest.approx((interval_.low, interval_.high), abs=0.02)
    draws = theirs.bootstrap_distribution
    assert found.p_value == pytest.approx(2 * min((draws <= 0).mean(), (draws >= 0).mean()), abs=0.03)


@given(st.lists(st.floats(-1e6, 1e6) | st.sampled_from([math.inf, -math.inf, math.nan]), min_size=1, max_size=12))
def test_percentiles_with_infinities(values: list[float]) -> None:
    "As numpy has it where it interpolates nothing, and never NaN but for a NaN or between both infinities."
    found = percentiles(values, 0.5)
    if any(map(math.isnan, values)):
        assert not found.known
        return
    below, above = (np.quantile(values, [0.25, 0.75], method=how) for how in ("lower", "higher"))
    for end, low, high in zip((found.low, found.high), below, above, strict=True):
        assert low - 1e-6 <= end <= high + 1e-6 or (math.isnan(end) and (low, high) == (-math.inf, math.inf))


@pytest.mark.parametrize(("first", "second", "rows"), [(math.nan, 1.0, 9), (math.inf, math.inf, 9), (0.0, 1.0, 1)])
def test_what_is_no_number_is_not_significant(first: float, second: float, rows: int) -> None:
    found = figure_difference(lambda drawn: first, lambda drawn: second, rows)
    assert math.isnan(found.p_value)
    assert not found.interval.known
    certain = figure_difference(lambda drawn: 0.0, lambda drawn: math.inf, 9)
    assert certain.interval.low == math.inf
    assert math.isnan(certain.p_value)  # the same in every resample
