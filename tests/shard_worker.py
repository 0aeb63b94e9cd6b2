"""A small model under PyTorch's own `fully_shard`, on CPUs: what each process of `test_sharded_checkpoint_reloads_elsewhere` does."""

from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

Weights = dict[str, torch.Tensor]


def build(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    "Layers whose sizes two processes cannot halve evenly."
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    "One step on rows that the seed decides."
    model(torch.randn(4, 7, generator=torch.Generator().manual_seed(seed))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model: nn.Module) -> Weights:
    "All weights, in rank 0."
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def train_and_save(parts: Path) -> Weights:
    "Three steps on rows of each process's own, then a checkpoint in parts."
    model, optimizer = build(seed=1)
    for number in range(3):
        step(model, optimizer, 10 * number + dist.get_rank())
    weights, moments = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=parts)
    return whole(model)


def load_and_step(parts: Path) -> Weights:
    "Reload into a model of other weights, and take one more step on rows that all processes share: the optimizer's state matters."
    model, optimizer = build(seed=2)
    weights, moments = get_state_dict(model, optimizer)
    dcp.load(state := {"model": weights, "optimizer": moments}, checkpoint_id=parts)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    step(model, optimizer, seed=99)
    return whole(model)


def work(rank: int, world: int, folder: Path) -> None:
    "Save where there are two processes; load everywhere."
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting-{world}", rank=rank, world_size=world)
    results = {"saved": train_and_save(folder / "parts")} if world == 2 else {}
    results[f"loaded-{world}"] = load_and_step(folder / "parts")
    if rank == 0:
        for name, weights in results.items():
            torch.save(weights, folder / f"{name}.pt")
    dist.destroy_process_group()
