"""From raw data to a chatbot that you trained, own and serve.

The names below are the whole way in one place; each is imported when it is first used, so `import llmbot` stays instant.
"""

from importlib import import_module
from logging import getLogger
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where bitsandbytes or torchao is installed, importing PEFT says which optional kernels are missing and what PyTorch is going to
# deprecate, and int8 says for every layer that it computes in fp16. None of it is news to act on.
_KNOWN = {
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    "bitsandbytes.autograd._functions": "MatMul8bitLt: inputs will be cast",
    "torchao": "Failed to load ",
    "torch.utils._pytree": "is an Enum subclass and is now natively supported",
}
for _name, _text in _KNOWN.items():
    getLogger(_name).addFilter(lambda record, text=_text: text not in record.getMessage())  # type: ignore[misc]

_WHERE = {
    "Config": "llmbot.core.config",
    "load_config": "llmbot.core.config_io",
    "load_bot": "llmbot.core.model_manager",
    "plan": "llmbot.training.plan",
    "lr_find": "llmbot.training.lr_find",
    "show_batch": "llmbot.training.show",
    "show_results": "llmbot.training.show",
    "train": "llmbot.training.trainer",
    "evaluate_bot": "llmbot.evaluation.evaluate",
    "ask": "llmbot.serving.decoding",
    "ChatSession": "llmbot.app.chat_repl",
    "serve": "llmbot.serving.api_server",
    "LLMBotError": "llmbot.core.errors",
}
__all__ = [
    "ChatSession",
    "Config",
    "LLMBotError",
    "ask",
    "evaluate_bot",
    "load_bot",
    "load_config",
    "lr_find",
    "plan",
    "serve",
    "show_batch",
    "show_results",
    "train",
]

if TYPE_CHECKING:
    from llmbot.app.chat_repl import ChatSession
    from llmbot.core.config import Config
    from llmbot.core.config_io import load_config
    from llmbot.core.errors import LLMBotError
    from llmbot.core.model_manager import load_bot
    from llmbot.evaluation.evaluate import evaluate_bot
    from llmbot.serving.api_server import serve
    from llmbot.serving.decoding import ask
    from llmbot.training.lr_find import lr_find
    from llmbot.training.plan import plan
    from llmbot.training.show import show_batch, show_results
    from llmbot.training.trainer import train


def __getattr__(name: str) -> Any:
    "Import a public name when it is first used."
    if name not in _WHERE:
        raise AttributeError(f"module 'llmbot' has no attribute '{name}'")
    return getattr(import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    "The public names, for completion."
    return sorted([*__all__, "__version__"])
