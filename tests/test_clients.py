"""Clients that others wrote, unchanged, against a live server: LangChain, LiteLLM, the `llm` command and lm-eval.

They live in an environment of their own (`make clients`), since they pin what we pin otherwise; here they are asked as a user
would ask them, in processes of their own.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny_bots import make_bot

from llmbot import ask
from llmbot.core.config import Config, ModelConfig, ServingConfig
from llmbot.serving.api_server import running_server

CLIENTS = Path(__file__).parents[1] / ".venv-clients" / "bin"
TOKEN = "a-token-for-the-clients"

pytestmark = pytest.mark.skipif(not (CLIENTS / "lm_eval").exists(), reason="the clients are not installed: make clients")


@pytest.fixture(scope="module")
def bot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bot(tmp_path_factory.mktemp("bots"), "tiny")


@pytest.fixture(scope="module")
def url(bot: Path) -> Iterator[str]:
    serving = ServingConfig(models=[str(bot)], port=0, token=TOKEN, max_new_tokens=12, temperature=0)  # type: ignore[arg-type]
    with running_server(Config(model=ModelConfig(device="cpu"), serving=serving)) as url:
        yield url


def run(url: str, home: Path, *command: str, script: str | None = None) -> str:
    "What a client printed. Fails with what it said on stderr."
    keys = {"OPENAI_API_KEY": TOKEN, "OPENAI_BASE_URL": f"{url}/v1", "HF_HUB_OFFLINE": "1", "LLM_USER_PATH": str(home), "HOME": str(home)}
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | keys
    given = [str(CLIENTS / command[0]), *command[1:]]
    done = subprocess.run(given, input=script, capture_output=True, text=True, env=env, cwd=home, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_langchain(url: str, bot: Path, tmp_path: Path) -> None:
    said = run(url, tmp_path, "python", "-", script=f'''
import json
from langchain_openai import ChatOpenAI
chat = ChatOpenAI(model="tiny", base_url="{url}/v1", api_key="{TOKEN}", temperature=0, max_tokens=12)
whole = chat.invoke("What is 12 + 30?")
pieces = [chunk.content for chunk in chat.stream("What is 12 + 30?")]
print(json.dumps([whole.content, "".join(pieces), whole.usage_metadata["output_tokens"], len(pieces)]))
''')
    whole, streamed, tokens, pieces = json.loads(said.splitlines()[-1])
    assert whole == streamed == answer(bot, "What is 12 + 30?")
    assert 0 < tokens <= 12
    assert pieces > 2


def test_langchain_embeddings(url: str, bot: Path, tmp_path: Path) -> None:
    "LangChain sends texts as they are where it is told not to cut them by OpenAI's own tokenizer."
    import torch

    from llmbot.core.model_manager import load_bot

    texts = ["What is 12 + 30?", "Once upon a time"]
    said = run(url, tmp_path, "python", "-", script=f'''
import json
from langchain_openai import OpenAIEmbeddings
maker = OpenAIEmbeddings(model="tiny", base_url="{url}/v1", api_key="{TOKEN}", check_embedding_ctx_length=False)
print(json.dumps([maker.embed_documents({texts!r}), maker.embed_query({texts[1]!r})]))
''')
    documents, query = json.loads(said.splitlines()[-1])
    loaded = load_bot(bot)
    with torch.inference_mode():
        states = [loaded.model.model(torch.tensor([loaded.tokenizer(text).input_ids])).last_hidden_state[0] for text in texts]  # type: ignore[operator]
    for vector, state in zip([*documents, query], [*states, states[1]], strict=True):
        assert vector == pytest.approx(state.mean(0).tolist(), rel=1e-4, abs=1e-5)


def test_langchain_tools(url: str, tmp_path: Path) -> None:
    "A bot of random weights that must call, asked through `bind_tools`: whole, streamed, and its result sent back."
    said = run(url, tmp_path, "python", "-", script=f'''
import json
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

@tool
def weather(day: int, sunny: bool) -> str:
    "Tells the weather."
    return f"{{day}} {{sunny}}"

chat = ChatOpenAI(model="tiny", base_url="{url}/v1", api_key="{TOKEN}", temperature=0, max_tokens=100)
bound = chat.bind_tools([weather], tool_choice="weather", strict=True)
whole = bound.invoke("Hello")
streamed = None
for chunk in bound.stream("Hello"):
    streamed = chunk if streamed is None else streamed + chunk
call = whole.tool_calls[0]
talk = [HumanMessage("Hello"), whole, weather.invoke(call)]
answer = chat.bind_tools([weather]).invoke(talk)
free = chat.bind_tools([weather], parallel_tool_calls=False).invoke("Hello")
print(json.dumps([[c["name"], c["args"]] for c in (call, streamed.tool_calls[0])] + [isinstance(talk[2], ToolMessage),
      talk[2].content, answer.usage_metadata["input_tokens"] - free.usage_metadata["input_tokens"], whole.content]))
''')
    whole, streamed, is_result, result, longer, content = json.loads(said.splitlines()[-1])
    assert whole == streamed
    name, arguments = whole
    assert (name, set(arguments)) == ("weather", {"day", "sunny"})
    assert [type(arguments[key]) for key in ("day", "sunny")] == [int, bool]
    assert is_result
    assert result == f"{arguments['day']} {arguments['sunny']}"
    assert longer > 0  # the call and its result are in the prompt
    assert content == ""


def test_litellm(url: str, bot: Path, tmp_path: Path) -> None:
    said = run(url, tmp_path, "python", "-", script=f'''
import json, litellm
asked = dict(model="openai/tiny", api_base="{url}/v1", api_key="{TOKEN}", temperature=0, max_tokens=12,
             messages=[{{"role": "user", "content": "What is 12 + 30?"}}])
whole = litellm.completion(**asked)
pieces = [c.choices[0].delta.content or "" for c in litellm.completion(**asked, stream=True)]
try:
    litellm.completion(**asked | {{"model": "openai/nobody"}})
except litellm.NotFoundError as error:
    missing = str(error)
print(json.dumps([whole.choices[0].message.content, "".join(pieces), missing]))
''')
    whole, streamed, missing = json.loads(said.splitlines()[-1])
    assert whole == streamed == answer(bot, "What is 12 + 30?")
    assert "there is no model 'nobody'" in missing


def test_llm_command(url: str, bot: Path, tmp_path: Path) -> None:
    models = f'- model_id: tiny\n  model_name: tiny\n  api_base: "{url}/v1"\n  api_key_name: llmbot\n'
    (tmp_path / "extra-openai-models.yaml").write_text(models)
    (tmp_path / "keys.json").write_text(json.dumps({"llmbot": TOKEN}))
    said = run(url, tmp_path, "llm", "-m", "tiny", "-o", "temperature", "0", "-o", "max_tokens", "12", "What is 12 + 30?")
    assert said.strip("\n") == answer(bot, "What is 12 + 30?").strip("\n")


def test_lm_eval_scores_as_the_model_does(url: str, bot: Path, tmp_path: Path) -> None:
    "Log-likelihoods that lm-eval reads from `/v1/completions` with echo and logprobs, and those of the model itself."
    import torch

    from llmbot.core.model_manager import load_bot

    pairs = [("What is 12 + 30?", " It is 42."), ("Once upon a time", " there was a bot.")]
    said = run(url, tmp_path, "python", "-", script=f'''
import json
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI
model = LocalCompletionsAPI(base_url="{url}/v1/completions", model="tiny", tokenizer="{bot}", tokenizer_backend="huggingface",
                            tokenized_requests=True, num_concurrent=2, max_length=256)
pairs = {pairs!r}
asked = [Instance("loglikelihood", {{}}, pair, i) for i, pair in enumerate(pairs)]
print(json.dumps([list(r) for r in model.loglikelihood(asked)]))
''')
    loaded = load_bot(bot)
    for (context, continuation), (logprob, greedy) in zip(pairs, json.loads(said.splitlines()[-1]), strict=True):
        ids = loaded.tokenizer(context + continuation).input_ids
        start = len(loaded.tokenizer(context).input_ids)
        with torch.inference_mode():
            scores = loaded.model(torch.tensor([ids])).logits[0, start - 1 : -1].float().log_softmax(-1)
        expected = scores.gather(1, torch.tensor(ids[start:])[:, None]).sum().item()
        assert logprob == pytest.approx(expected, abs=1e-3)
        assert greedy == (scores.argmax(-1).tolist() == ids[start:])


def answer(bot: Path, question: str) -> str:
    from llmbot.serving.sampling_params import SamplingParams

    return ask(bot, question, SamplingParams(max_new_tokens=12, temperature=0, top_p=1))
