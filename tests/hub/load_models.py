"""Run by the tests: loads what `push_models.py` has pushed, in a process that knows nothing else of it."""

from __future__ import annotations

import torch
from huggingface_hub import HfApi
from outcomes import compare, error_of, finish
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from peft_moe import ClusterAdapterRouter, InstructionClusterer


def base(name: str = "llama"):
    return AutoModelForCausalLM.from_pretrained(f"someone/{name}")


def load_into(name: str, repository: str):
    """As transformers does it, without PEFT's classes."""
    model = base(name)
    model.load_adapter(repository)
    return model


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    for tuner in ("mole", "mocle", "moextend"):
        on, repository = ("mixtral" if tuner == "moextend" else "llama"), f"someone/{tuner}"
        results[f"{tuner} peft"] = compare(tuner, lambda: PeftModel.from_pretrained(base(on), repository))
        results[f"{tuner} auto-peft"] = compare(tuner, lambda: AutoPeftModelForCausalLM.from_pretrained(repository))
        results[f"{tuner} load-adapter"] = compare(tuner, lambda: load_into(on, repository))
        results[f"{tuner} auto-model"] = compare(tuner, lambda: AutoModelForCausalLM.from_pretrained(repository))

    commits = {commit.title: commit.commit_id for commit in HfApi().list_repo_commits("someone/trained")}
    old = HfApi().list_repo_commits("someone/versions")[1].commit_id
    for name, repository, options in (
        ("versions-new", "versions", {}),
        ("versions-old", "versions", {"revision": old}),
        ("versions-branch", "versions", {"revision": "experiment"}),
        ("two-default", "two", {}),
        ("two-other", "two", {"subfolder": "other"}),
        ("uploaded", "uploaded", {}),
        ("trained-step-2", "trained", {"revision": commits["Training in progress, step 2"]}),
        ("trained-step-4", "trained", {"revision": commits["Training in progress, step 4"]}),
    ):
        results[name] = compare(name, lambda: PeftModel.from_pretrained(base(), f"someone/{repository}", **options))
    results["trained"] = compare("trained-step-4", lambda: AutoPeftModelForCausalLM.from_pretrained("someone/trained"))
    for name in ("mole", "uploaded", "trained"):
        info = HfApi().model_info(f"someone/{name}")
        results[f"info {name}"] = {
            "library_name": info.library_name,
            "tags": info.tags,
            "base": info.card_data.base_model,
        }
    results["private without token"] = error_of(lambda: PeftModel.from_pretrained(base(), "someone/two", token=False))

    results["moe-llava"] = compare(
        "moe-llava", lambda: AutoModelForImageTextToText.from_pretrained("someone/moe-llava")
    )
    results["moe-llava class"] = type(AutoModelForImageTextToText.from_pretrained("someone/moe-llava")).__module__
    results["processor"] = type(AutoProcessor.from_pretrained("someone/moe-llava")).__name__
    clusters = InstructionClusterer.from_pretrained("someone/clusters")
    centroids = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    results["clusters"] = [torch.equal(clusters.centroids.cpu(), centroids), clusters.encoder_name]
    results["adapters of the clusters"] = ClusterAdapterRouter.from_pretrained("someone/exported").adapters
    finish(results)


main()
