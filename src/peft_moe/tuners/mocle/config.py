"""`MoCLEConfig`: what a user chooses about a mixture of cluster-conditional LoRA experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from ..config import Count, Float32, NotNegative, Positive, Share
from ..lora_config import LoraExpertsConfig
from .clustering import InstructionClusterer, checksum
from .instructions import check_text_settings


@dataclass
class MoCLEConfig(LoraExpertsConfig):
    """Configuration of a [`MoCLEModel`]: the cluster of an instruction picks the LoRA expert.

    After MoCLE (https://huggingface.co/papers/2312.12379). `docs/methods/mocle.md` maps the symbols of the paper to
    these fields and lists every place where paper and released code differ. Make it from a fitted
    [`InstructionClusterer`] by [`from_clusterer`], or leave the clustering to your data: then give the cluster of each
    example as `cluster_ids`.

    Args:
        num_clusters (`int`):
            Clusters of instructions (K in the paper). Paper: 64 for InstructBLIP, 4 for LLaVA.
        num_experts (`int`):
            LoRA experts to choose from (E), without the universal one. Paper: 4.
        top_k (`int`):
            Experts per example, without the universal one. Paper: 1.
        universal_expert (`bool`):
            Whether there is an expert for every example, weighted by 1 - G_max. Paper: yes.
        r (`int`):
            Rank of each expert. Paper: 8 for InstructBLIP, 128 for LLaVA.
        lora_alpha (`int`):
            Each expert is scaled by `lora_alpha / r`. Released code: 32.
        lora_dropout (`float`):
            Dropout on the input of the experts. Released code: 0.1.
        use_rslora (`bool`):
            Scale by `lora_alpha / sqrt(r)` instead.
        target_modules (`Union[list[str], str]`, *optional*):
            Linears that get experts: names, name endings, a regular expression, or `"all-linear"`. By default as in
            the paper, found by structure: query and value projections of InstructBLIP-like models, up and down
            projections of the (text) MLPs of all others.
        temperature (`float`):
            τ of the softmax over experts. The smaller, the more an example specialises. Paper: 0.05.
        gate_scope (`"layer"` or `"module"`):
            One gate per layer of the model, shared by its linears (default, paper), or one per linear (released code).
        gate_bias (`bool`):
            Whether gates have a bias. Released code: yes.
        gate_noise_std (`float`, *optional*):
            Standard deviation of the noise on the gate's logits in training. By default 1/E (paper; whether its
            N(0, 1/E) means that or a variance is not clear). Released code: 0.1.
        gate_dtype (`"float32"`):
            Gates compute in float32; nothing else is accepted. Released code: float16.
        squared_gate (`bool`):
            Where there is a universal expert, weight expert e by G_e · G_max instead of G_e, which is G² for top-1.
            The released code multiplies twice.
        cluster_embedding_scope (`"model"`, `"layer"` or `"module"`):
            One table of cluster embeddings for the whole model (default, paper), or one per gate (released code: per
            linear).
        cluster_embedding_init (`"centroids"` or `"normal"`):
            Start from the centroids (default, paper), or from N(0, 1) (released code). Where there are no centroids,
            the default draws vectors of about unit length, as sentence embeddings have it: with N(0, 1) most gates
            are saturated from the start.
        cluster_embedding_dim (`int`):
            Width of cluster embeddings; that of the sentence encoder where there are centroids.
        fallback (`"error"` or `"universal"`):
            What to do with a batch whose clusters are not known: raise (default), or use the universal expert alone.
        encoder_name (`str`, *optional*), instruction_template (`str`), instruction_pattern (`str`, *optional*):
            How instructions become embeddings, see [`InstructionClusterer`]. Set by [`from_clusterer`].
        centroids_sha256 (`str`, *optional*):
            Checksum of the centroids that the adapter carries. Set by [`from_clusterer`].
        rank_pattern (`dict[str, int]`), alpha_pattern (`dict[str, int]`):
            Other ranks and alphas for linears whose name matches.
        exclude_modules (`Union[list[str], str]`, *optional*):
            Linears to leave alone.
        layers_to_transform (`Union[list[int], int]`, *optional*), layers_pattern (`Union[list[str], str]`,
            *optional*): Only these layers of the module list that `layers_pattern` names.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train in full and to save, e.g. a multi-modal projector or a Q-Former (as in the paper).
        init_lora_weights (`bool` or `"gaussian"`):
            `True`: A Kaiming-uniform, B zero, so that training starts from the base model. `False` leaves B random too
            (for tests).
        kernel_backend (`str`):
            What computes the experts: `"auto"` or the name of a backend, see [`peft_moe.kernels.explain`].
        checkpoint_format (`int`):
            Format of the saved adapter; leave as it is.

    Example:

    ```py
    >>> from peft import get_peft_model
    >>> from peft_moe import InstructionClusterer, MoCLEConfig

    >>> clusterer = InstructionClusterer.fit(dataset["prompt"], num_clusters=64)
    >>> dataset = clusterer.add_cluster_ids(dataset, "prompt")
    >>> model = get_peft_model(model, MoCLEConfig.from_clusterer(clusterer, num_experts=4, task_type="CAUSAL_LM"))
    ```

    Raises:
        ValueError: one or more fields do not make sense; all of them are named.
    """

    num_clusters: Count = field(default=64, metadata={"help": "Clusters of instructions."})
    num_experts: Count = field(default=4, metadata={"help": "LoRA experts to choose from."})
    top_k: Count = field(default=1, metadata={"help": "Experts per example, without the universal one."})
    universal_expert: bool = field(default=True, metadata={"help": "Whether there is an expert for every example."})
    lora_alpha: Positive = field(default=32, metadata={"help": "Experts are scaled by lora_alpha / r."})
    lora_dropout: Share = field(default=0.1, metadata={"help": "Dropout on the input of the experts."})
    temperature: Positive = field(default=0.05, metadata={"help": "Temperature of the softmax over experts."})
    gate_scope: Literal["layer", "module"] = field(
        default="layer", metadata={"help": "One gate per layer or one per linear."}
    )
    gate_bias: bool = field(default=False, metadata={"help": "Whether gates have a bias."})
    gate_noise_std: NotNegative | None = field(
        default=None, metadata={"help": "Noise on the gate's logits in training. Default: 1 / num_experts."}
    )
    gate_dtype: Float32 = field(default="float32", metadata={"help": "Gates compute in float32."})
    squared_gate: bool = field(default=False, metadata={"help": "Multiply by the largest gate again."})
    cluster_embedding_scope: Literal["model", "layer", "module"] = field(
        default="model", metadata={"help": "One table of cluster embeddings for the model, or one per gate."}
    )
    cluster_embedding_init: Literal["centroids", "normal"] = field(
        default="centroids", metadata={"help": "How cluster embeddings are initialised."}
    )
    cluster_embedding_dim: Count = field(default=384, metadata={"help": "Width of cluster embeddings."})
    fallback: Literal["error", "universal"] = field(
        default="error", metadata={"help": "What to do with examples whose cluster is not known."}
    )
    encoder_name: str | None = field(default=None, metadata={"help": "Sentence encoder of the clusters."})
    instruction_template: str = field(default="{}", metadata={"help": "Text that is encoded, {} is the instruction."})
    instruction_pattern: str | None = field(
        default=None, metadata={"help": "Regular expression whose first group is the instruction in a prompt."}
    )
    centroids_sha256: str | None = field(default=None, metadata={"help": "Checksum of the adapter's centroids."})

    method: ClassVar[str] = "MoCLE"
    paper_url: ClassVar[str] = "https://huggingface.co/papers/2312.12379"
    card_fields: ClassVar[tuple[str, ...]] = (
        "num_clusters",
        "num_experts",
        "top_k",
        "universal_expert",
        "r",
        "lora_alpha",
        "encoder_name",
    )

    def __post_init__(self) -> None:
        self.centroids: torch.Tensor | None = None
        super().__post_init__()
        self.gate_dtype = "float32"

    def _contradictions(self) -> list[str]:
        problems = super()._contradictions()
        if self.num_experts < 2:
            problems.append(
                "num_experts must be at least 2, but is 1: the only gate would always be 1 and a universal expert "
                "never used. Add experts, or use LoRA."
            )
        elif self.top_k > self.num_experts:
            problems.append(
                f"top_k must be at most num_experts, but top_k is {self.top_k} and num_experts is {self.num_experts}. "
                "Lower top_k, or add experts."
            )
        if self.gate_scope == "layer" and self.cluster_embedding_scope == "module":
            problems.append(
                "cluster_embedding_scope='module' needs a gate per linear, but gate_scope is 'layer'. Set gate_scope="
                "'module', or cluster_embedding_scope='layer'."
            )
        if self.fallback == "universal" and not self.universal_expert:
            problems.append("fallback='universal' needs universal_expert=True. Set it, or use fallback='error'.")
        try:
            check_text_settings(self.instruction_template, self.instruction_pattern)
        except ValueError as error:
            problems.append(str(error))
        return problems

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise on the gate's logits, the default resolved."""
        return 1 / self.num_experts if self.gate_noise_std is None else self.gate_noise_std

    @classmethod
    def from_clusterer(cls, clusterer: InstructionClusterer, **fields: Any) -> MoCLEConfig:
        """A configuration that carries the centroids of `clusterer` and the name of its encoder.

        The adapter then saves the centroids, and can find the cluster of a prompt by itself, see [`attach_encoder`].

        Args:
            clusterer (`InstructionClusterer`): a fitted one.
            fields: any other field of the configuration.

        Raises:
            ValueError: a field contradicts the clusterer.
        """
        known = {
            "num_clusters": clusterer.num_clusters,
            "cluster_embedding_dim": clusterer.embedding_dim,
            "encoder_name": clusterer.encoder_name,
            "instruction_template": clusterer.template,
            "instruction_pattern": clusterer.instruction_pattern,
            "centroids_sha256": checksum(clusterer.centroids),
        }
        contradictions = [
            f"{name} is {fields[name]!r}, but the clusterer has {value!r}. Leave it out."
            for name, value in known.items()
            if name in fields and fields[name] != value
        ]
        if contradictions:
            raise ValueError("MoCLEConfig.from_clusterer got contradictions: " + " ".join(contradictions))
        config = cls(**{**fields, **known})
        config.centroids = clusterer.centroids.detach().float().cpu().clone()
        return config

    @classmethod
    def paper(cls, **overrides: Any) -> MoCLEConfig:
        """The published setting for InstructBLIP: 64 clusters, 4 experts of rank 8 and a universal one, τ = 0.05.

        These are the defaults; alpha and dropout are not in the public text and come from the code.
        """
        return cls(**overrides)

    @classmethod
    def released_code(cls, **overrides: Any) -> MoCLEConfig:
        """What the released code runs: a gate with bias and a random table of embeddings per linear, G², noise 0.1."""
        return cls(**{**RELEASED_CODE, **overrides})


RELEASED_CODE: dict[str, Any] = {
    "gate_scope": "module",
    "gate_bias": True,
    "gate_noise_std": 0.1,
    "squared_gate": True,
    "cluster_embedding_scope": "module",
    "cluster_embedding_init": "normal",
}
