"""Tokens per second of `scratch` and `sft` against a bare PyTorch loop, on the same model, batches and precision.

Each method trains through `llmbot`'s own trainer; its peer is a hand-written loop over the same collated batches with the
same optimizer, clipping and schedule. The two run in turn (A B A B ...), and the ratio is the median over the pairs, so a
machine whose speed drifts does not decide the result. With `--trl`, TRL's `SFTTrainer` runs as a third peer of `sft`.

    python benchmarks/training.py [--preset qwen3-6m] [--steps 40] [--repeats 3] [--precision fp32,bf16] [--trl]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llmbot.app.demo_data import demo_rows
from llmbot.core.config import Config
from llmbot.core.config_io import load_config
from llmbot.training.methods import get_method
from llmbot.training.trainer import prepare_run

QUIET = Console(quiet=True)


def write_rows(path: Path, method: str, rows: int) -> None:
    "Text for `scratch`, conversations for `sft`, both made here and in lengths that vary."
    rng = random.Random(0)
    train, _ = demo_rows(0)
    words = [w for _, q, a in train for w in f"{q} {a}".split()]
    with path.open("w", encoding="utf-8") as f:
        for _ in range(rows):
            text = " ".join(rng.choices(words, k=rng.randint(40, 400)))
            question = " ".join(rng.choices(words, k=rng.randint(5, 60)))
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
            f.write(json.dumps({"text": text} if method == "scratch" else {"messages": turns}) + "\n")


def recipe(method: str, data: Path, out: Path, args: argparse.Namespace, precision: str) -> Config:
    "The same recipe for every runner."
    settings = {
        "model.preset": args.preset,
        "training.method": method,
        "training.output_dir": json.dumps(str(out)),
        "training.max_steps": args.steps,
        "training.per_device_batch_size": args.batch_size,
        "training.precision": precision,
        "training.save_steps": 10**6,
        "training.logging_steps": 10,
        "data.train": json.dumps([str(data)]),
        "data.max_seq_length": args.seq_length,
        "data.validation_split": 0,
        "monitoring.trackers": "[]",
    }
    return load_config(None, overrides=[f"{k}={v}" for k, v in settings.items()], env={})


def ours(cfg: Config, root: Path) -> tuple[float, float]:
    "Tokens per second of llmbot's trainer, and its loss."
    method = get_method(cfg.training.method)
    with tempfile.TemporaryDirectory(dir=root) as tmp:
        run = prepare_run(cfg, method, Path(tmp), False, QUIET)
        trainer = method.build(run)
        run.model.config.use_cache = False
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        loss = [e["loss"] for e in trainer.state.log_history if "loss" in e][-1]
        return trainer.tokens_seen / seconds, loss


def bare(cfg: Config, root: Path) -> tuple[float, float]:
    "The loop that one would write by hand: the same batches, AdamW, clipping, cosine schedule; loss read every 10 steps."
    from transformers import get_scheduler

    method = get_method(cfg.training.method)
    with tempfile.TemporaryDirectory(dir=root) as tmp:
        run = prepare_run(cfg, method, Path(tmp), False, QUIET)
        batches, steps = iter(method.build(run).get_train_dataloader()), cfg.training.max_steps or 1
        model, t = run.model.train(), run.config.training
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=t.learning_rate or 1e-3, betas=(t.adam_beta1, t.adam_beta2), weight_decay=0.0, fused=True
        )
        scheduler = get_scheduler("cosine", optimizer, math.ceil(t.warmup_steps * steps), steps)
        half = torch.autocast(run.device, torch.bfloat16) if t.precision == "bf16" else nullcontext()
        tokens, losses, started = 0, [], time.perf_counter()
        for step in range(steps):
            batch = next(batches)
            batch.pop("attention_mask", None)
            tokens += batch["input_ids"].numel()
            with half:
                loss = model(**{**batch, "use_cache": False}).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if step % 10 == 9:
                loss.item()
        speed, last = tokens / (time.perf_counter() - started), steps // 10 * 10
        return speed, float(torch.stack(losses[max(last - 10, 1) : last]).mean())  # what the trainer logged last


def trl(cfg: Config, root: Path) -> tuple[float, float]:
    "TRL's SFTTrainer as it comes, on the same tokenized rows."
    from trl import SFTConfig, SFTTrainer

    from llmbot.training.methods import training_arguments

    method = get_method("sft")
    with tempfile.TemporaryDirectory(dir=root) as tmp:
        run = prepare_run(cfg, method, Path(tmp), False, QUIET)
        settings = training_arguments(run) | {"max_length": None}
        collator, tokens = method.build(run).data_collator, 0

        def collate(features: list[dict[str, Any]]) -> dict[str, Any]:
            nonlocal tokens
            batch = collator(features)
            tokens += batch["input_ids"].numel()
            return batch

        args = SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True}, packing=False)
        trainer: Any = SFTTrainer(
            model=run.model, args=args, train_dataset=run.data.train, processing_class=run.tokenizer,
            data_collator=collate,
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        return tokens / seconds, [e["loss"] for e in trainer.state.log_history if "loss" in e][-1]


def compare(cfg: Config, root: Path, peers: dict[str, Callable[[Config, Path], tuple[float, float]]], repeats: int) -> None:
    "Run ours and its peers in turn and print medians and ratios."
    speeds: dict[str, list[float]] = {name: [] for name in ("llmbot", *peers)}
    losses: dict[str, float] = {}
    for _ in range(repeats):
        for name, runner in {"llmbot": ours, **peers}.items():
            speed, losses[name] = runner(cfg, root)
            speeds[name].append(speed)
    label = f"{cfg.training.method:8} {cfg.training.precision}"
    print(f"{label}  llmbot {statistics.median(speeds['llmbot']):9,.0f} tokens/s   loss {losses['llmbot']:.4f}", flush=True)
    for name in peers:
        ratio = statistics.median(a / b for a, b in zip(speeds["llmbot"], speeds[name], strict=True))
        median = statistics.median(speeds[name])
        print(f"{label}  {name:6} {median:9,.0f} tokens/s   loss {losses[name]:.4f}   llmbot / {name} = {ratio:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="qwen3-6m")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--trl", action="store_true")
    args = parser.parse_args()
    print(f"{args.preset}, batch {args.batch_size} x {args.seq_length}, {args.steps} steps, {torch.get_num_threads()} threads", flush=True)
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        for method in ("scratch", "sft"):
            data = root / f"{method}.jsonl"
            write_rows(data, method, args.rows)
            for precision in args.precision.split(","):
                cfg = recipe(method, data, root / "bot", args, precision)
                compare(cfg, root, {"bare": bare, **({"trl": trl} if args.trl and method == "sft" else {})}, args.repeats)


if __name__ == "__main__":
    main()
