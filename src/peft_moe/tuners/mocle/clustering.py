"""`InstructionClusterer`: groups instructions by k-means on sentence embeddings, and says which group a new one is in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin

from .cluster_file import read_clusterer, write_clusterer
from .cluster_report import ClusterReport
from .cluster_texts import (
    PLACE_OF_INSTRUCTION,
    Texts,
    check_columns,
    check_count,
    check_texts_settings,
    columns_of,
    read_instructions,
)
from .kmeans import DistinctTexts, check_enough, nearest_centroid, run_kmeans
from .encoder import DEFAULT_ENCODER, SentenceEncoder


if TYPE_CHECKING:
    import datasets


class InstructionClusterer(
    ModelHubMixin,
    library_name="peft_moe",
    tags=["clustering", "mocle"],
    paper_url="https://huggingface.co/papers/2312.12379",
):
    """Clusters of instructions, by k-means on the vectors of a sentence encoder.

    After MoCLE (https://huggingface.co/papers/2312.12379), where the cluster of an instruction decides which expert works
    on an example. Make one with [`~InstructionClusterer.fit`], keep it with `save_pretrained` or `push_to_hub`, get it
    back with `from_pretrained`. What is kept is the centroids, their sizes and the name of the encoder: neither its
    weights nor any text, and no pickle.

    An instruction is what [`~instructions.instruction_text`] makes of an example. Euclidean distances, as in the
    released code.

    Args:
        centroids (`torch.Tensor`):
            Shape `(K, C)`, kept as float32.
        encoder (`str`, `Path` or `SentenceEncoder`):
            The sentence encoder that the centroids were made with: an id on the Hub, or a folder. An id is portable; a
            folder is stored as it is and means nothing on another machine.
        cluster_sizes (`torch.Tensor`, *optional*):
            Shape `(K,)`: how many of the texts that were clustered each cluster got.
        template (`str`):
            The text that is encoded; `{}` stands for the instruction. The released code encodes prompts that carry OCR
            tokens as `"Question: {} Short answer:"`.
        instruction_pattern (`str`, *optional*):
            For texts that are whole prompts, see [`~instructions.instruction_text`].
        seed (`int`, *optional*), num_texts (`int`, *optional*):
            How the clusters were made, for the record.

    Attributes:
        centroids (`torch.Tensor`): shape `(K, C)`, float32, on the CPU.
        cluster_sizes (`torch.Tensor`): shape `(K,)`, int64; zeros where they are not known.
        encoder_name (`str`): id or folder of the encoder, which is loaded when it is first needed.
        template (`str`), instruction_pattern (`str`, *optional*): see above.

    Raises:
        ValueError: an argument that cannot be used; all problems at once.

    Example:

    ```py
    >>> clusterer = InstructionClusterer.fit(dataset["prompt"], num_clusters=64)
    >>> print(clusterer.report(dataset, "prompt"))
    >>> dataset = clusterer.add_cluster_ids(dataset, "prompt")
    >>> clusterer.save_pretrained("clusters")
    ```
    """

    def __init__(
        self,
        centroids: torch.Tensor,
        *,
        encoder: str | Path | SentenceEncoder = DEFAULT_ENCODER,
        cluster_sizes: torch.Tensor | None = None,
        template: str = PLACE_OF_INSTRUCTION,
        instruction_pattern: str | None = None,
        seed: int | None = None,
        num_texts: int | None = None,
    ) -> None:
        check_texts_settings(template, instruction_pattern)
        problems = []
        if centroids.dim() != 2 or 0 in centroids.shape:
            problems.append(f"centroids has to be of shape (K, C), but is {tuple(centroids.shape)}")
        if not torch.isfinite(centroids).all():
            problems.append("centroids hold values that are not finite")
        sizes = torch.zeros(centroids.shape[:1], dtype=torch.long) if cluster_sizes is None else cluster_sizes
        if sizes.shape != centroids.shape[:1]:
            problems.append(f"cluster_sizes is {tuple(sizes.shape)}, but there are {len(centroids)} centroids")
        if problems:
            raise ValueError("; ".join(problems) + ".")
        self.centroids = centroids.detach().float().cpu().contiguous()
        self.cluster_sizes = sizes.long().cpu()
        self.encoder = encoder if isinstance(encoder, SentenceEncoder) else SentenceEncoder(encoder)
        self.encoder_name = self.encoder.name_or_path
        self.template = template
        self.instruction_pattern = instruction_pattern
        self.seed = seed
        self.num_texts = num_texts

    @property
    def num_clusters(self) -> int:
        """Number of clusters K."""
        return self.centroids.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Width C of the centroids."""
        return self.centroids.shape[1]

    def __repr__(self) -> str:
        return f"InstructionClusterer(num_clusters={self.num_clusters}, encoder_name={self.encoder_name!r})"

    @classmethod
    def fit(
        cls,
        texts: Texts,
        num_clusters: int = 64,
        *,
        encoder: str | Path | SentenceEncoder = DEFAULT_ENCODER,
        template: str = PLACE_OF_INSTRUCTION,
        instruction_pattern: str | None = None,
        seed: int = 0,
        batch_size: int = 64,
        show_progress: bool = True,
    ) -> InstructionClusterer:
        """Clusters of `texts`.

        Repeated instructions are encoded once and weigh as often as they occur. scikit-learn's `KMeans` with 10 starts
        up to 50,000 different instructions (`KMEANS_MAX_TEXTS`), `MiniBatchKMeans` above. Of the paper we know neither
        the seed nor the number of starts.

        Args:
            texts (`Iterable`):
                Texts or chats: a list, or a column of a data set such as `dataset["prompt"]`.
            num_clusters (`int`):
                K. Paper: 64 for InstructBLIP, 4 for LLaVA; 16 and 256 are released too. See [`choose_num_clusters`].
            encoder (`str`, `Path` or `SentenceEncoder`):
                Paper: `sentence-transformers/all-MiniLM-L6-v2`. A Hub id is portable, a folder is not.
            template (`str`), instruction_pattern (`str`, *optional*):
                See [`InstructionClusterer`].
            seed (`int`):
                The same seed and texts give the same clusters, on the same machine.
            batch_size (`int`), show_progress (`bool`):
                Of encoding.

        Raises:
            ValueError: no texts, one without an instruction (its index is named), fewer different instructions than
                clusters, or another argument that cannot be used: all before any work. Different instructions may have
                the same vector, and only encoding shows that too few are left.
        """
        check_texts_settings(template, instruction_pattern)
        check_count("num_clusters", num_clusters)
        instructions = read_instructions(texts, instruction_pattern)
        check_enough(len(set(instructions)), num_clusters, what="instructions")
        encoder = encoder if isinstance(encoder, SentenceEncoder) else SentenceEncoder(encoder)
        points = DistinctTexts.encode(
            instructions, encoder, template, batch_size=batch_size, show_progress=show_progress
        )
        points.check_distinct(num_clusters)
        centroids = torch.from_numpy(run_kmeans(points, num_clusters, seed).cluster_centers_)
        ids = nearest_centroid(points.vectors, centroids)
        return cls(
            centroids,
            encoder=encoder,
            cluster_sizes=torch.bincount(ids, weights=points.weights.double(), minlength=num_clusters).long(),
            template=template,
            instruction_pattern=instruction_pattern,
            seed=seed,
            num_texts=len(instructions),
        )

    def predict(self, texts: Texts, *, batch_size: int = 64, show_progress: bool = False) -> torch.Tensor:
        """The cluster of each text.

        Args:
            texts (`Iterable`): N texts or chats, as for [`~InstructionClusterer.fit`].
            batch_size (`int`), show_progress (`bool`): of encoding.

        Returns:
            `torch.Tensor`: shape `(N,)`, int64, on the CPU.

        Raises:
            ValueError: no texts, one without an instruction, or an encoder of another width than the centroids.
        """
        instructions = read_instructions(texts, self.instruction_pattern)
        points = self._encode(instructions, batch_size=batch_size, show_progress=show_progress)
        return self.predict_embeddings(points.vectors)[points.index]

    def predict_embeddings(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The cluster of each vector `(N, C)` of the encoder, shape `(N,)`; see [`nearest_centroid`]."""
        return nearest_centroid(embeddings, self.centroids)

    def add_cluster_ids(
        self,
        dataset: datasets.Dataset | datasets.DatasetDict | datasets.IterableDataset | datasets.IterableDatasetDict,
        column: str,
        *,
        output_column: str = "cluster_ids",
        batch_size: int = 1000,
    ) -> Any:
        """The data set with one more column: the cluster of each row.

        Args:
            dataset: a data set, also a streamed one, or a dictionary of splits.
            column (`str`): which column holds the texts or chats.
            output_column (`str`): name of the new column.
            batch_size (`int`): rows per step.

        Returns:
            A data set of the same kind.

        Raises:
            ValueError: `column` is missing, `output_column` is there already, or (during the work, with its index) a row
                has no instruction.
        """
        import datasets

        kinds = (datasets.Dataset, datasets.DatasetDict, datasets.IterableDataset, datasets.IterableDatasetDict)
        if not isinstance(dataset, kinds):
            raise ValueError(
                f"add_cluster_ids takes a data set of the library datasets, but got a {type(dataset).__name__}. "
                "predict gives the clusters of a list."
            )
        check_count("batch_size", batch_size)
        if isinstance(dataset, dict):
            options: dict[str, Any] = {"output_column": output_column, "batch_size": batch_size}
            for split in dataset.values():
                check_columns(split, column, output_column)
            splits = {name: self.add_cluster_ids(split, column, **options) for name, split in dataset.items()}
            return type(dataset)(splits)
        check_columns(dataset, column, output_column)
        options = {"batched": True, "batch_size": batch_size, "with_indices": True, "input_columns": [column]}
        if isinstance(dataset, datasets.Dataset):
            options["desc"] = "Assigning clusters"
        if dataset.features is not None:
            options["features"] = datasets.Features({**dataset.features, output_column: datasets.Value("int64")})
        return dataset.map(_AddIds(self, output_column), **options)

    def report(
        self,
        texts: Texts | datasets.Dataset,
        column: str | None = None,
        *,
        domain_column: str | None = None,
        num_examples: int = 3,
        batch_size: int = 64,
        show_progress: bool = False,
    ) -> ClusterReport:
        """What the clusters hold: how many texts, which are typical, and from which domains they come.

        Args:
            texts (`Iterable` or `datasets.Dataset`): texts or chats, or a data set.
            column (`str`, *optional*): with a data set: the column of the texts or chats.
            domain_column (`str`, *optional*): with a data set: a column that says where a row comes from.
            num_examples (`int`): instructions to show of each cluster, those nearest to its centroid.
            batch_size (`int`), show_progress (`bool`): of encoding.

        Raises:
            ValueError: a column is missing or not given, or as in [`~InstructionClusterer.predict`].
        """
        domains = None
        if hasattr(texts, "column_names"):
            texts, domains = columns_of(texts, column, domain_column)
        elif column is not None or domain_column is not None:
            raise ValueError(
                f"column and domain_column are for data sets, but the texts are a {type(texts).__name__}."
            )
        instructions = read_instructions(texts, self.instruction_pattern)
        points = self._encode(instructions, batch_size=batch_size, show_progress=show_progress)
        ids = self.predict_embeddings(points.vectors)
        distances = (points.vectors - self.centroids[ids]).square().sum(dim=1).tolist()
        members: list[list[tuple[float, str]]] = [[] for _ in range(self.num_clusters)]
        for cluster, distance, text in zip(ids.tolist(), distances, points.texts, strict=True):
            members[cluster].append((distance, text))
        examples = tuple(tuple(text for _, text in sorted(group)[:num_examples]) for group in members)
        return ClusterReport.of(ids[points.index].tolist(), examples, domains)

    def _encode(self, instructions: list[str], *, batch_size: int, show_progress: bool) -> DistinctTexts:
        if self.encoder.embedding_dim != self.embedding_dim:
            raise ValueError(
                f"The encoder {self.encoder.name_or_path!r} gives vectors of width {self.encoder.embedding_dim}, but the "
                f"centroids are of width {self.embedding_dim}. Use the encoder that they were made with, "
                f"{self.encoder_name!r}, or fit again."
            )
        return DistinctTexts.encode(
            instructions, self.encoder, self.template, batch_size=batch_size, show_progress=show_progress
        )

    def save_pretrained(
        self,
        save_directory: str | Path,
        *,
        config: Any = None,
        repo_id: str | None = None,
        push_to_hub: bool = False,
        model_card_kwargs: dict[str, Any] | None = None,
        **push_to_hub_kwargs: Any,
    ) -> str | None:
        """Write `clusterer.safetensors`, `clusterer_config.json` and, if there is none yet, `README.md`.

        The folder may be that of an adapter: nothing else in it is touched.

        Args:
            save_directory (`str` or `Path`): the folder, made if it is not there.
            repo_id (`str`, *optional*), push_to_hub (`bool`), push_to_hub_kwargs:
                Whether to upload too, see `push_to_hub`; by default under the name of the folder.
            config, model_card_kwargs: have no effect; `ModelHubMixin` passes them.

        Returns:
            `str`, *optional*: address of the commit if it was uploaded.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        write_clusterer(
            folder,
            {
                "encoder_name": self.encoder_name,
                "template": self.template,
                "instruction_pattern": self.instruction_pattern,
                "num_clusters": self.num_clusters,
                "embedding_dim": self.embedding_dim,
                "seed": self.seed,
                "num_texts": self.num_texts,
            },
            {"centroids": self.centroids, "cluster_sizes": self.cluster_sizes},
        )
        if not (folder / "README.md").exists():
            self.generate_model_card().save(folder / "README.md")
        return self.push_to_hub(repo_id or folder.name, **push_to_hub_kwargs) if push_to_hub else None

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        encoder: str | Path | SentenceEncoder | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> InstructionClusterer:
        """The clusterer in a folder or on the Hub. The encoder is not loaded yet.

        Args:
            pretrained_model_name_or_path (`str` or `Path`): a folder, or an id on the Hub.
            encoder (`str`, `Path` or `SentenceEncoder`, *optional*):
                Where to find the encoder instead, for example a local copy. `encoder_name` stays as it was saved.
            revision, token, cache_dir, force_download, local_files_only: as everywhere on the Hub.

        Raises:
            ValueError: files are missing, damaged or do not belong together, or were written in a newer format.
            OSError: there is no such folder and nothing to be had from the Hub.
        """
        hub_options: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        settings, tensors = read_clusterer(str(pretrained_model_name_or_path), hub_options)
        clusterer = cls(
            tensors["centroids"],
            encoder=settings["encoder_name"],
            cluster_sizes=tensors["cluster_sizes"],
            **{key: settings[key] for key in ("template", "instruction_pattern", "seed", "num_texts")},
        )
        if encoder is not None:
            clusterer.encoder = encoder if isinstance(encoder, SentenceEncoder) else SentenceEncoder(encoder)
        return clusterer

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card that is written beside the files. It holds no texts."""
        sizes = self.cluster_sizes.tolist()
        return ModelCard(
            f"""---
{self._hub_mixin_info.model_card_data.to_yaml()}
---

# Clusters of instructions

{self.num_clusters} clusters (k-means, Euclidean) of {self.num_texts or "an unknown number of"} instructions, in the
space of the sentence encoder `{self.encoder_name}` (width {self.embedding_dim}). Encoded text: `{self.template}`. Texts per cluster: {min(sizes)} to {max(sizes)}.

```python
from peft_moe import InstructionClusterer

clusterer = InstructionClusterer.from_pretrained("this repository")
clusterer.predict(["What colour is the car?"])
```

Made for [MoCLE]({self._hub_mixin_info.paper_url}). The files hold centroids and sizes, neither texts nor the encoder.
"""
        )


class _AddIds:
    """What `datasets.map` calls."""

    def __init__(self, clusterer: InstructionClusterer, output_column: str) -> None:
        self.clusterer, self.output_column = clusterer, output_column

    def __call__(self, texts: list[Any], rows: list[int]) -> dict[str, list[int]]:
        instructions = read_instructions(texts, self.clusterer.instruction_pattern, rows=rows)
        points = self.clusterer._encode(instructions, batch_size=64, show_progress=False)
        return {self.output_column: self.clusterer.predict_embeddings(points.vectors)[points.index].tolist()}
