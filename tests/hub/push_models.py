"""Run by the tests: pushes every kind of model that a user would push, in every way, and notes what each computes."""

from __future__ import annotations

import torch
from huggingface_hub import HfApi, ModelCard
from outcomes import FOLDER, error_of, expect, finish
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from conformance.tuner_cases import CASES, TunerCase
from models.tiny_llava import image_batch, tiny_llava, tiny_processor
from peft_moe import InstructionClusterer, MoeLlavaForConditionalGeneration, export_all


BY_NAME = {case.name: case for case in CASES}
PUSHED = {"mole": "mole-top-2-weighted", "mocle": "mocle-with-centroids", "moextend": "moextend"}
api = HfApi()


def adapted(name: str) -> tuple[TunerCase, PeftModel]:
    """A base model from the Hub with an adapter."""
    case = BY_NAME[PUSHED[name]]
    base = AutoModelForCausalLM.from_pretrained("someone/mixtral" if name == "moextend" else "someone/llama")
    torch.manual_seed(7)
    return case, get_peft_model(base, case.config()).eval()


def as_saved(model: PreTrainedModel, name: str) -> PreTrainedModel:
    """The same weights, mapped from a file as those from the Hub: alignment in memory can change last bits."""
    model.save_pretrained(FOLDER / name)
    loaded = type(model).from_pretrained(FOLDER / name)
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    return loaded


def change(model: PeftModel) -> None:
    """Other weights, as after more training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)


def push_each_tuner(notes: dict) -> None:
    for name in PUSHED:
        case, model = adapted(name)
        expect(name, model, case.batch())
        model.push_to_hub(f"someone/{name}")
        model.save_pretrained(FOLDER / name)


def push_a_newer_version(notes: dict) -> None:
    case, model = adapted("mole")
    expect("versions-old", model, case.batch())
    model.push_to_hub("someone/versions")
    change(model)
    expect("versions-new", model, case.batch())
    model.push_to_hub("someone/versions")
    change(model)
    expect("versions-branch", model, case.batch())
    model.push_to_hub("someone/versions", revision="experiment")


def push_two_adapters(notes: dict) -> None:
    case, model = adapted("mole")
    expect("two-default", model, case.batch())
    model.add_adapter("other", case.other_config())
    model.set_adapter("other")
    expect("two-other", model, case.batch())
    model.push_to_hub("someone/two", private=True)


def upload_a_folder(notes: dict) -> None:
    """The card of this package; pushing the model afterwards keeps it."""
    case, model = adapted("mocle")
    model.save_pretrained(FOLDER / "uploaded")
    api.create_repo("someone/uploaded")
    api.upload_folder(repo_id="someone/uploaded", folder_path=FOLDER / "uploaded")
    change(model)
    expect("uploaded", model, case.batch())
    model.push_to_hub("someone/uploaded")


def upload_on_a_local_base(notes: dict) -> None:
    """The Hub refuses a card that names a folder as the base model."""
    case = BY_NAME[PUSHED["mole"]]
    case.model().save_pretrained(FOLDER / "local-base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(FOLDER / "local-base"), case.config())
    model.save_pretrained(FOLDER / "on-local-base")
    api.create_repo("someone/on-local-base")
    api.upload_folder(repo_id="someone/on-local-base", folder_path=FOLDER / "on-local-base")


class WaitForPush(TrainerCallback):
    """Uploads run beside the training; waiting for each makes the commits those of the checkpoints."""

    trainer: Trainer

    def on_save(self, *args, **kwargs):
        self.trainer.push_in_progress.wait_until_done()


def train_and_push(notes: dict) -> None:
    case, model = adapted("mole")
    before = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = [{name: value[i] for name, value in case.batch().items()} for i in range(2)]
    arguments = TrainingArguments(
        str(FOLDER / "trained"),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        push_to_hub=True,
        hub_model_id="someone/trained",
        hub_strategy="every_save",
        hub_always_push=True,
    )
    wait = WaitForPush()
    wait.trainer = trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[wait])
    trainer.train()
    trainer.push_to_hub()
    notes["trained parameters that moved"] = sum(
        not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before
    )
    expect("trained-step-4", model, case.batch())
    base = AutoModelForCausalLM.from_pretrained("someone/llama")
    expect("trained-step-2", PeftModel.from_pretrained(base, FOLDER / "trained" / "checkpoint-2"), case.batch())


def train_on_a_local_base(notes: dict) -> None:
    case = BY_NAME[PUSHED["mole"]]
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(FOLDER / "local-base"), case.config())
    arguments = TrainingArguments(
        str(FOLDER / "trained-on-local-base"), report_to=[], use_cpu=True, hub_model_id="someone/trained-on-local-base"
    )
    notes["trained on a local base"] = error_of(Trainer(model, arguments).push_to_hub)


def push_what_needs_no_plugin(notes: dict) -> None:
    case, model = adapted("mocle")
    first = export_all(model, FOLDER / "exported")[0]
    api.create_repo("someone/exported")
    api.upload_folder(repo_id="someone/exported", folder_path=FOLDER / "exported")
    batch = {name: value for name, value in case.batch().items() if name != "cluster_ids"}
    base = AutoModelForCausalLM.from_pretrained("someone/llama")
    exported = expect("exported", PeftModel.from_pretrained(base, first), batch)
    with torch.no_grad():
        routed = model(**batch, cluster_ids=torch.zeros(2, dtype=torch.long)).logits
    notes["export differs by"] = (exported - routed).abs().max().item()

    case, model = adapted("moextend")
    merged = model.merge_and_unload()
    expect("extended", as_saved(merged, "extended"), case.batch())
    merged.push_to_hub("someone/extended")


def push_moe_llava(notes: dict) -> None:
    model = MoeLlavaForConditionalGeneration.from_dense(tiny_llava(), expert_noise=1.0).eval()
    expect("moe-llava", as_saved(model, "moe-llava"), image_batch())
    model.push_to_hub("someone/moe-llava")
    tiny_processor().push_to_hub("someone/moe-llava")


def push_clusters(notes: dict) -> None:
    centroids = torch.randn(6, 5, generator=torch.Generator().manual_seed(3))
    InstructionClusterer(centroids, encoder="an/encoder").push_to_hub("someone/clusters")


def check_cards(notes: dict) -> None:
    """As `huggingface_hub` does it, with the server's rules."""
    cards = notes["cards"] = {}
    saved = [
        FOLDER / name / "README.md" for name in (*PUSHED, "uploaded", "on-local-base", "exported/cluster_0", "trained")
    ]
    # that of a whole model is written while it is pushed
    for place in (*saved, "someone/extended", "someone/moe-llava"):
        cards[str(place)] = error_of(ModelCard.load(place).validate)


def main() -> None:
    torch.set_num_threads(1)
    BY_NAME[PUSHED["mole"]].model().push_to_hub("someone/llama")
    BY_NAME[PUSHED["moextend"]].model().push_to_hub("someone/mixtral")
    notes: dict = {}
    for push in (
        push_each_tuner,
        push_a_newer_version,
        push_two_adapters,
        upload_a_folder,
        upload_on_a_local_base,
        train_and_push,
        train_on_a_local_base,
        push_what_needs_no_plugin,
        push_moe_llava,
        push_clusters,
        check_cards,
    ):
        push(notes)
    finish(notes)


main()
