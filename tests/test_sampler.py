"A batch of requests with any parameters gets, row by row, the tokens that transformers' processors give each alone."

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_bots import make_bot
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llmbot.core.model_manager import load_bot
from llmbot.serving.sampler import BatchSampler
from llmbot.serving.sampling_params import SamplingParams
from llmbot.serving.sampling_rules import keep_top_p

VOCAB = 64
TABLE = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * 3  # logits after each token

biases = st.lists(
    st.tuples(st.integers(0, VOCAB - 1), st.sampled_from([-100.0, -2.0, 3.0])), max_size=4, unique_by=lambda bias: bias[0]
)
parameters = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 5, 40, VOCAB, 1000]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.6, -0.4]),
    logit_bias=biases.map(tuple),
    seed=st.integers(0, 2**40),
    logprobs=st.sampled_from([None, 0, 3]),
)
requests = st.lists(st.tuples(parameters, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6)), min_size=1, max_size=5)


def by_transformers(params: SamplingParams, prompt: list[int], steps: int) -> tuple[list[int], list[float]]:
    "Tokens and the model's log-probabilities of one request alone; OpenAI's penalties by their formula."
    process, answer, told = LogitsProcessorList(), [], []
    if params.logit_bias:
        process.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias]))
    if params.repetition_penalty != 1:
        process.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    filters = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)] if params.temperature not in (0, 1) else [])
    filters += [TopKLogitsWarper(params.top_k)] if params.top_k else []
    filters += [TopPLogitsWarper(params.top_p)] if params.top_p < 1 else []
    filters += [MinPLogitsWarper(params.min_p)] if params.min_p else []
    generator = torch.Generator().manual_seed(params.seed or 0)
    for _ in range(steps):
        ids = torch.tensor([prompt + answer])
        logits = TABLE[ids[0, -1]][None].clone()
        scores = process(ids, logits.clone())
        for token in set(answer):
            scores[0, token] -= params.frequency_penalty * answer.count(token)
            scores[0, token] -= params.presence_penalty
        if params.greedy:
            token = int(scores.argmax())
        else:
            token = int(torch.multinomial(filters(ids, scores).softmax(-1), 1, generator=generator))
        answer.append(token)
        told.append(float(logits[0].double().log_softmax(-1)[token]))
    return answer, told


@settings(max_examples=150, deadline=None)
@given(requests, st.randoms(use_true_random=False))
def test_each_row_is_as_if_alone(asked, random) -> None:
    "Rows join at any step and stand in any order."
    sampler, steps = BatchSampler(VOCAB, "cpu"), 8
    starts = {f"r{i}": random.randrange(3) for i in range(len(asked))}
    answers: dict[str, list[int]] = {key: [] for key in starts}
    told: dict[str, list[float]] = {key: [] for key in starts}
    for step in range(steps + 3):
        for i, (key, start) in enumerate(starts.items()):
            if start == step:
                sampler.add(key, *asked[i])
        keys = [k for k in starts if starts[k] <= step and len(answers[k]) < steps]
        random.shuffle(keys)
        if not keys:
            continue
        last = [(answers[k] or asked[int(k[1:])][1])[-1] for k in keys]
        for key, drawn in zip(keys, sampler.sample(TABLE[last], keys), strict=True):
            assert drawn.error is None
            answers[key].append(drawn.token_id)
            wanted = asked[int(key[1:])][0].logprobs
            assert (drawn.logprob is None) == (wanted is None)
            if drawn.logprob is not None:
                assert drawn.logprob.token_id == drawn.token_id
                assert len(drawn.logprob.top) == wanted
                told[key].append(drawn.logprob.logprob)
            if len(answers[key]) == steps:
                sampler.remove(key)
    for i, (params, prompt) in enumerate(asked):
        tokens, likely = by_transformers(params, prompt, steps)
        assert answers[f"r{i}"] == tokens
        assert told[f"r{i}"] == pytest.approx(likely if params.logprobs is not None else [], abs=1e-5)


def test_a_large_vocabulary_is_filtered_as_a_small_one() -> None:
    "Wide rows take other paths through torch than narrow ones."
    generator = torch.Generator().manual_seed(5)
    for width, spread in ((40_000, 1.0), (40_000, 6.0), (151_936, 3.0)):
        scores = torch.randn(4, width, generator=generator) * spread
        p = torch.tensor([0.1, 0.5, 0.95, 0.9999], dtype=torch.float64)
        ours = keep_top_p(scores, p[:, None])
        for row, value in enumerate(p.tolist()):
            assert torch.equal(ours[row], TopPLogitsWarper(value)(None, scores[row : row + 1])[0])


def test_the_sampled_tokens_are_those_of_generate(tmp_path) -> None:
    "The whole of transformers, with a model, against the sampler in a loop."
    bot = load_bot(make_bot(tmp_path, "tiny"), device="cpu")
    prompt = bot.tokenizer("Once upon").input_ids
    torch.manual_seed(11)
    tokens = torch.tensor([prompt])
    kwargs = {"temperature": 1.2, "top_k": 60, "top_p": 0.93, "min_p": 0.001, "repetition_penalty": 1.1}
    expected = bot.model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=True, max_new_tokens=24, **kwargs)[0].tolist()
    sampler, ids = BatchSampler(bot.config.vocab_size, "cpu"), list(prompt)
    sampler.add("r", SamplingParams(seed=11, **kwargs), prompt)
    sampler.add("noise", SamplingParams(temperature=2.0, top_p=1.0, presence_penalty=1.0), [1])
    while len(ids) < len(expected):
        with torch.inference_mode():
            logits = bot.model(torch.tensor([ids]), logits_to_keep=1).logits[:, -1]
        ids.append(sampler.sample(torch.cat([logits, logits]), ["noise", "r"])[1].token_id)
    assert ids == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_broken_rows(dtype) -> None:
    "Only the row that is broken has an error, in every kind of batch."
    logits = TABLE[:6].to(dtype)
    logits[1, 3], logits[4, 0] = float("nan"), float("inf")
    penalised = SamplingParams(temperature=0, frequency_penalty=1.0, logprobs=2)
    for kind in (SamplingParams(temperature=0), SamplingParams(temperature=1.0, seed=1), penalised):
        sampler, keys = BatchSampler(VOCAB, "cpu"), [str(i) for i in range(6)]
        for key in keys:
            sampler.add(key, kind, [1, 2])
        for _ in range(3):
            drawn = sampler.sample(logits, keys)
            assert [d.error is not None for d in drawn] == [False, True, False, False, True, False]
            assert all((d.token_id < 0) == (d.error is not None) for d in drawn)
