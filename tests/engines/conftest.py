"""Engines for tests: started once each, vLLM in a process of its own.

vLLM changes the process it runs in (environment, torch's threads and compiler), which the tests beside these must not
notice; and importing it takes seconds. So one process serves all of its engines, through a proxy with the methods of
`SamplingEngine`.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.managers import BaseManager, BaseProxy
from typing import Any

import pytest

from raygrpo.config import GeneratorConfig, ModelConfig, SamplingConfig
from raygrpo.engines.sampling import SamplingEngine, make_engine
from tests.tiny_models import tiny_model

MAX_MODEL_LEN = 256


class EngineProxy(BaseProxy):
    _exposed_ = ("__getattribute__", "add_group", "step", "abort_group", "score", "load_weights")

    def __getattr__(self, name: str) -> Any:
        if name in ("num_unfinished", "num_cached_tokens"):
            return self._callmethod("__getattribute__", (name,))
        if name in self._exposed_:
            return lambda *args: self._callmethod(name, args)
        raise AttributeError(name)


class EngineManager(BaseManager):
    pass


EngineManager.register("make_engine", make_engine, proxytype=EngineProxy)


@pytest.fixture(scope="session")
def vllm_process() -> Iterator[EngineManager]:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    manager = EngineManager(ctx=multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # a manager answers from several threads, and each has its own number
        patch.setenv("VLLM_LOGGING_LEVEL", "ERROR")
        manager.start()
    yield manager
    manager.shutdown()


@pytest.fixture(scope="session")
def start_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """start_engine("vllm", architecture, tie=.., dtype=.., vllm={..}, **sampling) -> (engine, its model's directory)."""
    started: dict[str, tuple[SamplingEngine, str]] = {}

    def start(
        engine: str,
        architecture: str = "qwen3",
        *,
        tie: bool = True,
        dtype: str = "float32",
        vllm: Any = None,
        **sampling: Any,
    ):
        key = repr((engine, architecture, tie, dtype, vllm, sampling))
        if key not in started:
            path = str(tiny_model(tmp_path_factory.mktemp("model"), architecture, tie=tie, dtype=dtype, vocab_size=300))
            generator = GeneratorConfig(
                engine=engine,
                sampling=SamplingConfig(**{"max_tokens": 24} | sampling),
                vllm={"kv_cache_memory_bytes": 32 * 2**20} | (vllm or {}) if engine == "vllm" else {},
            )
            make = request.getfixturevalue("vllm_process").make_engine if engine == "vllm" else make_engine
            model = ModelConfig(path=path, dtype=dtype)
            started[key] = make(model, generator, max_model_len=MAX_MODEL_LEN, num_threads=1), path
        return started[key]

    return start
