"""What the process loads that forks the runs of `test_never_lost.py`, before it forks the first."""

import gc
import sys
from importlib import import_module

from llmbot.app.console import Later

sys.meta_path.insert(0, Later())  # as in a command
for name in (
    "trl.trainer.grpo_trainer", "trl.trainer.kto_trainer", "llmbot.training.dpo_trainer", "llmbot.training.grpo_trainer",
    "llmbot.training.kto_trainer", "llmbot.training.lora_trainer", "llmbot.training.preference_trainer", "llmbot.training.scratch_trainer",
    "llmbot.training.sft_trainer", "llmbot.training.trainer",
):  # fmt: skip
    import_module(name)
gc.collect()
gc.freeze()  # a full collection, as transformers makes one before each training, need not look at all this
