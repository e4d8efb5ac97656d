"""The three stages of MoE-tuning: what each one trains, and an audit of what it will train."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn


logger = logging.getLogger(__name__)

STAGES = ("I", "II", "III")
VISION_TOWER, PROJECTOR, EMBEDDINGS, LM_HEAD = "vision tower", "projector", "embeddings", "lm_head"
ATTENTION, DENSE_MLPS, ROUTERS, EXPERTS, NORMS = "attention", "dense MLPs", "routers", "experts", "norms"
OTHER, ADAPTERS, LANGUAGE_MODEL = "other", "adapters", "language model"
GROUPS = (
    VISION_TOWER,
    PROJECTOR,
    EMBEDDINGS,
    ATTENTION,
    DENSE_MLPS,
    ROUTERS,
    EXPERTS,
    NORMS,
    LM_HEAD,
    OTHER,
    ADAPTERS,
)
PARTS_OF_LLAVA = {
    "vision_tower": VISION_TOWER,
    "multi_modal_projector": PROJECTOR,
    "language_model": None,
    "lm_head": LM_HEAD,
}
WRAPPERS = ("base_layer", "original_module", "_orig_mod", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class TrainableAudit:
    """How many parameters train, group by group; `str(audit)` is a table.

    Args:
        stage (`str`): the stage that was applied.
        trainable (`dict[str, int]`): numbers of parameters that train.
        total (`dict[str, int]`): numbers of all parameters. What adapters add is a group of its own, wherever it sits.
        not_saved (`tuple[str, ...]`): names of parameters that train but are no part of a saved adapter.
    """

    stage: str
    trainable: dict[str, int]
    total: dict[str, int]
    not_saved: tuple[str, ...] = field(default=(), repr=False)

    @property
    def trained_groups(self) -> list[str]:
        """Groups of which at least a part trains."""
        return [group for group, count in self.trainable.items() if count]

    def __str__(self) -> str:
        rows = [*((group, self.trainable[group], count) for group, count in self.total.items() if count)]
        rows.append(("all", sum(self.trainable.values()), sum(self.total.values())))
        lines = [f"{f'stage {self.stage}':<14}{'trainable':>16}{'parameters':>16}{'share':>8}"]
        lines += [f"{name:<14}{some:>16,}{all_:>16,}{some / all_:>8.1%}" for name, some, all_ in rows]
        return "\n".join(lines)


@dataclass(frozen=True)
class MoeTuningStage:
    """One of the three stages of MoE-tuning (MoE-LLaVA, section 3.3).

    | stage | trains |
    |---|---|
    | `"I"` | the projector |
    | `"II"` | everything but the vision tower |
    | `"III"` | routers and experts, and what the two switches add |

    I and II take a dense LLaVA or a sparse one, III only a sparse one. A residual expert counts as an expert, and what
    mixes it in as a router.

    With PEFT adapters, the active adapters of the language model train in II and III, those of the projector in every
    stage that trains the projector, those of the vision tower never. A weight that carries an adapter stays frozen,
    for the adapter trains in its place. Modules that PEFT keeps a trainable copy of (`modules_to_save`) train as that
    copy.

    Args:
        name (`"I"`, `"II"` or `"III"`): which stage.
        dense_mlps (`bool`):
            In stage III, also train the MLPs of the layers that are no mixtures. Paper (table 5a) and released code:
            yes.
        projector (`bool`):
            In stage III, also train the projector. Released code: yes; figure 3 of the paper shows it frozen.

    Raises:
        ValueError: no such stage.

    Example:

    ```py
    >>> from peft_moe.models.moe_llava.stages import MoeTuningStage

    >>> audit = MoeTuningStage("III", projector=False).apply(model)
    >>> print(audit)
    >>> Trainer(model, args, train_dataset=train_set).train()
    ```
    """

    name: str
    dense_mlps: bool = True
    projector: bool = True

    def __post_init__(self) -> None:
        if self.name not in STAGES:
            raise ValueError(f"MoE-tuning has the stages {', '.join(map(repr, STAGES))}, but found {self.name!r}.")

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of parameters that train, adapters not counted."""
        if self.name == "I":
            return (PROJECTOR,)
        if self.name == "II":
            return tuple(group for group in GROUPS if group not in (VISION_TOWER, ADAPTERS))
        return (ROUTERS, EXPERTS, *[DENSE_MLPS] * self.dense_mlps, *[PROJECTOR] * self.projector)

    def apply(self, model: nn.Module) -> TrainableAudit:
        """Set `requires_grad` of every parameter, and log what will train. Call it before the optimizer is made.

        Args:
            model (`nn.Module`):
                A [`~transformers.LlavaForConditionalGeneration`], a [`MoeLlavaForConditionalGeneration`], or a
                `PeftModel` around one.

        Returns:
            [`TrainableAudit`].

        Raises:
            ValueError: the model is no LLaVA, or the stage would leave frozen what it is there to train, because the
                model has no such part or because it is quantised. No parameter is changed then.
        """
        entries = list(_entries(model))
        self._check(model, entries)
        trainable, total = (dict.fromkeys(GROUPS, 0) for _ in range(2))
        not_saved = []
        is_adapted = bool(getattr(model, "peft_config", None))
        for entry in entries:
            entry.parameter.requires_grad_(self._trains(entry))
            group = ADAPTERS if entry.is_adapter else entry.group
            total[group] += entry.parameter.numel()
            if self._trains(entry):
                trainable[group] += entry.parameter.numel()
                if is_adapted and not (entry.is_adapter or entry.is_saved_copy):
                    not_saved.append(entry.name)
        audit = TrainableAudit(self.name, trainable, total, tuple(not_saved))
        logger.info("Trainable parameters in\n%s", audit)
        if not_saved:
            logger.warning(
                "%d tensors train that are no part of a saved adapter, %s the first of them: a checkpoint of the "
                "adapter alone would lose them. Give the adapter's configuration "
                "modules_to_save=MoeTuningStage(%r).modules_to_save(model), or merge the adapter and save the whole "
                "model.",
                len(not_saved),
                not_saved[0],
                self.name,
            )
        if any(self._trains(e) and e.is_saved_copy and e.group in (EMBEDDINGS, LM_HEAD) for e in entries):
            _warn_of_untied_embeddings(model)
        return audit

    def modules_to_save(self, model: nn.Module) -> list[str]:
        """Names of the modules whose own weights the stage trains, for `modules_to_save` of a PEFT configuration.

        PEFT does not accept a module both there and in `target_modules`: leave out those that get adapters.
        """
        owners = {entry.name.rpartition(".")[0]: None for entry in _entries(model) if self._trains(entry)}
        return list(owners)

    def _trains(self, entry: _Entry) -> bool:
        return self._wants(entry) and _can_train(entry.parameter)

    def _wants(self, entry: _Entry) -> bool:
        if not entry.is_active:
            return False
        if entry.is_adapter and self.name == "III" and entry.group not in (VISION_TOWER, PROJECTOR):
            return True
        return entry.group in self.groups

    def _check(self, model: nn.Module, entries: list[_Entry]) -> None:
        kind = type(model).__name__
        if not any(entry.group == PROJECTOR for entry in entries):
            raise ValueError(
                f"MoE-tuning needs a LLaVA, but {kind} has no multi_modal_projector. Use "
                "LlavaForConditionalGeneration or MoeLlavaForConditionalGeneration."
            )
        if self.name == "III":
            _check_mixtures(model, entries, kind)
        if stuck := [entry for entry in entries if self._wants(entry) and not _can_train(entry.parameter)]:
            groups = ", ".join(dict.fromkeys(entry.group for entry in stuck))
            first = stuck[0]
            raise ValueError(
                f"Stage {self.name} trains the {groups} of {kind}, but {len(stuck)} of these weights are quantised "
                f"and would stay as they are: {first.name} is {type(first.parameter.data).__name__} of "
                f"{first.parameter.dtype}, the first of them. Load the model without quantization of these parts, "
                "give them adapters, or choose a stage without them."
            )
        needed = {"I": (PROJECTOR,), "II": (PROJECTOR, LANGUAGE_MODEL), "III": (ROUTERS, EXPERTS)}[self.name]
        trained = {entry.group for entry in entries if self._trains(entry)}
        if trained - {PROJECTOR}:
            trained.add(LANGUAGE_MODEL)
        if missing := [group for group in needed if group not in trained]:
            raise ValueError(
                f"Stage {self.name} would train no {' and no '.join(missing)} of {kind}: their weights belong to an "
                "adapter that is not active, or are no parameters. Activate the adapter, or load the model without "
                "quantization."
            )


@dataclass(frozen=True)
class _Entry:
    """A parameter and where it sits."""

    name: str
    parameter: nn.Parameter
    group: str
    layer: int | None
    is_adapter: bool
    is_saved_copy: bool
    is_active: bool


def _entries(model: nn.Module) -> Iterator[_Entry]:
    prefixes, active = _adapters(model)
    # an adapter takes the place of the weights under it, where it has some of its own
    carriers = {
        name.partition(f".{prefix}")[0]
        for name, _ in model.named_parameters()
        for prefix in prefixes
        if f".{prefix}" in name
    }
    for name, parameter in model.named_parameters():
        segments = name.split(".")
        is_adapter = any(segment.startswith(prefix) for segment in segments for prefix in prefixes)
        is_saved_copy = "modules_to_save" in segments
        is_active = "original_module" not in segments
        if is_adapter or is_saved_copy:
            is_active = any(adapter in segments for adapter in active)
        elif "base_layer" in segments:
            is_active = name.partition(".base_layer")[0] not in carriers
        group, layer = _place(model, segments)
        yield _Entry(name, parameter, group, layer, is_adapter, is_saved_copy, is_active)


def _adapters(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """How the parameters of adapters begin, and which adapters are active."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return (), ()
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    active = model.active_adapters
    names = active() if callable(active) else active
    prefixes = {PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type) for config in configs.values()} - {None}
    # rows of embeddings (trainable_token_indices) come with adapters of any kind
    return (*sorted(prefixes | {"trainable_tokens_"}), "prompt_encoder"), tuple(names)


def _can_train(parameter: torch.Tensor) -> bool:
    """Whether a weight can have a gradient. Some quantised ones say that they are floating point numbers."""
    data = parameter.data
    if torch.distributed.is_available():
        from torch.distributed.tensor import DTensor

        data = data.to_local() if isinstance(data, DTensor) else data
    return data.is_floating_point() and type(data) in (torch.Tensor, nn.Parameter)


def _warn_of_untied_embeddings(model: nn.Module) -> None:
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    if any(part is None for part in embeddings):
        return
    originals = [getattr(part, "original_module", part).weight for part in embeddings]
    if originals[0] is originals[1] and embeddings[0].weight is not embeddings[1].weight:
        logger.warning(
            "Embeddings and lm_head are one weight, but modules_to_save makes a copy of one of them, which alone "
            "trains: they will differ. Give the adapter's configuration ensure_weight_tying=True."
        )


def _place(model: nn.Module, segments: list[str]) -> tuple[str, int | None]:
    """The group of a parameter and the decoder layer it belongs to, from its name and the modules on its way."""
    start = next((i for i, segment in enumerate(segments) if segment in PARTS_OF_LLAVA), None)
    if start is None:
        return OTHER, None
    group = PARTS_OF_LLAVA[segments[start]]
    if group is not None:
        return group, None
    owner = model.get_submodule(".".join(segments[:-1]))
    inside = [segment for segment in segments[start + 1 :] if segment not in WRAPPERS]
    layer = int(inside[1]) if inside[0] == "layers" else None
    if "norm" in type(owner).__name__.lower():
        return NORMS, layer
    if isinstance(owner, nn.Embedding) and layer is None:
        return EMBEDDINGS, None
    if layer is None or len(inside) < 5:
        return OTHER, layer
    if "attn" in inside[2] or "attention" in inside[2]:
        return ATTENTION, layer
    parts_of_mixture = {"gate": ROUTERS, "residual_gate": ROUTERS, "experts": EXPERTS, "residual_mlp": EXPERTS}
    return parts_of_mixture.get(inside[3], DENSE_MLPS), layer


def _check_mixtures(model: nn.Module, entries: list[_Entry], kind: str) -> None:
    found = {group: {e.layer for e in entries if e.group == group} for group in (ROUTERS, EXPERTS)}
    mixtures = found[ROUTERS] & found[EXPERTS]
    if not mixtures:
        raise ValueError(
            f"Stage III trains routers and experts, but {kind} has none. Make a sparse model of it first: "
            "MoeLlavaForConditionalGeneration.from_dense(model, num_experts=4)."
        )
    wanted = set(getattr(getattr(model, "config", None), "moe_layer_indices", mixtures))
    if missing := sorted(wanted - mixtures):
        raise ValueError(
            f"Stage III trains routers and experts, but layers {missing} of {kind} have none, although the "
            f"configuration lists the mixtures {sorted(wanted)}. Load the checkpoint again, or correct moe_layers."
        )


__all__ = ["GROUPS", "MoeTuningStage", "TrainableAudit"]
