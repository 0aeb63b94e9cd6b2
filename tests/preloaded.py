"""What the process loads that forks the runs of `test_never_lost.py`, before it forks the first."""

import gc

import trl.trainer.grpo_trainer
import trl.trainer.kto_trainer  # noqa: F401

import llmbot.training.dpo_trainer
import llmbot.training.grpo_trainer
import llmbot.training.kto_trainer
import llmbot.training.lora_trainer
import llmbot.training.preference_trainer
import llmbot.training.scratch_trainer
import llmbot.training.sft_trainer
import llmbot.training.trainer  # noqa: F401

gc.freeze()  # a full collection, as transformers makes one before each training, need not look at all this
