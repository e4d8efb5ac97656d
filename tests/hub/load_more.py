"""Run by the exhaustive tests: loads what `push_more.py` has pushed, and trains on from a checkpoint on the Hub."""

from __future__ import annotations

import torch
from hub_training import arguments, case, rows
from huggingface_hub import snapshot_download
from outcomes import FOLDER, compare, fail_next, finish
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Trainer

from conformance.tuner_cases import CASES


def trained_on():
    """Two steps are on the Hub, two are made here."""
    torch.manual_seed(7)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(f"someone/base-of-{case().name}"), case().config())
    checkpoint = snapshot_download("someone/checkpoints", allow_patterns="checkpoint-2/*") + "/checkpoint-2"
    trainer = Trainer(model, arguments(FOLDER / "resumed"), train_dataset=rows())
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == 4
    return model


def main() -> None:
    torch.set_num_threads(1)
    load = AutoPeftModelForCausalLM.from_pretrained
    results = {one.name: compare(one.name, lambda: load(f"someone/{one.name}")) for one in CASES}
    results["resumed"] = compare("checkpoints", trained_on)
    results["shards"] = compare("shards", lambda: AutoModelForImageTextToText.from_pretrained("someone/shards"))
    fail_next("GET", "/someone/mocle/resolve/[^/]+/adapter_model.safetensors", None)
    repository = "someone/mocle"
    results["download cut off once"] = compare("mocle", lambda: load(repository, force_download=True))
    finish(results)


main()
