"""What transformers' shared tests import and their source distribution lacks.

`GenerationTesterMixin` is ours (`upstream.generation`); of the tests of exporters nothing is here. The processes of
the distributed tests are started by a server that has imported torch and transformers once, not by a fresh interpreter
each.
"""

from __future__ import annotations

import contextlib
import functools
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers

from upstream.generation import GenerationTesterMixin


__all__ = ["ExportTesterMixin", "GenerationTesterMixin", "config_common_kwargs", "run_distributed"]

config_common_kwargs: dict[str, Any] = {}
TIMEOUT = timedelta(seconds=60)
PRELOADED = [
    "transformers.models.auto.modeling_auto",
    "transformers.models.clip.modeling_clip",
    "transformers.models.llama.modeling_llama",
    "upstream.tester",
    "upstream.transformers_tests.test_expert_parallel_mixin",
    "upstream.transformers_tests.test_fsdp_mixin",
]


class ExportTesterMixin:
    """No tests."""


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="upstream-")


def scratch_folder() -> Path:
    """A folder of this process, removed at its end."""
    return Path(_scratch().name)


def empty_tiny_model_folder() -> Path:
    """A folder of tiny models as the tests of pipelines look for, with no model in it yet."""
    report = scratch_folder() / "tiny_models" / "reports" / "tiny_model_summary.json"
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps({}))
    return report.parent.parent


def run_distributed(world_size: int) -> Callable[[Callable], Callable]:
    """Decorator: run `function(rank, *args)` in `world_size` processes of a gloo group; raise what they raise."""

    def decorate(function: Callable) -> Callable:
        def run(*args: Any) -> None:
            with tempfile.TemporaryDirectory(dir=scratch_folder()) as folder:
                _start_rank_processes(
                    _in_group, args=(function, args, world_size, f"{folder}/rendezvous"), nprocs=world_size
                )

        return run

    return decorate


def _start_rank_processes(function: Callable, args: tuple, nprocs: int) -> None:
    multiprocessing.set_forkserver_preload(PRELOADED)
    # the server itself is not told where this process imports from
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path))):
        torch.multiprocessing.start_processes(
            _as_rank, args=(function, args), nprocs=nprocs, join=True, start_method="forkserver"
        )


def _as_rank(rank: int, function: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    # a rank that waits for one that has failed would wait for half an hour
    impatient = functools.partial(dist.init_process_group, timeout=TIMEOUT)
    with mock.patch.object(dist, "init_process_group", impatient), as_causal_lms():
        function(rank, *args)


def _in_group(rank: int, function: Callable, args: tuple, world_size: int, rendezvous: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    function(rank, *args)
    dist.destroy_process_group()


@contextlib.contextmanager
def as_causal_lms() -> Iterator[None]:
    """For the tests of FSDP, which build every model by `AutoModelForCausalLM` and train it on text.

    What sees images is frozen: it gets no gradient from text, and an optimizer without a state of it is not loaded.
    """
    from upstream.tester import TESTERS

    auto = transformers.AutoModelForCausalLM
    load = auto.from_pretrained

    def load_frozen(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        model.model.vision_tower.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(False)
        return model

    classes = {tester.config_class: tester.conditional_generation_class for tester in TESTERS.values()}
    with (
        mock.patch.dict(auto._model_mapping._extra_content, classes),
        mock.patch.object(auto, "from_pretrained", load_frozen),
    ):
        yield


def _get_distributed_backend() -> str:
    return "gloo"


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_rank_device(rank: int) -> torch.device:
    return torch.device("cpu")


def _set_rank_device(rank: int) -> None:
    torch.set_num_threads(1)
