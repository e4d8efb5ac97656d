"""Tiny LLaVAs with random weights, one per text backbone (all sizes multiples of 8), their batches and training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import peft_moe
from peft_moe.models import MoeLlavaForConditionalGeneration


IMAGE_TOKEN = 3
NUM_IMAGE_TOKENS = 4
VOCABULARY = 64
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BACKBONES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-bias": ("LlamaConfig", {"mlp_bias": True}),
    "mistral": ("MistralConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "phi": ("PhiConfig", {"num_key_value_heads": 4}),
    "phi3": ("Phi3Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": ("Gemma2Config", {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "smollm3": ("SmolLM3Config", {}),
    "starcoder2": ("Starcoder2Config", {"residual_dropout": 0.0}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "nemotron": ("NemotronConfig", {}),
    "cohere": ("CohereConfig", {}),
}


def vision_config() -> transformers.CLIPVisionConfig:
    """Two layers, 2 x 2 patches."""
    return transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )


def text_config(backbone: str = "llama", **overrides: Any) -> transformers.PreTrainedConfig:
    """Three decoder layers."""
    name, settings = BACKBONES[backbone]
    return getattr(transformers, name)(**{**TEXT, **settings, **overrides})


def llava_fields(backbone: str = "llama", **text_overrides: Any) -> dict[str, Any]:
    """What a dense and a sparse configuration share."""
    return {
        "vision_config": vision_config(),
        "text_config": text_config(backbone, **text_overrides),
        "image_token_index": IMAGE_TOKEN,
        "image_seq_length": NUM_IMAGE_TOKENS,
        "vision_feature_layer": -1,
    }


def tiny_llava(backbone: str = "llama", *, seed: int = 0, **text_overrides: Any):
    """A dense LLaVA in evaluation mode, with biases that are not zero."""
    torch.manual_seed(seed)
    model = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(**llava_fields(backbone, **text_overrides))
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.dim() > 1:
                # wider than at initialisation, so that a wrong MLP shows in the logits
                parameter.mul_(5)
    return model.eval()


def sparse_llava(backbone: str = "llama", **fields: Any) -> MoeLlavaForConditionalGeneration:
    """A sparse one in evaluation mode, whose experts differ, so that routing matters."""
    dense = tiny_llava(backbone)
    torch.manual_seed(0)
    return MoeLlavaForConditionalGeneration.from_dense(dense, **{"expert_noise": 1.0, **fields})


def image_batch(batch_size: int = 2, num_text_tokens: int = 7, *, num_padding: int = 0, seed: int = 1) -> dict:
    """An image and text in each sample; the last sample begins with padding."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(5, VOCABULARY, (batch_size, num_text_tokens), generator=generator)
    input_ids = torch.cat([torch.full((batch_size, NUM_IMAGE_TOKENS), IMAGE_TOKEN), text], dim=1)
    attention_mask = torch.ones_like(input_ids)
    if num_padding:
        padding = torch.zeros(batch_size, num_padding, dtype=torch.long)
        own = torch.randint(5, VOCABULARY, (batch_size, num_padding), generator=generator)
        is_last = (torch.arange(batch_size) == batch_size - 1).unsqueeze(1)
        input_ids = torch.cat([torch.where(is_last, padding, own), input_ids], dim=1)
        attention_mask = torch.cat([(~is_last).long().expand(-1, num_padding), attention_mask], dim=1)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": torch.rand(batch_size, 3, 16, 16, generator=generator),
    }


def labels_of(batch: dict) -> torch.Tensor:
    """Every real text token is to be learned."""
    ignored = (batch["attention_mask"] == 0) | (batch["input_ids"] == IMAGE_TOKEN)
    return batch["input_ids"].masked_fill(ignored, -100)


def train(
    model: torch.nn.Module, folder: Path, *, resume_from: str | None = None, num_rows: int = 8, **arguments: Any
) -> transformers.Trainer:
    """Three steps of a plain trainer, or what `arguments` say."""
    batch = image_batch(batch_size=num_rows)
    batch["labels"] = labels_of(batch)
    rows = [{name: tensor[index] for name, tensor in batch.items()} for index in range(num_rows)]
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    callbacks = arguments.pop("callbacks", None)
    arguments = transformers.TrainingArguments(str(folder), **{**settings, **arguments})
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def run_python(*command: object, **variables: str) -> str:
    """What a fresh process prints, which finds this package and these tests."""
    folders = (Path(peft_moe.__file__).parents[1], Path(__file__).parents[1], os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *map(str, command)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-5000:]
    return run.stdout


def tiny_processor() -> transformers.LlavaProcessor:
    """One token per word, images of 16 x 16."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    special = ["<pad>", "<bos>", "<eos>", "<image>", "<unk>"]
    words = [*special, *"abcdefghijklmnopqrstuvwxyz", *(f"w{i}" for i in range(33))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16),
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token="<pad>",
            bos_token="<bos>",
            eos_token="<eos>",
            unk_token="<unk>",
            extra_special_tokens={"image_token": "<image>"},
        ),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
