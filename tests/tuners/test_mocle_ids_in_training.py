"""`cluster_ids` of examples reach every layer in training, by trainers that know nothing of them."""

from __future__ import annotations

import pytest
import torch
from mocle_calls import architecture, wrap
from test_mocle_formula import IDS, SETTINGS, build, layers_of
from transformers import (
    DataCollatorWithPadding,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

from peft_moe import ClusterIdsCollator, MoCLEConfig, record_expert_load
from tiny_models import tiny_llama, tiny_tokenizer, token_batch


def examples(num_rows: int = 8) -> list[dict]:
    batch = token_batch(num_rows, num_padding=0)
    return [{**{k: v[i].tolist() for k, v in batch.items()}, "cluster_ids": i % 6} for i in range(num_rows)]


def spy_on_ids(model) -> list[torch.Tensor]:
    """The ids of every forward pass, as the layers see them."""
    seen = []
    layer = next(iter(layers_of(model).values()))

    def look(module, args):
        seen.append(module.scopes["default"].lookup.of_running_pass(module.recorder.context).ids)

    layer.register_forward_pre_hook(look)
    return seen


def arguments(folder, cls=TrainingArguments, **settings):
    defaults = {"per_device_train_batch_size": 4, "max_steps": 2, "report_to": [], "use_cpu": True}
    defaults |= {"save_strategy": "no", "train_sampling_strategy": "sequential", "disable_tqdm": True}
    return cls(str(folder), **{**defaults, **settings})


class TestTrainers:
    @pytest.mark.parametrize("with_collator", [False, True], ids=["default-collator", "padding-collator"])
    def test_the_unchanged_trainer_hands_them_over(self, tmp_path, with_collator):
        from datasets import Dataset

        model = build()
        seen = spy_on_ids(model)
        dataset = Dataset.from_list([{**row, "note": "to be removed"} for row in examples()])
        collator = {"data_collator": DataCollatorWithPadding(tiny_tokenizer())} if with_collator else {}
        trainer = Trainer(model, arguments(tmp_path), train_dataset=dataset, eval_dataset=dataset, **collator)
        trainer.train()
        assert [ids.tolist() for ids in seen] == [[0, 1, 2, 3], [4, 5, 0, 1]]
        assert trainer.evaluate()["eval_loss"] > 0

    def test_a_model_adapted_by_transformers_trains_too(self, tmp_path):
        base = tiny_llama()
        base.add_adapter(MoCLEConfig(**{**SETTINGS, "task_type": None}))
        before = {name: p.clone() for name, p in base.named_parameters() if "mocle_B" in name}
        Trainer(base, arguments(tmp_path, learning_rate=1e-2), train_dataset=examples()).train()
        after = dict(base.named_parameters())
        assert all(not torch.equal(after[name], value) for name, value in before.items())

    def test_seq2seq_evaluation_generates_with_them(self, tmp_path):
        model = wrap(architecture("t5").build())
        rows = [
            {
                "input_ids": [i % 20 + 2 for i in row["input_ids"]],
                "labels": [3, 4, 5],
                "cluster_ids": row["cluster_ids"],
            }
            for row in examples(4)
        ]
        args = arguments(tmp_path, Seq2SeqTrainingArguments, predict_with_generate=True, generation_max_length=5)
        metrics = Seq2SeqTrainer(model, args, train_dataset=rows, eval_dataset=rows).evaluate()
        assert metrics["eval_loss"] > 0

    def test_a_wrapped_collator_keeps_them(self):
        def collator(rows):
            assert all(set(row) == {"input_ids"} for row in rows)
            return {"input_ids": torch.tensor([row["input_ids"] for row in rows])}

        rows = [{"input_ids": [1, 2], "cluster_ids": 3}, {"input_ids": [4, 5], "cluster_ids": [0, 2]}]
        assert ClusterIdsCollator(collator)(rows)["cluster_ids"].tolist() == [3, 0, 2]
        with pytest.raises(ValueError, match=r"Example 1 .* only \['input_ids'\].*add_cluster_ids"):
            ClusterIdsCollator(collator)([rows[0], {"input_ids": [1, 2]}])

    def test_expert_load_counts_examples(self):
        model = build(top_k=2)
        with record_expert_load(model) as load:
            model(**token_batch(), cluster_ids=IDS)
        counts = load.by_router()
        assert list(counts) == [f"model.layers.{i}" for i in range(3)]
        assert all(sum(of_router) == 4 and len(of_router) == 3 for of_router in counts.values())


@pytest.mark.parametrize("name", ["too few", "float", "missing"])
def test_a_trainer_stops_at_bad_ids_before_the_first_step(tmp_path, name):
    ids = {"too few": None, "float": 0.5, "missing": None}[name]
    rows = [{**row, "cluster_ids": ids} for row in examples()]
    rows = [{k: v for k, v in row.items() if v is not None} for row in rows]
    model = build()
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="cluster_ids"):
        Trainer(model, arguments(tmp_path), train_dataset=rows).train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before))
