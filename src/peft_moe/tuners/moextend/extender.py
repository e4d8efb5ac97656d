"""The Extender of MoExtend: measures which layers of a mixture of experts want other experts for new data."""

from __future__ import annotations

import copy
import inspect
import logging
import math
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm.auto import tqdm
from transformers import DataCollatorForLanguageModeling, DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from ...foreign_moe import BASE, MoeBlock, configs_of, find_moe_blocks, listen_to_routers, probe
from ...forward_context import ForwardPass
from ...routing_recorder import statistics_of
from ..config import is_number, is_positive_int
from .report import ExtenderReport


if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


logger = logging.getLogger(__name__)

COEF, FLAG = "router_aux_loss_coef", "output_router_logits"
NOISE = 1e-7
"""a router's gradient whose norm is below is what rounding leaves of 0; Adam would make a full step of it"""
WARMUP_SHARE = 0.03
SHARDED = (
    "The Extender cannot measure a model that deepspeed or fsdp shards, since it trains a copy of the routers beside the weights "
    "of the model. Launch with torchrun alone, and leave both out of args."
)


class Extender:
    """Measures in which layers the choice of experts shifts on new data, so that those get new experts.

    Stage 2 of MoExtend (https://huggingface.co/papers/2408.03511): the model as it is (κ) and the same with routers tuned on
    the new data (κ') both run over a probe set, and each layer's expert counts are compared, see
    [`~peft_moe.tuners.moextend.report.selection_shift`]. Counts are those of the top-k choice; the released code
    counts the least likely experts instead.

    Works with every model whose mixtures of experts [`MoExtendConfig`] can extend, on text and on images with text. Align
    a new modality (the projector) first.

    Args:
        model (`nn.Module`): a model with a head, without adapters. [`measure`] leaves it as it found it.
        processing_class (`PreTrainedTokenizerBase` or a processor, *optional*):
            Pads batches where [`measure`] gets no `data_collator`.

    Raises:
        ValueError: the model has no mixture of experts that can be extended, carries adapters, is quantised, lies on the
            meta device (offloading included), or is wrapped for distributed training.

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from peft_moe import Extender

    >>> report = Extender(model, tokenizer).measure(train_set, probe_set, steps=1000)
    >>> print(report)
    >>> model = get_peft_model(model, report.choose_layers(p=0.5, task_type="CAUSAL_LM"))
    ```
    """

    def __init__(self, model: nn.Module, processing_class: PreTrainedTokenizerBase | Any | None = None) -> None:
        _check_model(model)
        self.model = model
        self.processing_class = processing_class
        self._blocks = _known_blocks(model)

    def measure(
        self,
        train_set: Any,
        probe_set: Any,
        steps: int = 1000,
        *,
        learning_rate: float = 1e-3,
        batch_size: int = 8,
        router_aux_loss_coef: float | None = None,
        data_collator: Any | None = None,
        args: TrainingArguments | None = None,
        keep_tuned_router: bool = False,
    ) -> ExtenderReport:
        """Tune the routers alone, and compare which experts are chosen before and after.

        What trains is a copy of the model with routers of its own, whose other weights lie in the memory of the model. So
        the model stays as it is, to the bit, also after an error or an interruption; and so do the random states of Python,
        numpy and torch. Under `torchrun` the `Trainer` trains on all processes, each counts its part of the probe set, and
        all get the same report.

        Args:
            train_set (`Dataset`), probe_set (`Dataset`):
                What a `Trainer` takes, both from the new domain. They should not overlap; the paper probes with 10,000
                examples.
            steps (`int`): of the optimizer. Paper: 1000.
            learning_rate (`float`): at its peak; cosine, after 3% of the steps to warm up. Released code: 1e-3.
            batch_size (`int`): per device, also for the probe set. The paper does not name one for this stage.
            router_aux_loss_coef (`float`, *optional*):
                Weight of the model's own load-balancing loss while the routers are tuned. By default that of the model's
                configuration, whether or not it says `output_router_logits`: the released code balances too (0.001). Part
                of the shift can then be a drift to balance; 0 turns that off. Models without such a loss use none.
            data_collator (`Callable`, *optional*):
                By default one that pads, for a causal language model, and stacks what is not text (`pixel_values`).
            args (`TrainingArguments`, *optional*):
                All else about training: device, precision, seed, schedule. `steps`, `learning_rate` and `batch_size` take
                the place of its own, and nothing is saved or evaluated. Columns that `forward` does not know are dropped
                unless `remove_unused_columns=False`.
            keep_tuned_router (`bool`):
                Leave the tuned routers in the model (released code, whose extended models build on κ'). The paper extends
                κ, the default.

        Raises:
            ValueError: a data set is empty, a probe set without tokens, an argument makes no sense, or `args` shards the
                model.
            FloatingPointError: the loss or a router is not finite.
            RuntimeError: no router has changed, or the training set ended too early.
        """
        _check_arguments(train_set, probe_set, steps, learning_rate, batch_size, router_aux_loss_coef)
        original = self._routers(self.model)
        model = _twin(self.model, {id(parameter) for found in original.values() for parameter in found})
        routers = self._routers(model)
        with _same_random_state(), tempfile.TemporaryDirectory(prefix="extender-") as folder:
            args = training_arguments(args, folder, steps, learning_rate, batch_size)
            for parameter in (parameter for found in routers.values() for parameter in found):
                parameter.requires_grad_(True)
            collator = data_collator or self._collator(train_set)
            trainer = _router_trainer(model, args, train_dataset=train_set, data_collator=collator)
            coef = self._balance(trainer, probe_set, router_aux_loss_coef)
            before, _ = self._count(trainer, probe_set, "expert selection before")
            trainer.train()
            _check_training(trainer, original, routers)
            after, num_tokens = self._count(trainer, probe_set, "expert selection after")
        if keep_tuned_router:
            with torch.no_grad():
                for layer, found in original.items():
                    for parameter, tuned in zip(found, routers[layer], strict=True):
                        parameter.copy_(tuned)
        return ExtenderReport(
            before=before,
            after=after,
            blocks={layer: block.name for layer, block in self._blocks.items()},
            num_probe_tokens=num_tokens,
            losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
            settings={"steps": steps, "learning_rate": learning_rate, "batch_size": batch_size, COEF: coef},
        )

    def _routers(self, model: nn.Module) -> dict[int, list[nn.Parameter]]:
        """Layer → what trains there: all of the router but corrections, which no gradient reaches."""
        return {
            layer: [
                parameter
                for name, parameter in model.get_submodule(block.router).named_parameters()
                if "correction" not in name
            ]
            for layer, block in self._blocks.items()
        }

    def _collator(self, rows: Any) -> Any | None:
        """Pads labels where there are some, and makes them of the inputs where there are none."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        if tokenizer is None:
            return None
        first = rows[0] if hasattr(rows, "__getitem__") else next(iter(rows))
        pad: Any = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        if "labels" in first:
            pad = DataCollatorForSeq2Seq(tokenizer, padding="longest", label_pad_token_id=-100)
        of_text = {"labels", *tokenizer.model_input_names}
        return pad if of_text.issuperset(first) else partial(_pad_and_stack, pad=pad, of_text=of_text)

    def _balance(self, trainer: Trainer, probe_set: Any, wanted: float | None) -> float:
        """Turn the model's own load-balancing loss on or off; returns its weight."""
        configs = [config for config in configs_of(trainer.model) if hasattr(config, COEF)]
        config: Any = getattr(trainer.model, "config", None)
        first = config.get_text_config() if hasattr(config, "get_text_config") else config
        known = next((getattr(c, COEF) for c in (first, *configs) if getattr(c, COEF, None) is not None), None)
        coef = wanted if wanted is not None else (known or 0.0)
        for holder in [*configs, *(module for module in trainer.model.modules() if hasattr(module, COEF))]:
            setattr(holder, COEF, coef)
        for config in configs_of(trainer.model):
            if hasattr(config, FLAG):
                setattr(config, FLAG, coef > 0)
        if coef and not self._has_balance_loss(trainer, probe_set):
            if wanted is not None:
                raise ValueError(
                    f"{type(trainer.model).__name__} has no load-balancing loss of its own, so router_aux_loss_coef={wanted} "
                    "would have no effect. Leave it out, or set it to 0."
                )
            coef = 0.0
        return float(coef)

    def _has_balance_loss(self, trainer: Trainer, probe_set: Any) -> bool:
        batch = next(iter(trainer.get_eval_dataloader(probe_set)))
        return getattr(self._forward(trainer, batch), "aux_loss", None) is not None

    @torch.no_grad()
    def _forward(self, trainer: Trainer, batch: dict[str, Any]) -> Any:
        """The model's output, in evaluation mode and in the precision of training."""
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if "logits_to_keep" in inspect.signature(type(trainer.model).forward).parameters:
            inputs["logits_to_keep"] = 1
        trainer.model.eval()
        # training leaves its autocast on the model's forward; before that nothing is there yet
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            return trainer.model(**inputs)

    def _count(self, trainer: Trainer, probe_set: Any, description: str) -> tuple[dict[int, list[int]], int]:
        """Layer → how often each expert is chosen on the probe set, and the number of its tokens, of all processes."""
        counts = {block.name: torch.zeros(block.num_experts, dtype=torch.int64) for block in self._blocks.values()}
        num_tokens = torch.zeros(1, dtype=torch.int64)

        def listen(forward_pass: ForwardPass) -> None:
            for index, (name, record) in enumerate(statistics_of(forward_pass).get(BASE, {}).items()):
                block = name.partition("#")[0]
                if block in counts:
                    counts[block] += record.expert_counts.long().sum(dim=0).cpu()
                if index == 0:
                    num_tokens.add_(record.num_tokens.long().sum().cpu())

        # all processes may have different numbers of batches: nothing in here waits for the others
        trainer.accelerator.even_batches = False
        loader = trainer.get_eval_dataloader(probe_set)
        is_silent = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
        with listen_to_routers(trainer.model, listen):
            for batch in tqdm(loader, desc=description, disable=is_silent):
                self._forward(trainer, batch)
        trainer.accelerator.even_batches = True
        counted = torch.cat([*counts.values(), num_tokens]).to(trainer.args.device)
        total: torch.Tensor = trainer.accelerator.reduce(counted, "sum")
        parts = torch.split(total.cpu(), [*(block.num_experts for block in self._blocks.values()), 1])
        by_layer = {layer: part.tolist() for layer, part in zip(self._blocks, parts, strict=False)}
        if unseen := [layer for layer, found in by_layer.items() if not any(found)]:
            raise ValueError(
                f"The probe set has sent no token through the routers of layers {unseen}. Make sure that it is not empty "
                "and that its attention_mask is not 0 everywhere."
            )
        return by_layer, int(parts[-1])


def _check_training(
    trainer: Trainer, original: dict[int, list[nn.Parameter]], routers: dict[int, list[nn.Parameter]]
) -> None:
    """Refuse routers from which nothing can be learned."""
    steps = trainer.args.max_steps
    if trainer.state.global_step < steps:
        raise RuntimeError(
            f"Training ended after {trainer.state.global_step} of {steps} steps: the training set gave no more batches."
        )
    broken = [layer for layer, found in routers.items() if not all(p.isfinite().all() for p in found)]
    if broken:
        raise FloatingPointError(
            f"The routers of layers {broken} are not finite after {steps} steps. Lower the learning rate "
            f"({trainer.args.learning_rate})."
        )
    still = [
        layer
        for layer, found in routers.items()
        if all(torch.equal(new.to(old), old) for new, old in zip(found, original[layer], strict=True))
    ]
    if len(still) == len(routers):
        raise RuntimeError(
            f"No router has changed in {steps} steps at learning rate {trainer.args.learning_rate}: no gradient has "
            "reached them, or each update was smaller than their precision. Make sure that labels are not -100 "
            "everywhere. Where a router gives its only chosen expert the weight 1, only the load-balancing loss moves "
            "it: set router_aux_loss_coef."
        )
    if still:
        logger.warning(f"The routers of layers {still} have not changed in {steps} steps; their shift is 0.")


def _check_model(model: nn.Module) -> None:
    kind = type(model).__name__
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"{kind} carries adapters, but the Extender measures the base model that MoExtend extends. Merge them with "
            "merge_and_unload(), or measure before they are added."
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) or "FullyShard" in kind:
        raise ValueError(
            f"{kind} is wrapped for distributed training. Pass the bare model: the Trainer inside wraps it by itself."
        )
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{kind} is quantised, and the Trainer refuses to train it. Load it without quantisation.")
    meta = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if meta:
        raise ValueError(
            f"{len(meta)} parameters of {kind} are on the meta device, the first is '{meta[0]}': the model is offloaded or "
            "not loaded. Load it into memory in full."
        )


def _known_blocks(model: nn.Module) -> dict[int, MoeBlock]:
    """Layer → mixture of experts, in order; a warning about those that cannot be extended."""
    blocks, refused = find_moe_blocks(model)
    for layer, block in list(blocks.items()):
        router = model.get_submodule(block.router)
        problem = probe(router, block).problem
        if problem:
            refused.append(f"'{block.router}' ({type(router).__name__}) {problem}")
            del blocks[layer]
        elif not all(parameter.is_floating_point() for parameter in router.parameters()):
            refused.append(f"'{block.router}' ({type(router).__name__}) is quantised and cannot be trained.")
            del blocks[layer]
    reasons = "".join(f"\n  - {reason}" for reason in refused)
    kind = type(model).__name__
    if not blocks:
        raise ValueError(
            f"{kind} has no mixture of experts that MoExtend can extend"
            + (f". Refused:{reasons}" if refused else ": no module has a child 'experts' with stacked parameters.")
        )
    if refused:
        logger.warning(f"Some mixtures of experts of {kind} cannot be extended and are left out:{reasons}")
    return dict(sorted(blocks.items()))


def _check_arguments(
    train_set: Any, probe_set: Any, steps: Any, learning_rate: Any, batch_size: Any, coef: float | None
) -> None:
    problems = [
        f"{name} must be a whole number of at least 1, but is {value!r}."
        for name, value in (("steps", steps), ("batch_size", batch_size))
        if not is_positive_int(value)
    ]
    if not is_number(learning_rate) or not 0 < learning_rate < math.inf:
        problems.append(f"learning_rate must be a positive number, but is {learning_rate!r}.")
    if coef is not None and not (is_number(coef) and 0 <= coef < math.inf):
        problems.append(f"{COEF} must be a number and not negative, but is {coef!r}.")
    problems += [
        f"{name} is empty."
        for name, rows in (("train_set", train_set), ("probe_set", probe_set))
        if (not len(rows) if hasattr(rows, "__len__") else next(iter(rows), None) is None)
    ]
    if problems:
        raise ValueError("The Extender cannot measure:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _pad_and_stack(rows: list[dict[str, Any]], *, pad: Any, of_text: set[str]) -> Any:
    """A batch of rows that hold more than text: its columns are padded, the others stacked."""
    batch = pad([{name: value for name, value in row.items() if name in of_text} for row in rows])
    for name in [name for name in rows[0] if name not in of_text]:
        tensors = [torch.as_tensor(row[name]) for row in rows]
        if len({tensor.shape for tensor in tensors}) > 1:
            raise ValueError(
                f"The rows have {name!r} of different shapes, {tuple(tensors[0].shape)} among them, which cannot be stacked. "
                "Give measure() a data_collator that knows how to batch them."
            )
        batch[name] = torch.stack(tensors)
    return batch


def _twin(model: nn.Module, own: set[int]) -> nn.Module:
    """A copy of a model, whose parameters lie in the memory of the model but for those with these `id`s."""
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters() if id(p) not in own}
    return copy.deepcopy(model, shared)  # type: ignore[arg-type]


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Whatever happens inside, Python, numpy and torch (on all CUDA devices) then go on drawing as if it had not."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def training_arguments(
    args: TrainingArguments | None, folder: str, steps: int, learning_rate: float, batch_size: int
) -> TrainingArguments:
    """A copy of `args` that trains for so many steps and saves nothing; without `args` those of the paper's code.

    Raises:
        ValueError: `args` shards the model.
    """
    from transformers import TrainingArguments

    if args is None:
        args = TrainingArguments(
            folder,
            lr_scheduler_type="cosine",
            warmup_steps=round(WARMUP_SHARE * steps),
            logging_steps=max(1, steps // 20),
            report_to="none",
        )
    if args.deepspeed or args.fsdp:
        raise ValueError(SHARDED)
    args = copy.copy(args)
    args.max_steps, args.learning_rate = steps, learning_rate
    args.per_device_train_batch_size = args.per_device_eval_batch_size = batch_size
    args.save_strategy = args.eval_strategy = "no"
    args.do_eval = args.eval_on_start = False
    args.load_best_model_at_end = args.push_to_hub = args.dataloader_drop_last = False
    return args


def _router_trainer(model: nn.Module, args: TrainingArguments, **kwargs: Any) -> Trainer:
    """A `Trainer` that stops at a loss that is not finite, which the logs of a plain one filter out, and trains no router on
    rounding.

    Raises:
        ValueError: the launcher shards the model.
    """
    from transformers import Trainer  # imports datasets, which importing this package must not

    class RouterTrainer(Trainer):
        def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            loss = super().training_step(*args, **kwargs)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"The loss is {loss.item()} in step {self.state.global_step + 1}. Make sure that every batch has labels "
                    f"that are not -100, or lower the learning rate ({self.args.learning_rate})."
                )
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(parameter.grad.norm() >= NOISE)
            return loss

    trainer = RouterTrainer(model, args, **kwargs)
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        raise ValueError(SHARDED)
    return trainer
