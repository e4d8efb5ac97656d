"""MoExtend on text: a mixture of experts that knows one domain gets new experts for another, and is asked about both.

    python examples/moextend/train.py --small                     # a tiny untrained model, two minutes on one core
    python examples/moextend/train.py                             # SmolLM2-135M, for a GPU

1. Base: a dense language model is upcycled to a Mixtral (4 experts, top-2) and trained on the old domain. 2.
Extension: the Extender measures which layers choose other experts for the new domain. 3. Fine-tuning on the new
domain, with equal steps: MoExtend in the layers of the Extender, in the first half and in every
   second layer; all weights; LoRA on the experts.

Reported on held-back rows: what the new domain gains and what the old one loses. An interrupted run goes on.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    set_seed,
)

from peft_moe import Extender, ExtenderReport


sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
from arms import ARMS, Comparison, adapted, config_of, free_memory, num_trained, train  # noqa: E402

from domains import DOMAINS, collator, load_domains  # noqa: E402
from evaluation import evaluate_answers  # noqa: E402
from pretrained import smollm2_path  # noqa: E402


DEFAULT = {
    "base_steps": 200,
    "extender_steps": 100,
    "steps": 100,
    "rows": 300,
    "eval_rows": 64,
    "batch_size": 8,
    "max_length": 192,
}
SMALL = {
    "base_steps": 40,
    "extender_steps": 8,
    "steps": 12,
    "rows": 64,
    "eval_rows": 8,
    "batch_size": 4,
    "max_length": 128,
}
# not tuned: what an arm gets in a comparison that means something has to be searched for each of them
LEARNING_RATES = {"base": 3e-4, "full": 1e-4, "lora_experts": 1e-3}
MOEXTEND_LEARNING_RATE = 5e-4
KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/moextend")
    parser.add_argument("--model_name_or_path", default=None, help="a dense Llama; default: SmolLM2-135M")
    parser.add_argument(
        "--small", action="store_true", help="a tiny untrained model instead, and fewer steps and rows"
    )
    parser.add_argument("--old_domain", default="commonsense_qa", choices=DOMAINS)
    parser.add_argument("--new_domain", default="mmlu_clinical", choices=DOMAINS)
    parser.add_argument("--num_experts", type=int, default=4)
    parser.add_argument("--expert_noise", type=float, default=0.1, help="of the copies, in their standard deviations")
    parser.add_argument("--lora_rank", type=int, default=16)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    for name, value in DEFAULT.items():
        parser.add_argument(f"--{name}", type=int, default=None, help=f"default: {value}; small: {SMALL[name]}")
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier run has left")
    options = parser.parse_args()
    for name, value in (SMALL if options.small else DEFAULT).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    settings = {n: v for n, v in vars(options).items() if n not in ("arms", "seeds", "restart", "output_dir")}
    comparison = Comparison(Path(options.output_dir), settings, restart=options.restart)
    run = Run(options, comparison.output)

    comparison.once("base", run.make_base)
    found = ExtenderReport.from_dict(comparison.once("extender", run.measure_shift))
    for seed in options.seeds:
        for arm in options.arms:
            comparison.once(f"{arm}/{seed}", lambda arm=arm, seed=seed: run.fine_tune(arm, found, seed))
            free_memory()
    comparison.write(
        f"MoExtend: from {options.old_domain} to {options.new_domain}",
        "Answer NLL in nats per token, held-back rows; a gain is a fall on the new domain, a loss a rise on the old.",
        comparison.table("answer_nll"),
    )


class Run:
    """The stages, on one tokenizer and one split of the data."""

    def __init__(self, options: argparse.Namespace, output: Path) -> None:
        self.options, self.output = options, output
        self.model_path = options.model_name_or_path or str(smollm2_path())
        self.tokenizer = AutoTokenizer.from_pretrained(self.model_path)
        self.collate = collator(self.tokenizer)
        self.old, self.old_test = self._load(options.old_domain)
        self.new, self.new_test = self._load(options.new_domain)

    def _load(self, domain: str) -> tuple[Any, Any]:
        rows, held_back = load_domains(
            self.tokenizer,
            domains=(domain,),
            rows_per_domain=self.options.rows,
            eval_rows_per_domain=self.options.eval_rows,
            max_length=self.options.max_length,
        )
        return rows.select_columns(["input_ids", "attention_mask", "labels"]), held_back[domain]

    def make_base(self) -> dict[str, Any]:
        """Upcycle, train on the old domain, save."""
        set_seed(0)
        model = upcycle(self._dense(), num_experts=self.options.num_experts, expert_noise=self.options.expert_noise)
        losses = self._train(model, self.old, self.options.base_steps, LEARNING_RATES["base"], seed=0)
        model.save_pretrained(self.output / "base")
        return {**self._scores(model), "losses": losses}

    def measure_shift(self) -> dict[str, Any]:
        """Three quarters of the rows tune the routers, the rest is the probe set."""
        rows = self.new.train_test_split(test_size=0.25, seed=0)
        extender = Extender(self._base(), self.tokenizer)
        report = extender.measure(
            rows["train"], rows["test"], steps=self.options.extender_steps, batch_size=self.options.batch_size
        )
        return report.to_dict()

    def fine_tune(self, arm: str, found: ExtenderReport, seed: int) -> dict[str, Any]:
        """Train one arm on the new domain and ask it about both."""
        set_seed(seed)
        config = config_of(arm, found, rank=self.options.lora_rank, task_type="CAUSAL_LM")
        model = adapted(self._base(), config)
        result = {"trained_parameters": num_trained(model), "layers": getattr(config, "layers", None)}
        learning_rate = LEARNING_RATES.get(arm, MOEXTEND_LEARNING_RATE)
        result["losses"] = self._train(model, self.new, self.options.steps, learning_rate, seed=seed)
        return {**result, **self._scores(model)}

    def _dense(self) -> PreTrainedModel:
        if not self.options.small or self.options.model_name_or_path is not None:
            return AutoModelForCausalLM.from_pretrained(self.model_path, dtype=torch.float32)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=4,
                num_attention_heads=4,
                max_position_embeddings=512,
                tie_word_embeddings=True,
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
            )
        )

    def _base(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.output / "base", dtype=torch.float32)

    def _train(self, model: Any, rows: Any, steps: int, learning_rate: float, *, seed: int) -> list[float]:
        # Mixtral balances its own routers where they train
        trains_routers = any(p.requires_grad and n.endswith("gate.weight") for n, p in model.named_parameters())
        model.config.output_router_logits = trains_routers
        losses = train(
            model,
            rows,
            self.collate,
            self.output / "trainer",
            steps=steps,
            batch_size=self.options.batch_size,
            learning_rate=3e-3 if self.options.small else learning_rate,
            seed=seed,
        )
        model.config.output_router_logits = False
        return losses

    def _scores(self, model: Any) -> dict[str, float]:
        sets = {self.options.old_domain: self.old_test, self.options.new_domain: self.new_test}
        found = evaluate_answers(model.to("cpu"), self.tokenizer, sets, num_generated_rows=self.options.eval_rows)
        names = {"old": self.options.old_domain, "new": self.options.new_domain}
        return {
            f"{metric}_{side}": found[f"{metric}_{domain}"]
            for metric in ("answer_nll", "exact_match")
            for side, domain in names.items()
            if f"{metric}_{domain}" in found
        }


def upcycle(dense: LlamaForCausalLM, *, num_experts: int, expert_noise: float) -> MixtralForCausalLM:
    """A Mixtral whose experts begin as copies of the dense MLPs; without noise it computes what the dense model does.

    Args:
        dense (`LlamaForCausalLM`)
        num_experts (`int`): per layer; each token visits 2.
        expert_noise (`float`): width of the normal noise on each copied matrix, in its own standard deviation.
    """
    fields = {name: getattr(dense.config, name) for name in KEPT if hasattr(dense.config, name)}
    config = MixtralConfig(
        **fields, num_local_experts=num_experts, num_experts_per_tok=2, sliding_window=None, router_aux_loss_coef=0.01
    )
    sparse = MixtralForCausalLM(config).to(dense.dtype)
    kept = {name: tensor for name, tensor in dense.state_dict().items() if ".mlp." not in name}
    sparse.load_state_dict(kept, strict=False)
    with torch.no_grad():
        for old, new in zip(dense.model.layers, sparse.model.layers, strict=True):
            experts = new.mlp.experts
            experts.gate_up_proj.copy_(torch.cat([old.mlp.gate_proj.weight, old.mlp.up_proj.weight]))
            experts.down_proj.copy_(old.mlp.down_proj.weight)
            for weight in (experts.gate_up_proj, experts.down_proj):
                weight.add_(torch.randn_like(weight), alpha=expert_noise * weight[0].std().item())
    sparse.generation_config = dense.generation_config
    return sparse


if __name__ == "__main__":
    main()
