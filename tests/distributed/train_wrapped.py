"""Run by torchrun: DDP and FSDP2 of plain torch around each method; every rank writes what it saw to a file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from launching import write_report
from parallel_cases import CASES, Batch, checkpoint, steps_of, text_batch, train
from peft import PeftModel
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerControl, TrainerState

from peft_moe import get_aux_loss, record_expert_load
from peft_moe.models.moe_llava.routing import MoeLlavaTopKRouter
from peft_moe.monitoring import ExpertLoadCallback
from peft_moe.routing import ClusterEmbedding, TopKRouter


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The decoder layers."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(inner.model, "language_model", inner.model).layers


def shard(model: nn.Module, *, groups: tuple[type, ...] = (ClusterEmbedding, MoeLlavaTopKRouter, TopKRouter)) -> None:
    """FSDP2 by layer; modules of the types in `groups` get a group of their own."""
    for module in model.modules():
        if isinstance(module, groups):
            fully_shard(module)
    for layer in layers_of(model):
        fully_shard(layer)
    fully_shard(model)
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor) and parameter.device_mesh.size() == dist.get_world_size()
    assert sum(p.to_local().numel() for p in model.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is perhaps sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def idle_experts(model: nn.Module, batch: Batch) -> list[bool]:
    """For each expert of each router, whether no token of this rank goes there."""
    with torch.no_grad(), record_expert_load(model) as load:
        model(**batch)
    return [count == 0 for counts in load.by_router().values() for count in counts]


def save_and_answer(model: nn.Module, folder: Path) -> torch.Tensor:
    """Save the adapter from the gathered state, and return logits of a batch."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    dist.barrier()
    model.eval()
    batch = {**text_batch(0, 0), "cluster_ids": torch.tensor([0, 3])}
    if "mocle" not in folder.name:
        del batch["cluster_ids"]
    with torch.no_grad():
        return model(**batch).logits


def run(wrapper: str, name: str, checkpointing: str, folder: Path) -> dict:
    """Train a case on the batches of this rank."""
    case = CASES[name]
    model = case.build()
    steps = [[[row[dist.get_rank()]] for row in step] for step in steps_of(case, dist.get_world_size())]
    idle = idle_experts(model.eval(), steps[0][0][0])
    checkpoint(model, checkpointing)
    if wrapper == "fsdp":
        shard(model)
        wrapped = model
    else:
        wrapped = DistributedDataParallel(model, find_unused_parameters=wrapper == "ddp-unused")
    found = {**train(wrapped, steps, dist.get_world_size(), whole), "idle": idle}
    if wrapper == "fsdp" and checkpointing == "none" and name in ("mole", "mocle", "moextend"):
        found["logits"] = save_and_answer(model, folder / name)
    return found


def shared_table_in_the_group_of_a_layer() -> dict:
    """What a user reads who shards layers and nothing else."""
    model = CASES["mocle"].build().train()
    shard(model, groups=())
    try:
        model(**CASES["mocle"].batch(dist.get_rank(), 0))
    except RuntimeError as error:
        return {"error": str(error)}
    return {"error": None}


def corners_of_the_global_scope() -> dict:
    """What one process does alone, what a callback logs, and what is said of processes that ran different routers."""
    model = CASES["mole-global"].build()
    if dist.get_rank() == 0:
        model.eval()
        with record_expert_load(model):
            model(**text_batch(0, 0))
    model.train()
    callback, logs = ExpertLoadCallback(file_name=None), {"loss": 0.0}
    args, state, control = SimpleNamespace(output_dir=None), TrainerState(), TrainerControl()
    callback.on_train_begin(args, state, control, model=model)
    model(**text_batch(dist.get_rank(), 0))
    callback.on_log(args, state, control, logs=logs)
    with torch.no_grad():
        found = {"logged": logs["aux_loss"], "aux_loss": get_aux_loss(model).item(), "error": None}
    if dist.get_rank() == 1:
        layers_of(model)[1].mlp.forward = lambda hidden_states: hidden_states
    try:
        model(**text_batch(dist.get_rank(), 0))
    except RuntimeError as error:
        found["error"] = str(error)
    return found


def main(folder: str, *settings: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for setting in settings:
        if setting == "shared-table":
            found[setting] = shared_table_in_the_group_of_a_layer()
        elif setting == "global-corners":
            found[setting] = corners_of_the_global_scope()
        else:
            found[setting] = run(*setting.split("/"), Path(folder))
    write_report(folder, found)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
