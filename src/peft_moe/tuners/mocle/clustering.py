"""`InstructionClusterer`: groups instructions by k-means on sentence embeddings, and finds the group of a new one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCard, ModelHubMixin

from .encoder import DEFAULT_ENCODER, SentenceEncoder
from .instructions import PLACE_OF_INSTRUCTION, Texts, check_text_settings, read_instructions
from .report import ClusterCandidate, ClusterChoice, ClusterReport


if TYPE_CHECKING:
    import datasets
    import numpy


KMEANS_MAX_TEXTS = 50_000
KMEANS_NUM_STARTS = 10
MINI_BATCH_SIZE = 4096
CHUNK_SIZE = 4096
TIE_TOLERANCE = 1e-9
SILHOUETTE_MAX_TEXTS = 5_000
DEFAULT_CANDIDATES = (2, 4, 8, 16, 32, 64)
FORMAT_VERSION = 1
"""of every file with centroids that this package writes"""
SAVED_SETTINGS = (
    "encoder_name",
    "template",
    "instruction_pattern",
    "num_clusters",
    "embedding_dim",
    "seed",
    "num_texts",
    "centroids_sha256",
)
WEIGHTS_FILE, CONFIG_FILE = "clusterer.safetensors", "clusterer_config.json"


def nearest_centroid(embeddings: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """The centroid at the smallest Euclidean distance from each embedding; of equally near ones the first.

    Computes in float64 and in chunks, so that the answer for a row does not depend on the other rows.

    Args:
        embeddings (`torch.Tensor`): shape `(N, C)`.
        centroids (`torch.Tensor`): shape `(K, C)`.

    Returns:
        `torch.Tensor`: shape `(N,)`, int64, on the device of `embeddings`.

    Raises:
        ValueError: shapes do not fit, or values are not finite.

    >>> nearest_centroid(torch.tensor([[0.9, 0.1]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([1])
    """
    if embeddings.dim() != 2 or centroids.dim() != 2 or embeddings.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"Embeddings of shape {tuple(embeddings.shape)} do not fit centroids of shape {tuple(centroids.shape)}: "
            "(N, C) and (K, C) are needed. Use the encoder that the centroids were made with."
        )
    for name, values in (("embeddings", embeddings), ("centroids", centroids)):
        if not torch.isfinite(values).all():
            raise ValueError(f"The {name} hold values that are not finite, so no centroid is the nearest.")
    centres = centroids.detach().cpu().double()
    lengths = centres.square().sum(dim=1)
    nearest = torch.empty(embeddings.shape[0], dtype=torch.long)
    for start in range(0, embeddings.shape[0], CHUNK_SIZE):
        chunk = embeddings[start : start + CHUNK_SIZE].detach().cpu().double()
        # the square of the embedding itself is the same for all centroids
        distances = lengths - 2 * chunk @ centres.T
        tolerance = TIE_TOLERANCE * (lengths.max() + chunk.square().sum(dim=1, keepdim=True))
        is_nearest = distances <= distances.min(dim=1, keepdim=True).values + tolerance
        nearest[start : start + CHUNK_SIZE] = is_nearest.int().argmax(dim=1)
    return nearest.to(embeddings.device)


class InstructionClusterer(
    ModelHubMixin,
    library_name="peft_moe",
    tags=["clustering", "mocle"],
    paper_url="https://huggingface.co/papers/2312.12379",
):
    """Clusters of instructions, by k-means on the vectors of a sentence encoder.

    After MoCLE (https://huggingface.co/papers/2312.12379), where the cluster of an instruction decides which expert
    works on an example. Make one with [`~InstructionClusterer.fit`], keep it with `save_pretrained` or `push_to_hub`,
    get it back with `from_pretrained`. What is kept is the centroids, their sizes and the name of the encoder: neither
    its weights nor any text, and no pickle.

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
        check_text_settings(template, instruction_pattern)
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
        self.encoder = as_encoder(encoder)
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
        check_text_settings(template, instruction_pattern)
        _check_count("num_clusters", num_clusters)
        instructions = read_instructions(texts, instruction_pattern)
        _check_enough(len(set(instructions)), num_clusters, what="instructions")
        encoder = as_encoder(encoder)
        points = _DistinctTexts.encode(
            instructions, encoder, template, batch_size=batch_size, show_progress=show_progress
        )
        centroids = torch.from_numpy(points.cluster(num_clusters, seed).cluster_centers_)
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
            ValueError: `column` is missing, `output_column` is there already, or (during the work, with its index) a
                row has no instruction.
        """
        import datasets

        kinds = (datasets.Dataset, datasets.DatasetDict, datasets.IterableDataset, datasets.IterableDatasetDict)
        if not isinstance(dataset, kinds):
            raise ValueError(
                f"add_cluster_ids takes a data set of the library datasets, but got a {type(dataset).__name__}. "
                "predict gives the clusters of a list."
            )
        if isinstance(dataset, dict):
            for split in dataset.values():
                _check_columns(split, column, new_column=output_column)
            settings: dict[str, Any] = {"output_column": output_column, "batch_size": batch_size}
            splits = {name: self.add_cluster_ids(split, column, **settings) for name, split in dataset.items()}
            return type(dataset)(splits)
        _check_columns(dataset, column, new_column=output_column)
        options: dict[str, Any] = {"batched": True, "batch_size": batch_size, "with_indices": True}
        options |= {"input_columns": [column], "fn_kwargs": {"output_column": output_column}}
        if isinstance(dataset, datasets.Dataset):
            options["desc"] = "Assigning clusters"
        if dataset.features is not None:
            options["features"] = datasets.Features({**dataset.features, output_column: datasets.Value("int64")})
        return dataset.map(self._ids_of_rows, **options)

    def _ids_of_rows(self, texts: list[Any], rows: list[int], *, output_column: str) -> dict[str, list[int]]:
        instructions = read_instructions(texts, self.instruction_pattern, rows=rows)
        points = self._encode(instructions, batch_size=64, show_progress=False)
        return {output_column: self.predict_embeddings(points.vectors)[points.index].tolist()}

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
        if isinstance(texts, dict) or (column is None) == hasattr(texts, "column_names"):
            raise ValueError(
                f"report takes a list of texts, or one data set and the column that holds them, but got a "
                f"{type(texts).__name__} and column={column!r}."
            )
        if hasattr(texts, "column_names"):
            _check_columns(texts, column, domain_column)
            domains = None if domain_column is None else [str(name) for name in texts[domain_column]]
            texts = texts[column]
        instructions = read_instructions(texts, self.instruction_pattern)
        points = self._encode(instructions, batch_size=batch_size, show_progress=show_progress)
        ids = self.predict_embeddings(points.vectors)
        distances = (points.vectors - self.centroids[ids]).square().sum(dim=1).tolist()
        members: list[list[tuple[float, str]]] = [[] for _ in range(self.num_clusters)]
        for cluster, distance, text in zip(ids.tolist(), distances, points.texts, strict=True):
            members[cluster].append((distance, text))
        examples = tuple(tuple(text for _, text in sorted(group)[:num_examples]) for group in members)
        return ClusterReport.of(ids[points.index].tolist(), examples, domains)

    def _encode(self, instructions: list[str], *, batch_size: int, show_progress: bool) -> _DistinctTexts:
        if self.encoder.embedding_dim != self.embedding_dim:
            raise ValueError(
                f"The encoder {self.encoder.name_or_path!r} gives vectors of width {self.encoder.embedding_dim}, but "
                f"the centroids are of width {self.embedding_dim}. Use the encoder that they were made with, "
                f"{self.encoder_name!r}, or fit again."
            )
        return _DistinctTexts.encode(
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
        from safetensors.torch import save_file

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"centroids": self.centroids, "cluster_sizes": self.cluster_sizes}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        settings = {"format_version": FORMAT_VERSION, **{name: getattr(self, name) for name in SAVED_SETTINGS[:-1]}}
        settings["centroids_sha256"] = checksum(self.centroids)
        (folder / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
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
            OSError: there is no such folder and the Hub does not give the files.
        """
        hub_options: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        settings, tensors = _read_clusterer(str(pretrained_model_name_or_path), hub_options)
        clusterer = cls(
            tensors["centroids"],
            encoder=settings["encoder_name"],
            cluster_sizes=tensors["cluster_sizes"],
            **{key: settings[key] for key in ("template", "instruction_pattern", "seed", "num_texts")},
        )
        if encoder is not None:
            clusterer.encoder = as_encoder(encoder)
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
space of the sentence encoder `{self.encoder_name}` (width {self.embedding_dim}). Encoded text: `{self.template}`.
Texts per cluster: {min(sizes)} to {max(sizes)}.

```python
from peft_moe import InstructionClusterer

clusterer = InstructionClusterer.from_pretrained("this repository")
clusterer.predict(["What colour is the car?"])
```

Made for [MoCLE]({self._hub_mixin_info.paper_url}). The files hold centroids and sizes, neither texts nor the encoder.
"""
        )


def choose_num_clusters(
    texts: Texts,
    candidates: Sequence[int] = DEFAULT_CANDIDATES,
    *,
    encoder: str | Path | SentenceEncoder = DEFAULT_ENCODER,
    template: str = PLACE_OF_INSTRUCTION,
    instruction_pattern: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    show_progress: bool = True,
) -> ClusterChoice:
    """Try several numbers of clusters on the same vectors, as [`InstructionClusterer.fit`] would make them.

    The silhouette is Euclidean, over different instructions, on a seeded sample above 5,000 of them
    (`SILHOUETTE_MAX_TEXTS`). It says how well groups are separated, not how well a model trained on them will be: take
    it as a hint. The paper has no such step.

    Args:
        texts (`Iterable`): texts or chats.
        candidates (`Sequence[int]`): numbers of clusters to try, each at least 2.
        encoder, template, instruction_pattern, seed, batch_size, show_progress: as in [`InstructionClusterer.fit`].

    Raises:
        ValueError: no candidates, one below 2, or one that is not below the number of different instructions; or as in
            [`InstructionClusterer.fit`].

    Example:

    ```py
    >>> choice = choose_num_clusters(dataset["prompt"], (4, 16, 64))
    >>> print(choice)
    >>> clusterer = InstructionClusterer.fit(dataset["prompt"], choice.best)
    ```
    """
    check_text_settings(template, instruction_pattern)
    if not candidates:
        raise ValueError("candidates is empty: name at least one number of clusters to try.")
    for candidate in candidates:
        _check_count("each of candidates", candidate, at_least=2)
    instructions = read_instructions(texts, instruction_pattern)
    if max(candidates) >= (num_distinct := len(set(instructions))):
        raise ValueError(
            f"{max(candidates)} clusters of {num_distinct} different instructions have no silhouette: some cluster "
            f"has to have two of them. Name candidates of at most {num_distinct - 1}, or add texts."
        )
    points = _DistinctTexts.encode(
        instructions, as_encoder(encoder), template, batch_size=batch_size, show_progress=show_progress
    )
    # the largest first: the vectors may turn out to be too few for it
    tried = [_try(points, candidate, seed) for candidate in sorted(set(candidates), reverse=True)]
    return ClusterChoice(tuple(reversed(tried)))


def _try(points: _DistinctTexts, num_clusters: int, seed: int) -> ClusterCandidate:
    model = points.cluster(num_clusters, seed)
    ids = nearest_centroid(points.vectors, torch.from_numpy(model.cluster_centers_))
    sizes = torch.bincount(ids, minlength=num_clusters)
    return ClusterCandidate(
        num_clusters,
        inertia=float(model.inertia_),
        silhouette=_silhouette(points.vectors.numpy(), ids.numpy(), seed),
        min_size=int(sizes.min()),
        max_size=int(sizes.max()),
    )


def _silhouette(vectors: numpy.ndarray, ids: numpy.ndarray, seed: int) -> float:
    import numpy as np
    from sklearn.metrics import silhouette_score

    if len(vectors) > SILHOUETTE_MAX_TEXTS:
        chosen = np.random.default_rng(seed).choice(len(vectors), SILHOUETTE_MAX_TEXTS, replace=False)
        vectors, ids = vectors[chosen], ids[chosen]
    return float(silhouette_score(vectors, ids)) if 1 < len(np.unique(ids)) < len(ids) else math.nan


@dataclass(frozen=True)
class _DistinctTexts:
    """Different texts, their vectors `(D, C)`, how often each occurs `(D,)`, which one each of N texts is `(N,)`."""

    texts: list[str]
    vectors: torch.Tensor
    weights: torch.Tensor
    index: torch.Tensor

    @classmethod
    def encode(
        cls, instructions: list[str], encoder: SentenceEncoder, template: str, *, batch_size: int, show_progress: bool
    ) -> _DistinctTexts:
        places = {text: place for place, text in enumerate(dict.fromkeys(instructions))}
        index = torch.tensor([places[text] for text in instructions])
        vectors = encoder.encode(
            [template.replace(PLACE_OF_INSTRUCTION, text) for text in places],
            batch_size=batch_size,
            show_progress=show_progress,
        )
        return cls(list(places), vectors, torch.bincount(index).float(), index)

    def cluster(self, num_clusters: int, seed: int) -> Any:
        """The fitted k-means of scikit-learn."""
        import numpy as np
        from sklearn.cluster import KMeans, MiniBatchKMeans

        # different texts have the same vector where they differ in what the encoder does not see
        _check_enough(len(np.unique(self.vectors.numpy().round(5), axis=0)), num_clusters, what="embeddings")
        settings: dict[str, Any] = {"n_init": KMEANS_NUM_STARTS, "random_state": seed}
        if len(self.texts) <= KMEANS_MAX_TEXTS:
            model = KMeans(num_clusters, **settings)
        else:
            model = MiniBatchKMeans(num_clusters, batch_size=MINI_BATCH_SIZE, **settings)
        return model.fit(self.vectors.numpy(), sample_weight=self.weights.numpy())


def _check_enough(num_distinct: int, num_clusters: int, *, what: str) -> None:
    if num_clusters > num_distinct:
        raise ValueError(
            f"{num_clusters} clusters were asked for, but there are only {num_distinct} different {what}. Ask for at "
            f"most {num_distinct}, or add texts."
        )


def _check_count(name: str, value: Any, *, at_least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name} has to be a whole number of at least {at_least}, but is {value!r}.")


def as_encoder(encoder: str | Path | SentenceEncoder) -> SentenceEncoder:
    """The encoder, made of its name where it is not there yet."""
    return encoder if isinstance(encoder, SentenceEncoder) else SentenceEncoder(encoder)


def _check_columns(dataset: Any, *columns: str | None, new_column: str | None = None) -> None:
    # a stream does not always know its columns
    names = dataset.column_names if dataset.column_names is not None else list(next(iter(dataset), {}))
    for column in columns:
        if column is not None and column not in names:
            raise ValueError(f"The data set has no column {column!r}. Its columns are {names}.")
    if new_column in names:
        raise ValueError(
            f"The data set already has a column {new_column!r}. Remove it with "
            f"dataset.remove_columns({new_column!r}), or name another output_column."
        )


def checksum(centroids: torch.Tensor) -> str:
    """SHA-256 of centroids `(K, C)`, as little-endian float32."""
    return hashlib.sha256(centroids.detach().float().cpu().numpy().astype("<f4").tobytes()).hexdigest()


def find_file(name: str, file: str, hub_options: dict[str, Any]) -> Path:
    """A file of a folder, or of a repository on the Hub.

    Raises:
        ValueError: the folder does not hold it.
        OSError: there is no such folder, and the Hub does not give the file.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / file).is_file():
            raise ValueError(
                f"{name!r} holds no {file}. Give the whole folder that save_pretrained or export_all wrote."
            )
        return folder / file
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(name, file, **hub_options))
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise OSError(
            f"{name!r} is no folder here, and {file} did not come from the Hub ({type(error).__name__}). Check the "
            "name and the network (is HF_HUB_OFFLINE set?)."
        ) from error


def read_settings(name: str, file: Path, needed: Sequence[str]) -> dict[str, Any]:
    """The content of a json file of the folder or repository `name`, with at least the keys `needed`.

    Raises:
        ValueError: it is damaged, or was written in a newer format.
    """
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        is_newer = settings["format_version"] > FORMAT_VERSION
        absent = [key for key in needed if key not in settings]
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(name, file.name, f"{type(error).__name__}: {error}") from error
    if is_newer:
        raise ValueError(
            f"{file.name} in {name!r} has format {settings['format_version']}, but this version of peft_moe reads up "
            f"to {FORMAT_VERSION}. Upgrade it: pip install -U peft-moe."
        )
    if absent:
        raise damaged(name, file.name, f"it lacks {absent}")
    return settings


def damaged(name: str, file: str, what: str) -> ValueError:
    """The error of a file that cannot be used, or that comes from elsewhere than those beside it."""
    return ValueError(
        f"{file} in {name!r} is damaged or does not belong to the files beside it: {what}. Nothing was loaded. Fetch "
        "or save the whole folder again."
    )


def _read_clusterer(name: str, hub_options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The settings and tensors of a saved clusterer, checked against each other."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config_file, weights_file = (find_file(name, file, hub_options) for file in (CONFIG_FILE, WEIGHTS_FILE))
    settings = read_settings(name, config_file, SAVED_SETTINGS)
    try:
        # copies: the file may be written again while its tensors are in use
        tensors = {key: tensor.clone() for key, tensor in load_file(weights_file).items()}
        shapes = [tuple(tensors[key].shape) for key in ("centroids", "cluster_sizes")]
        found = checksum(tensors["centroids"])
    except (KeyError, SafetensorError) as error:
        raise damaged(name, weights_file.name, f"{type(error).__name__}: {error}") from error
    shape = (settings["num_clusters"], settings["embedding_dim"])
    if shapes != [shape, shape[:1]] or found != settings["centroids_sha256"]:
        raise damaged(name, weights_file.name, "the centroids are not those that were saved (other shape or checksum)")
    return settings, tensors
