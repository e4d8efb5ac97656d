"""Run by torchrun or `accelerate launch`: the `Trainer` on several processes; each rank writes what it saw."""

from __future__ import annotations

import os


os.environ["DS_ACCELERATOR"] = "cpu"

import json
import sys
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from launching import write_report
from parallel_cases import CASES, mocle, mole, rows
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from peft_moe import MoeLlavaForConditionalGeneration


if find_spec("deepspeed"):
    import deepspeed
    import deepspeed.ops

    # compiling this takes more than a minute, and gloo does the same
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# fsdp_transformer_layer_cls_to_wrap: of the configuration, which is for MoLE, and what else has to stand there
CONFIGURED_GROUPS = os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
FSDP_GROUPS = {
    "mocle": "LlamaDecoderLayer,ClusterEmbedding",
    "moextend": "MixtralDecoderLayer",
    "moe_llava-frozen-tower": "LlamaDecoderLayer,MoeLlavaTopKRouter",
}


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """The trained weights in full; every rank has to call this."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    is_zero3 = any(hasattr(p, "ds_id") for p in trained.values())
    with deepspeed.zero.GatheredParameters(list(trained.values())) if is_zero3 else nullcontext():
        return {
            name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in trained.items()
        }


class FirstStep(TrainerCallback):
    """Keeps the weights after the first optimizer step."""

    weights: dict[str, torch.Tensor] | None = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.weights is None:
            self.weights = weights_of(model)


def sharing(trainer: Trainer) -> str:
    """What is shared out between processes, as the model shows it."""
    engine = trainer.model_wrapped
    if type(engine).__name__ != "DeepSpeedEngine":
        is_sharded = any(isinstance(p, DTensor) for p in trainer.model.parameters())
        return f"{type(engine).__name__}{' of DTensor' if is_sharded else ''}"
    local = sum(p.numel() for p in trainer.model.parameters() if hasattr(p, "ds_id"))
    is_partitioned = all(hasattr(p, "ds_id") for p in trainer.model.parameters()) and local == 0
    return f"ZeRO-{engine.zero_optimization_stage()}{' partitioned' if is_partitioned else ''}"


def new_trainer(model: nn.Module, folder: Path, name: str, options: dict, **more) -> Trainer:
    """Each with a state of accelerate of its own."""
    AcceleratorState._reset_state()
    if "fsdp2" in options:
        # accelerate has FSDP for devices other than a CPU: it is told that this is one, and does the rest by itself
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_XPU
        groups = FSDP_GROUPS.get(name, CONFIGURED_GROUPS)
        os.environ.update({**options["fsdp2"], "FSDP_TRANSFORMER_CLS_TO_WRAP": groups})
    args = TrainingArguments(
        str(folder / name),
        per_device_train_batch_size=options.get("batch_size", 1),
        gradient_accumulation_steps=options["accumulation"],
        max_steps=options.get("steps", 2),
        max_grad_norm=0,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim=options.get("optim", "sgd"),
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="steps" if options.get("resumes") else "no",
        save_steps=1,
        train_sampling_strategy="sequential",
        accelerator_config={"even_batches": False, "use_configured_state": "fsdp2" in options},
        **options.get("arguments", {}),
    )
    if args.deepspeed_plugin is not None and args.deepspeed_plugin.zero_stage == 3:
        # parameters of tiny models would all stay whole
        args.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return Trainer(model, args, train_dataset=rows(name, options.get("rows", 16)), **more)


def run(folder: Path, name: str, options: dict) -> dict:
    """Train a case, then perhaps again from the checkpoint in the middle."""
    # both now: once there is a configuration of ZeRO-3, transformers shares out what it builds
    model, again = build(name, options), build(name, options)
    before, first = weights_of(model), FirstStep()
    trainer = new_trainer(model, folder, name, options, callbacks=[first])
    try:
        trainer.train()
    except RuntimeError as error:
        return {"error": str(error)}
    found = {
        "before": before,
        "first": first.weights,
        "weights": weights_of(model),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "sharing": sharing(trainer),
        "processes": trainer.accelerator.num_processes,
    }
    if options.get("resumes"):
        for parameter in again.parameters():
            parameter.data *= 0.5 if parameter.requires_grad else 1.0
        trainer = new_trainer(again, folder, name, options)
        trainer.train(resume_from_checkpoint=str(folder / name / "checkpoint-1"))
        found["resumed"] = weights_of(again)
    return found


def build(name: str, options: dict) -> nn.Module:
    """The model of a case; perhaps on a base that transformers shares out."""
    if "base" in options:
        from transformers.distributed import DistributedConfig

        tuner = {"mole": mole, "mocle": mocle}.get(name)
        load = (AutoModelForCausalLM if tuner else MoeLlavaForConditionalGeneration).from_pretrained
        base = load(Path(options["base"], name), distributed_config=DistributedConfig(**options["layout"]))
        return tuner(base=base) if tuner else base
    model = CASES[name].build()
    if name.startswith("moextend"):
        model.enable_input_require_grads()
    return model


def main(folder: str, options: str, *names: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for name in names:
        found[name] = run(Path(folder), name, json.loads(options))
    write_report(folder, found)
    if dist.is_initialized():
        dist.barrier()
        os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
