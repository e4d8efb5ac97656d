"""Completes the model card that PEFT writes beside an adapter: what the adapter is, and how to load it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


CARD_FILE = "README.md"
HEADING = "## How to load this adapter"
PLACEHOLDER = """## How to Get Started with the Model

Use the code below to get started with the model.

[More Information Needed]
"""
"""What PEFT's template says where this section belongs."""
HOW_PEFT_KNOWS_IT = "`import peft_moe` (`pip install peft-moe`) makes it known to PEFT"
TABLE_HEAD = "| setting | field | value |"
TABLE = re.compile(rf"^{re.escape(TABLE_HEAD)}\n(?:\|.*\n?)+", re.MULTILINE)
REPOSITORY = '"<this repository>"'
AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}


class AdapterFacts(NamedTuple):
    """What a card says about an adapter."""

    method: str
    paper_url: str
    task_type: str
    settings: list[tuple[str, str, Any]]
    """meaning, field and value"""


def is_hub_id(name: str) -> bool:
    """Whether a base model is named as on the Hub, and not by a folder."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def complete_model_card(folder: str | Path, facts: AdapterFacts) -> None:
    """Add a section to the card of an adapter, or bring its table up to date; nothing where PEFT has written no card.

    PEFT writes the card into the folder of the adapter `default`; any other one is saved in a subfolder of its name,
    and the card in the folder above speaks of the first of them. The Hub refuses a card whose base model is no id, so
    that a folder is not named as one.
    """
    folder, subfolder = Path(folder), None
    if not (folder / CARD_FILE).is_file():
        folder, subfolder = folder.parent, folder.name
        if not _is_of_peft(folder / CARD_FILE):
            return
    card = ModelCard.load(folder / CARD_FILE)
    base = card.data.base_model
    on_hub = isinstance(base, str) and is_hub_id(base)
    if isinstance(base, str) and not on_hub:
        card.data.base_model = None
        card.data.tags = [tag for tag in card.data.tags or [] if tag != f"base_model:adapter:{base}"]
    section = _section(facts, subfolder, on_hub=on_hub)
    if HEADING in card.text:
        if subfolder is None:
            before, heading, rest = card.text.partition(HEADING)
            card.text = before + heading + TABLE.sub(lambda _: _table(facts) + "\n", rest, count=1)
    elif PLACEHOLDER in card.text:
        card.text = card.text.replace(PLACEHOLDER, section)
    else:
        card.text = f"{card.text.rstrip()}\n\n{section}"
    card.save(folder / CARD_FILE)


def _is_of_peft(file: Path) -> bool:
    """A folder above may hold a text of something else, which is not touched, nor read as metadata."""
    if not file.is_file():
        return False
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return {"library_name: peft", "- peft_moe"} <= set(lines)


def _section(facts: AdapterFacts, subfolder: str | None, *, on_hub: bool) -> str:
    where = REPOSITORY if subfolder is None else f'{REPOSITORY}, subfolder="{subfolder}"'
    if on_hub:
        auto_class = AUTO_CLASSES.get(facts.task_type, "AutoPeftModel")
        code = f"from peft import {auto_class}\n\nmodel = {auto_class}.from_pretrained({where})"
        remark = ""
    else:
        code = f"from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(base_model, {where})"
        remark = (
            "\nThe base model came from no repository, so this card does not name it. If it has one by now, write its "
            "id into\n`base_model` at the head of this card and into `base_model_name_or_path` of "
            "`adapter_config.json`.\n"
        )
    return f"""{HEADING}

This is a [{facts.method}]({facts.paper_url}) adapter. {HOW_PEFT_KNOWS_IT}:

```python
import peft_moe
{code}
```
{remark}
{_table(facts)}
"""


def _table(facts: AdapterFacts) -> str:
    rows = [f"| {meaning} | `{name}` | {_cell(value)} |" for meaning, name, value in facts.settings]
    return "\n".join([TABLE_HEAD, "|---|---|---|", *rows])


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return str(value).replace("|", "\\|")
