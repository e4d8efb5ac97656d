"""One process of `test_expert_load_ddp.py`: trains and evaluates, and writes what it saw to its own file."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist


for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    sys.path.insert(0, str(folder))

from monitored import HandCount, build, rows, trainer_for  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from peft_moe import get_aux_loss  # noqa: E402
from peft_moe.monitoring import ExpertLoadCallback  # noqa: E402
from peft_moe.monitoring.expert_load import gather_json  # noqa: E402


CHECKPOINTING = {
    "none": {},
    "non_reentrant": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "ddp_find_unused_parameters": False,
    },
}


def run(output_dir: Path, arguments: dict) -> dict:
    torch.manual_seed(0)
    model = build()
    hand, values = HandCount(model), []

    class AuxLosses(TrainerCallback):
        def read(self, args, state, control, **kwargs):
            with torch.no_grad():
                values.append(get_aux_loss(model).item())

        on_substep_end = on_step_end = read

    callback = ExpertLoadCallback()
    trainer = trainer_for(
        model,
        output_dir,
        [AuxLosses(), callback],
        eval_dataset={"chess": rows(8, seed=1), "go": rows(5, seed=2)},
        gradient_accumulation_steps=2,
        num_rows=32,
        **arguments,
    )
    trainer.train()
    metrics = trainer.evaluate()
    return {
        "world_size": dist.get_world_size(),
        "hand": hand.counts,
        "aux_losses": values,
        "train": callback.train_load.by_router(),
        "eval": callback.eval_load.by_router(),
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
        "chess_entropy": metrics["eval_chess_expert_load_entropy"],
    }


def main(output_dir: str) -> None:
    torch.set_num_threads(1)
    results: dict = {name: run(Path(output_dir, name), arguments) for name, arguments in CHECKPOINTING.items()}
    results["gathered"] = gather_json(["ü" * 1000 * dist.get_rank(), 0.1, None])
    Path(output_dir, f"rank{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.barrier()
    # gloo sometimes aborts while the interpreter shuts down, after all the work is done
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
