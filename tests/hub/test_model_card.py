"""The card beside a saved adapter says what the adapter is, and how to load it; in words that the Hub takes."""

from __future__ import annotations

import re
from pathlib import Path

import peft
import pytest
from hub_server import card_problems
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING

import peft_moe
from conformance.tuner_cases import every_tuner, one_case_per_tuner
from peft_moe import MoLEConfig
from peft_moe.tuners.card import HEADING
from tiny_models import tiny_llama


BASE = "someone/base"


def save(model: PeftModel, folder: Path, *, base: str | None = BASE) -> ModelCard:
    """The card of an adapter on a base model of that name."""
    model.get_base_model().config._name_or_path = base or ""
    model.get_base_model().name_or_path = base or ""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    model.save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def section_of(card: ModelCard) -> str:
    """What this package wrote."""
    return card.text.partition(HEADING)[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("card", "problem"),
    [
        ("---\nbase_model: [someone/base, gpt2]\ntags: [a, b]\n---\n", None),
        ("---\nbase_model: /a/folder\n---\n", '"base_model" with value "/a/folder" is not valid'),
        ("---\ntags: [1]\n---\n", '"tags" must be an array'),
        ("---\nlibrary_name: [peft]\n---\n", '"library_name" must be a string'),
        ("---\na: [\n---\n", "invalid YAML"),
    ],
)
def test_the_hub_of_the_tests_knows_the_rules_for_cards(card, problem):
    problems = card_problems(card)
    assert (problems == []) if problem is None else (len(problems) == 1 and problem in problems[0])


@every_tuner
def test_metadata_are_taken_by_the_hub_and_name_no_licence(case, tmp_path):
    card = save(case.wrap(), tmp_path)
    assert card_problems(card.content) == []
    assert (card.data.library_name, card.data.base_model, card.data.license) == ("peft", BASE, None)
    assert {"peft_moe", case.tuner, f"base_model:adapter:{BASE}"} <= set(card.data.tags)


@every_tuner
def test_the_table_lists_the_settings(case, tmp_path):
    model = case.wrap()
    section = section_of(save(model, tmp_path))
    config = model.peft_config["default"]
    assert config.paper_url in section
    words = {None: "–", True: "yes", False: "no"}
    for name in config.card_fields:
        value = getattr(config, name)
        shown = words[value] if value is None or isinstance(value, bool) else str(value)
        assert re.search(rf"^\| \S.* \| `{name}` \| {re.escape(shown)} \|$", section, re.MULTILINE)
    assert section.count("\n| ") == 1 + len(config.card_fields)


@one_case_per_tuner
def test_the_section_takes_the_place_of_an_empty_one_of_the_template(case, tmp_path):
    card = save(case.wrap(), tmp_path)
    assert card.text.count(HEADING) == 1
    assert "How to Get Started with the Model" not in card.text
    assert card.text.index(HEADING) < card.text.index("## Training Details")


@one_case_per_tuner
def test_the_code_of_the_card_runs(case, tmp_path):
    model = case.wrap()
    case.model().save_pretrained(tmp_path / "base")
    expected = case.logits(model)
    code = section_of(save(model, tmp_path / "adapter")).split("```")[1].removeprefix("python\n")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace(BASE, str(tmp_path / "base")))
    names: dict = {}
    exec(code.replace("<this repository>", str(tmp_path / "adapter")), names)
    assert names["peft_moe"] is peft_moe
    assert type(names["model"]) is type(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter"))
    assert case.logits(names["model"].eval()).equal(expected)


@pytest.mark.parametrize("task_type", [*MODEL_TYPE_TO_PEFT_MODEL_MAPPING, None], ids=str)
def test_the_auto_class_is_that_of_the_task(task_type, tmp_path):
    (tmp_path / "README.md").write_text(f"---\nlibrary_name: peft\nbase_model: {BASE}\n---\n")
    MoLEConfig(task_type=task_type).save_pretrained(tmp_path)
    (name,) = re.findall(r"^model = (\w+)\.from_pretrained", (tmp_path / "README.md").read_text(), re.MULTILINE)
    assert getattr(peft, name)._target_peft_class is MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(task_type, PeftModel)


@pytest.mark.parametrize("base", ["/a/folder", "./folder", None], ids=["absolute", "relative", "unknown"])
def test_a_base_model_that_is_not_on_the_hub_is_not_named(base, tmp_path):
    card = save(get_peft_model(tiny_llama(), MoLEConfig(task_type="CAUSAL_LM")), tmp_path, base=base)
    assert card_problems(card.content) == []
    assert card.data.base_model is None
    assert {"peft_moe", "mole"} <= set(card.data.tags)
    assert not any(tag.startswith("base_model:") for tag in card.data.tags)
    assert "PeftModel.from_pretrained(base_model, " in card.text
    assert base is None or base not in card.content


def test_a_folder_is_no_id_though_it_looks_like_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("someone/base").mkdir(parents=True)
    assert save(get_peft_model(tiny_llama(), MoLEConfig()), tmp_path / "adapter").data.base_model is None


def test_saving_again_changes_nothing_but_what_peft_fills_in(tmp_path):
    model = get_peft_model(tiny_llama(), MoLEConfig(task_type="CAUSAL_LM"))
    save(model, tmp_path)
    file = tmp_path / "README.md"
    file.write_text(file.read_text().replace("# Model Card for Model ID", "# Mine"))
    edited = file.read_text()
    save(model, tmp_path)
    assert file.read_text() == edited


def test_a_card_of_the_users_own_gets_the_section_at_its_end(tmp_path):
    tmp_path.joinpath("README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n\nWords.\n")
    card = save(get_peft_model(tiny_llama(), MoLEConfig(task_type="CAUSAL_LM")), tmp_path)
    assert card.data.license == "mit"
    assert card.text.index("Words.") < card.text.index(HEADING)


def test_an_adapter_of_another_name_is_loaded_from_its_subfolder(tmp_path):
    model = get_peft_model(tiny_llama(), MoLEConfig(task_type="CAUSAL_LM"), adapter_name="words")
    card = save(model, tmp_path)
    assert 'from_pretrained("<this repository>", subfolder="words")' in section_of(card)
    assert not (tmp_path / "words" / "README.md").exists()


def test_the_card_of_another_project_in_the_folder_above_is_left_alone(tmp_path):
    file = tmp_path / "README.md"
    for content in (
        "# A project\n",
        "---\nlibrary_name: peft\n---\n# Another adapter\n",
        "---\na: [\n---\n# Broken\n",
    ):
        file.write_text(content)
        MoLEConfig(base_model_name_or_path=BASE).save_pretrained(tmp_path / "adapter")
        assert file.read_text() == content


def test_a_second_save_brings_the_table_up_to_date_and_keeps_what_was_written_beside_it(tmp_path):
    for num_experts in (3, 5):
        card = save(get_peft_model(tiny_llama(), MoLEConfig(num_experts=num_experts, r=2)), tmp_path)
        assert f"| `num_experts` | {num_experts} |" in card.text
        if num_experts == 3:
            file = tmp_path / "README.md"
            file.write_text(file.read_text().replace(HEADING, f"{HEADING}\n\nA word of mine."))
    assert card.text.count(HEADING) == card.text.count("| setting | field | value |") == 1
    assert "A word of mine." in card.text
