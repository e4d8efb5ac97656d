"""Data of `mole_defaults.py`: rows of four instruction domains, split, tokenized and batched."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
from mole_defaults_arms import Sizes


DOMAINS = ("commonsense_qa", "boolq", "mmlu_clinical", "truthful_qa")
END, PAD = "<|end|>", "<|pad|>"


Row = tuple[list[int], int]  # token ids, how many of them are the prompt


@dataclass(frozen=True)
class Texts:
    """The rows of each domain, split once for all arms and seeds."""

    train: dict[str, list[dict[str, str]]]
    validation: dict[str, list[dict[str, str]]]
    test: dict[str, list[dict[str, str]]]


def read_domains(folder: Path, sizes: Sizes) -> Texts:
    """Rows with the same instruction stay on one side of the split."""
    texts = Texts({}, {}, {})
    for domain in DOMAINS:
        rows = [json.loads(line) for line in (folder / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()]
        instructions = sorted({row["instruction"] for row in rows})
        random.Random(0).shuffle(instructions)
        unique = {row["instruction"]: row for row in rows}
        held_back = sizes.test_rows + sizes.validation_rows
        texts.test[domain] = [unique[text] for text in instructions[: sizes.test_rows]]
        texts.validation[domain] = [unique[text] for text in instructions[sizes.test_rows : held_back]]
        train = set(instructions[held_back:])
        texts.train[domain] = [row for row in rows if row["instruction"] in train]
    return texts


def train_tokenizer(texts: Texts, vocab: int) -> tokenizers.Tokenizer:
    """Byte-level BPE, learnt on the training rows."""
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    lines = [part for rows in texts.train.values() for row in rows for part in row.values()]
    tokenizer.train_from_iterator(lines, vocab_size=vocab, special_tokens=[PAD, END], show_progress=False)
    return tokenizer


def pretraining_documents(texts: Texts) -> list[list[str]]:
    """Questions, passages and options without their headers, and answers without their questions."""
    documents = []
    for domain in DOMAINS:
        for row in texts.train[domain]:
            documents.append(row["instruction"].split("\n")[1:])
            documents.append([row["answer"]])
    return documents


def encode(row: dict[str, str], tokenizer: tokenizers.Tokenizer, max_length: int) -> Row:
    """A prompt that is too long loses the middle: its header, and its end with the question, stay."""
    header, body = row["instruction"].split("\n", 1)
    answer = tokenizer.encode(" " + row["answer"]).ids[: max_length // 2] + [tokenizer.token_to_id(END)]
    first = tokenizer.encode(header + "\n").ids
    rest = tokenizer.encode(body + "\nAnswer:").ids
    room = max_length - len(first) - len(answer)
    prompt = first + rest[-room:]
    return prompt + answer, len(prompt)


def collate(rows: list[Row]) -> dict[str, Any]:
    """Padded on the left, so that all answers end together and logits are only computed there."""
    longest = max(len(ids) for ids, _ in rows)
    keep = 1 + max(len(ids) - prompt for ids, prompt in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    labels = torch.full((len(rows), keep), -100)
    for index, (ids, prompt) in enumerate(rows):
        input_ids[index, -len(ids) :] = torch.tensor(ids)
        mask[index, -len(ids) :] = 1
        labels[index, prompt - len(ids) :] = torch.tensor(ids[prompt:])
    return {"input_ids": input_ids, "attention_mask": mask, "labels": labels, "logits_to_keep": keep}


class Batches:
    """Endless batches with the same number of rows of each domain; the order depends on the seed alone."""

    def __init__(self, rows: dict[str, list[Row]], rows_per_domain: int, seed: int) -> None:
        self.rows, self.rows_per_domain = rows, rows_per_domain
        self.random = {domain: random.Random(f"{seed} {domain}") for domain in rows}
        self.queues: dict[str, list[Row]] = {domain: [] for domain in rows}

    def next(self) -> dict[str, Any]:
        """One batch."""
        return collate([self._draw(domain) for domain in self.rows for _ in range(self.rows_per_domain)])

    def _draw(self, domain: str) -> Row:
        if not self.queues[domain]:
            self.queues[domain] = list(self.rows[domain])
            self.random[domain].shuffle(self.queues[domain])
        return self.queues[domain].pop()
