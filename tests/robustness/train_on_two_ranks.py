"""Run by torchrun: the second process takes its time to save, and the first waits for it before the manifest."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch.distributed as dist
from trained import trainer
from transformers import Trainer

from peft_moe import IntactCheckpointCallback, find_intact_checkpoint


def save_slowly(self: Trainer, output_dir: str) -> None:
    if self.args.process_index:
        time.sleep(3)
    original(self, output_dir)


original = Trainer._save_rng_state
Trainer._save_rng_state = save_slowly


def main(folder: str) -> None:
    training = trainer(folder, IntactCheckpointCallback(save_total_limit=1))
    training.train()
    # a process that is ahead would look for what the other one is about to delete
    dist.barrier()
    found = find_intact_checkpoint(folder, require_manifest=True)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    (Path(folder) / f"rank{rank}.json").write_text(json.dumps({"world_size": world_size, "found": found}))
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
