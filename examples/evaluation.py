"""How well a causal language model answers: NLL of the right answers, and exact match of what it generates."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import evaluate
import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from domains import CLOSED_DOMAINS, collator
from peft_moe import metrics
from peft_moe.monitoring import ExpertLoad, record_expert_load


def evaluate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    eval_sets: dict[str, Dataset],
    *,
    num_generated_rows: int,
    batch_size: int = 8,
    max_new_tokens: int = 12,
    expert_load: ExpertLoad | None = None,
) -> dict[str, float]:
    """Answer NLL (nats per token) on all rows, exact match (0 to 1) on the first rows of the closed-answer domains.

    Where `expert_load` is given, it counts which experts the tokens of each domain go to.
    """
    model.eval()
    nll = evaluate.load(metrics.path("answer_nll"))
    match = evaluate.load(metrics.path("exact_match_by_domain"))
    for domain, rows in eval_sets.items():
        watching = nullcontext() if expert_load is None else record_expert_load(model, domain, into=expert_load)
        with watching:
            for batch in _batches(rows, tokenizer, batch_size, f"answer NLL, {domain}"):
                sums, counts = _answer_nll(model, batch)
                nll.add_batch(predictions=sums, references=counts, domains=[domain] * len(sums))
        if domain in CLOSED_DOMAINS:
            few = rows.select(range(min(num_generated_rows, len(rows))))
            answers = _generate(model, tokenizer, few["prompt"], batch_size, max_new_tokens, domain)
            match.add_batch(predictions=answers, references=few["answer"], domains=[domain] * len(answers))
    return {**nll.compute(), **match.compute()}


def _batches(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, batch_size: int, description: str
) -> Iterator[dict[str, Any]]:
    collate = collator(tokenizer)
    columns = ["input_ids", "attention_mask", "labels"]
    for start in tqdm(range(0, len(rows), batch_size), desc=description, leave=False):
        chunk = rows.select(range(start, min(start + batch_size, len(rows))))
        yield collate([{name: row[name] for name in columns} for row in chunk])


def _answer_nll(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[list[float], list[int]]:
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    return losses.sum(dim=1).tolist(), labels.ne(-100).sum(dim=1).tolist()


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    batch_size: int,
    max_new_tokens: int,
    domain: str,
) -> list[str]:
    answers = []
    prompts = list(prompts)
    for start in tqdm(range(0, len(prompts), batch_size), desc=f"answers, {domain}", leave=False):
        inputs = tokenizer(
            prompts[start : start + batch_size],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        with torch.no_grad():
            tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answers += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers
