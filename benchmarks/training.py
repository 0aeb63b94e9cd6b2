"""Tokens per second and peak memory of `scratch`, `sft`, `lora` and `dpo` against a bare PyTorch or PEFT loop.

Each method trains through `llmbot`'s own trainer; its peer is a hand-written loop over the same collated batches with the
same optimizer, clipping and schedule. Every run has a process of its own, so that its peak of memory is its own. The two
run in turn (A B A B ...), and the ratio is the median over the pairs, so a machine whose speed drifts does not decide the
result. With `--trl`, TRL's `SFTTrainer` runs as a third peer of `sft`.

    python benchmarks/training.py [--methods scratch,sft,lora,dpo] [--preset qwen3-6m] [--steps 40] [--repeats 3]
                                  [--precision fp32,bf16] [--settings training.fused_loss=chunked] [--trl]
    python benchmarks/training.py --gpu     # model FLOPs utilisation on one CUDA device, as a table
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from llmbot.app.demo_data import demo_rows
from llmbot.core.config import Config, ModelConfig
from llmbot.core.config_io import load_config, save_config
from llmbot.core.model_manager import new_model, save_bot, train_tokenizer
from llmbot.training.methods import get_method
from llmbot.training.trainer import prepare_run

QUIET = Console(quiet=True)
METHODS = ("scratch", "sft", "lora", "dpo")


def write_rows(path: Path, method: str, rows: int) -> None:
    "Text for `scratch`, conversations for `sft` and `lora`, pairs for `dpo`, all made here and in lengths that vary."
    rng = random.Random(0)
    train = demo_rows(0).train
    words = [w for _, q, a in train for w in f"{q} {a}".split()]
    with path.open("w", encoding="utf-8") as f:
        for _ in range(rows):
            text = " ".join(rng.choices(words, k=rng.randint(40, 400)))
            prompt = [{"role": "user", "content": " ".join(rng.choices(words, k=rng.randint(5, 60)))}]
            answer = [{"role": "assistant", "content": text}]
            other = [{"role": "assistant", "content": " ".join(rng.choices(words, k=rng.randint(40, 400)))}]
            pair = {"prompt": prompt, "chosen": answer, "rejected": other}
            kinds: dict[str, dict[str, Any]] = {"scratch": {"text": text}, "dpo": pair}
            f.write(json.dumps(kinds.get(method, {"messages": prompt + answer})) + "\n")


def write_base(path: Path, preset: str) -> None:
    "A bot of random weights for the methods that start from one."
    tokenizer = train_tokenizer([f"{q} {a}" for _, q, a in demo_rows(0).train], 4096)
    save_bot(path, new_model(ModelConfig(preset=preset), tokenizer), tokenizer)


def recipe(method: str, data: Path, out: Path, args: argparse.Namespace, precision: str, **more: Any) -> Config:
    "The same recipe for every runner."
    settings = {
        "training.method": method,
        "training.output_dir": json.dumps(str(out)),
        "training.max_steps": args.steps,
        "training.per_device_batch_size": args.batch_size,
        "training.precision": precision,
        "training.save_steps": 10**6,
        "training.logging_steps": 10,
        "data.train": json.dumps([str(data)]),
        "data.max_seq_length": args.seq_length,
        "data.on_overlong": "truncate_right" if method in ("sft", "lora") else "drop",
        "data.validation_split": 0,
        "data.cache_dir": json.dumps(str(out.parent / "cache")),
        "monitoring.trackers": "[]",
        **more,
    }
    based = method in ("lora", "dpo") and "model.base" not in settings
    settings |= {"model.base": json.dumps(str(out.parent / "base"))} if based else {}
    settings |= {} if "model.base" in settings or "model.hidden_size" in settings else {"model.preset": args.preset}
    return load_config(None, overrides=[*(f"{k}={v}" for k, v in settings.items()), *args.settings], env={})


class Peak:
    "The most memory that was in use since this was made, above what was in use then; in MB."

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
            self.before = self.status("VmRSS")

    @staticmethod
    def status(name: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return float(next(line for line in lines if line.startswith(name)).split()[1]) / 1024

    def read(self) -> float:
        return (torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else self.status("VmHWM")) - self.before


def ours(cfg: Config, root: Path) -> tuple[float, float, float]:
    "Tokens per second of llmbot's trainer, its loss, and its peak memory."
    method = get_method(cfg.training.method)
    with tempfile.TemporaryDirectory(dir=root) as tmp:
        run = prepare_run(cfg, method, Path(tmp), False, QUIET)
        trainer = method.build(run)
        run.model.config.use_cache = False
        peak, started = Peak(), time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        loss = [e["loss"] for e in trainer.state.log_history if "loss" in e][-1]
        return trainer.tokens_seen / seconds, loss, peak.read()


def pair_loss(logits: torch.Tensor, labels: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    "DPO as one would write it: rows 0, 2, ... hold the chosen answers, rows 1, 3, ... the rejected ones."
    targets = labels[:, 1:]
    logps = logits[:, :-1].float().log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    margins = (logps * (targets != -100)).sum(1) - reference
    return -torch.nn.functional.logsigmoid(beta * (margins[0::2] - margins[1::2])).mean()


def bare(cfg: Config, root: Path) -> tuple[float, float, float]:
    "The loop that one would write by hand: the same batches, AdamW, clipping, cosine schedule; loss read every 10 steps."
    from transformers import get_scheduler

    method = get_method(cfg.training.method)
    with tempfile.TemporaryDirectory(dir=root) as tmp:
        run = prepare_run(cfg, method, Path(tmp), False, QUIET)
        trainer, steps = method.build(run), cfg.training.max_steps or 1
        loader = trainer.get_train_dataloader()
        batches = itertools.chain.from_iterable(itertools.repeat(loader))  # as many epochs as it takes
        model, t = run.model.train(), run.config.training
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=t.learning_rate or 1e-3, betas=(t.adam_beta1, t.adam_beta2), weight_decay=0.0, fused=True
        )
        scheduler = get_scheduler("cosine", optimizer, math.ceil(t.warmup_steps * steps), steps)
        half = torch.autocast(run.device, torch.bfloat16) if t.precision == "bf16" else nullcontext()
        tokens, losses, peak, started = 0, [], Peak(), time.perf_counter()
        for step in range(steps):
            batch = next(batches)
            batch.pop("attention_mask", None)
            reference = batch.pop("reference_logps", None)
            tokens += batch["input_ids"].numel()
            with half:
                if reference is None:
                    loss = model(**{**batch, "use_cache": False}).loss
                else:
                    loss = pair_loss(model(batch["input_ids"], use_cache=False).logits, batch["labels"], reference, 0.1)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if step % 10 == 9:
                loss.item()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        speed, last, used = tokens / (time.perf_counter() - started), steps // 10 * 10, peak.read()
        return speed, float(torch.stack(losses[max(last - 10, 1) : last]).mean()), used  # what the trainer logged last


def trl(cfg: Config, root: Path) -> tuple[float, float, float]:
    "TRL's SFTTrainer on the same tokenized rows, with llmbot's arguments."
    return trl_trainer(cfg, root, defaults=False)


def trl_defaults(cfg: Config, root: Path) -> tuple[float, float, float]:
    "TRL's SFTTrainer as it comes: its own arguments, gradient checkpointing among them."
    return trl_trainer(cfg, root, defaults=True)


def trl_trainer(cfg: Config, root: Path, defaults: bool) -> tuple[float, float, float]:
    "TRL's SFTTrainer on the same tokenized rows."
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

        if defaults:
            kept = ("output_dir", "per_device_train_batch_size", "max_steps", "learning_rate", "use_cpu", "report_to", "disable_tqdm",
                    "logging_steps", "remove_unused_columns", "max_length")  # fmt: skip
            settings = {name: settings[name] for name in kept}
        args = SFTConfig(**settings, dataset_kwargs={"skip_prepare_dataset": True}, packing=False)
        trainer: Any = SFTTrainer(
            model=run.model, args=args, train_dataset=run.data.train, processing_class=run.tokenizer,
            data_collator=collate,
        )
        peak, started = Peak(), time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        return tokens / seconds, [e["loss"] for e in trainer.state.log_history if "loss" in e][-1], peak.read()


RUNNERS = {"llmbot": ours, "bare": bare, "trl": trl, "trl-defaults": trl_defaults}


def in_child(runner: str, cfg: Config, root: Path) -> tuple[float, float, float]:
    "Run in a process of its own: tokens per second, loss, peak memory in MB. Raises `RuntimeError` with what it said when it fails."
    path = root / "recipe.yaml"
    save_config(cfg, path)
    done = subprocess.run([sys.executable, __file__, "--child", runner, str(path), str(root)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    speed, loss, memory = json.loads(done.stdout.splitlines()[-1])
    return speed, loss, memory


def compare(cfg: Config, root: Path, peers: tuple[str, ...], repeats: int) -> None:
    "Run ours and its peers in turn and print medians and ratios."
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ("llmbot", *peers)}
    for _ in range(repeats):
        for name in found:
            found[name].append(in_child(name, cfg, root))
    label = f"{cfg.training.method:8} {cfg.training.precision}"
    for name, runs in found.items():
        speed, memory = (statistics.median(run[i] for run in runs) for i in (0, 2))
        line = f"{label}  {name:6} {speed:9,.0f} tokens/s  {memory:8,.0f} MB  loss {runs[-1][1]:.4f}"
        if name != "llmbot":
            faster, larger = (statistics.median(a[i] / b[i] for a, b in zip(found["llmbot"], runs, strict=True)) for i in (0, 2))
            line += f"   llmbot / {name}: speed {faster:.2f}, memory {larger:.2f}"
        print(line, flush=True)


HALF_BILLION = {"model.hidden_size": 1024, "model.num_hidden_layers": 28, "model.num_attention_heads": 16, "model.num_key_value_heads": 8,
                "model.head_dim": 128, "model.intermediate_size": 3072, "model.vocab_size": 32768}  # Qwen3-0.6B with a smaller vocabulary
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [  # method, runner, settings beside the defaults
    ("scratch", "llmbot", {}),
    ("scratch", "llmbot", {"training.gradient_checkpointing": True}),
    ("scratch", "llmbot", {"training.torch_compile": True}),
    ("scratch", "llmbot", {"training.fused_loss": "chunked"}),
    ("scratch", "llmbot", {"training.fused_loss": "liger"}),
    ("scratch", "bare", {}),
    *((method, "llmbot", more) for method in ("sft", "lora") for more in (
        {}, {"training.packing": False}, {"training.packing": False, "training.group_by_length": True},
        {"training.gradient_checkpointing": True}, {"training.fused_loss": "chunked"}, {"training.fused_loss": "liger"})),
    ("sft", "trl-defaults", {}),
    ("sft", "trl-defaults", {"training.packing": False}),
]


def matmul_peak() -> float:
    "Floating point operations per second of a large bf16 product: the best of some."
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        torch.cuda.synchronize()
        best = max(best, 10 * 2 * 8192**3 / (time.perf_counter() - started))
    return best


def operations_per_token(cfg: Config, weights: int, length: int) -> float:
    "Forward and backward: 6 a weight, 4 where it is frozen, and causal attention (PaLM's count, halved)."
    m = cfg.model
    width = (m.num_attention_heads or 1) * (m.head_dim or 1)
    return (4 if cfg.training.method == "lora" else 6) * weights + 6 * (m.num_hidden_layers or 1) * width * length


def gpu_table(args: argparse.Namespace, root: Path) -> None:
    "Utilisation of one CUDA device by each variant. Padding counts as work here."
    if not torch.cuda.is_available():
        print("No CUDA device is at hand: nothing was measured.")
        return
    peak = matmul_peak()
    print(f"{torch.cuda.get_device_name()}: {peak / 1e12:,.0f} TFLOP/s in bf16 products; utilisation is against that")
    args.seq_length = 2048
    shape = recipe("scratch", root / "none.jsonl", root / "bot", args, "bf16", **HALF_BILLION)
    write_rows(root / "text.jsonl", "scratch", 50)
    tokenizer = train_tokenizer((root / "text.jsonl").read_text().splitlines(), 32768)
    model = new_model(shape.model, tokenizer)
    weights = sum(p.numel() for p in model.parameters())
    save_bot(root / "base", model, tokenizer)
    for method, runner, more in VARIANTS:
        data = root / f"{method}.jsonl"
        if not data.exists():
            write_rows(data, method, args.rows)
        cfg = recipe(method, data, root / "bot", args, "bf16", **({"model.base": json.dumps(str(root / "base"))} | more))
        told = " ".join(f"{k.split('.')[1]}={v}" for k, v in more.items()) or "defaults"
        try:
            speed, loss, memory = in_child(runner, cfg, root)
        except RuntimeError as exc:
            print(f"{method:8} {runner:12} {told:45} failed: {str(exc).strip().splitlines()[-1][:90]}", flush=True)
            continue
        asked = Config(model=shape.model, training=cfg.training)
        share = speed * operations_per_token(asked, weights, args.seq_length) / peak
        print(f"{method:8} {runner:12} {told:45} {speed:9,.0f} tokens/s  {share:6.1%} of peak  {memory:8,.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--preset", default="qwen3-6m")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--settings", nargs="*", default=[], help="more settings for every recipe, such as training.packing=false")
    parser.add_argument("--trl", action="store_true")
    parser.add_argument("--gpu", action="store_true", help="the table of a CUDA device instead")
    parser.add_argument("--child", nargs=3, metavar=("RUNNER", "RECIPE", "ROOT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        runner, path, root = args.child
        print(json.dumps(RUNNERS[runner](load_config(path, env={}), Path(root))))
        return
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp)
        if args.gpu:
            gpu_table(args, root)
            return
        threads, shape = torch.get_num_threads(), f"{args.batch_size} x {args.seq_length}"
        print(f"{args.preset}, batch {shape}, {args.steps} steps, {threads} threads, no GPU table (--gpu)", flush=True)
        write_base(root / "base", args.preset)
        for method in args.methods.split(","):
            data = root / f"{method}.jsonl"
            write_rows(data, method, args.rows)
            for precision in args.precision.split(","):
                cfg = recipe(method, data, root / "bot", args, precision)
                compare(cfg, root, ("bare", *(["trl"] if args.trl and method == "sft" else [])), args.repeats)


if __name__ == "__main__":
    main()
