"""A tiny model with MoCLE, whose clusters the tests export, and its logits."""

import copy

import torch
from peft import get_peft_model

from peft_moe import MoCLEConfig
from tiny_models import tiny_llama, token_batch


NUM_CLUSTERS = 5
SETTINGS = {
    "num_clusters": NUM_CLUSTERS,
    "num_experts": 3,
    "r": 4,
    "cluster_embedding_dim": 8,
    "init_lora_weights": False,
    # soft gates, so that every weight counts
    "temperature": 0.5,
}
TOP_1 = MoCLEConfig(**SETTINGS)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def adapted(config=TOP_1, base=None):
    # PEFT completes a configuration, which must not reach the next test
    model = get_peft_model(base or tiny_llama(), copy.deepcopy(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.1)
    return model.eval()


@torch.no_grad()
def logits_of(model, cluster=None, **inputs):
    batch = inputs or {key: value for key, value in token_batch().items() if key != "labels"}
    if cluster is not None:
        batch["cluster_ids"] = torch.full((2,), cluster)
    return model.eval()(**batch).logits
