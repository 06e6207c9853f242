"""vLLM in a process of its own, for tests.

vLLM changes the process it runs in (environment, torch's threads and compiler), which other tests must not notice; and
importing it takes seconds. So one process serves all engines of a test session, through proxies with the methods of
`SamplingEngine`.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.managers import BaseManager, BaseProxy
from pathlib import Path
from typing import Any
from unittest import mock

from raygrpo.config import GeneratorConfig, ModelConfig, SamplingConfig
from raygrpo.engines.sampling import make_engine

KV_CACHE_BYTES = 32 * 2**20
# Of the process that serves: a manager answers from several threads, and every thread has its own number of OpenMP
# threads.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


class EngineProxy(BaseProxy):
    _exposed_ = ("__getattribute__", "add_group", "step", "abort_group", "score", "load_weights", "pull_weights")

    def __getattr__(self, name: str) -> Any:
        if name in ("num_unfinished", "num_cached_tokens"):
            return self._callmethod("__getattribute__", (name,))
        if name in self._exposed_:
            return lambda *args: self._callmethod(name, args)
        raise AttributeError(name)


class EngineManager(BaseManager):
    """`make_engine` with the arguments of raygrpo.engines.sampling.make_engine gives a proxy."""


EngineManager.register("make_engine", make_engine, proxytype=EngineProxy)


@contextmanager
def vllm_process() -> Iterator[EngineManager]:
    manager = EngineManager(ctx=multiprocessing.get_context("spawn"))
    with mock.patch.dict(os.environ, ENVIRONMENT):
        manager.start()
    try:
        yield manager
    finally:
        manager.shutdown()


def vllm_logprobs(path: str | Path, prompt_ids: list[int], completion_ids: list[int]) -> list[float]:
    """[C]: what a fresh vLLM makes of the model saved in `path`: a check that an exported directory is whole."""
    generator = GeneratorConfig(sampling=SamplingConfig(max_tokens=1), vllm={"kv_cache_memory_bytes": KV_CACHE_BYTES})
    max_model_len = len(prompt_ids) + len(completion_ids) + 1
    with vllm_process() as process:
        engine = process.make_engine(ModelConfig(path=str(path)), generator, max_model_len=max_model_len, num_threads=1)
        return engine.score(prompt_ids, completion_ids)
