"""Engines for tests, started once each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raygrpo.config import GeneratorConfig, ModelConfig, SamplingConfig
from raygrpo.engines.sampling import SamplingEngine, make_engine
from tests.engines.vllm_process import KV_CACHE_BYTES, EngineManager, vllm_process
from tests.tiny_models import tiny_model

MAX_MODEL_LEN = 256


@pytest.fixture(scope="session")
def vllm_manager() -> Iterator[EngineManager]:
    pytest.importorskip("vllm.version", reason="vLLM is not installed")
    with vllm_process() as manager:
        yield manager


@pytest.fixture(scope="session")
def start_engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """start_engine("vllm", "qwen3", tie=.., dtype=.., vllm={..}, **sampling) -> (engine, directory of its model)."""
    started: dict[str, tuple[SamplingEngine, str]] = {}

    def start(
        engine: str,
        architecture: str = "qwen3",
        *,
        tie: bool = True,
        dtype: str = "float32",
        vllm: dict[str, Any] | None = None,
        **sampling: Any,
    ) -> tuple[SamplingEngine, str]:
        key = repr((engine, architecture, tie, dtype, vllm, sampling))
        if key not in started:
            path = str(tiny_model(tmp_path_factory.mktemp("model"), architecture, tie=tie, dtype=dtype, vocab_size=300))
            generator = GeneratorConfig(
                engine=engine,
                sampling=SamplingConfig(**{"max_tokens": 24} | sampling),
                vllm={"kv_cache_memory_bytes": KV_CACHE_BYTES} | (vllm or {}) if engine == "vllm" else {},
            )
            make = request.getfixturevalue("vllm_manager").make_engine if engine == "vllm" else make_engine
            model = ModelConfig(path=path, dtype=dtype)
            started[key] = make(model, generator, max_model_len=MAX_MODEL_LEN, num_threads=1), path
        return started[key]

    return start
