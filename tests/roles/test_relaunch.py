"""A generator whose constructor fails for a while, as a real actor that Ray gives up."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from raygrpo.config import GeneratorConfig
from raygrpo.roles.generator_pool import GeneratorPool
from tests.fake_generator import FakeGenerator, Script


class Unstartable(FakeGenerator):
    """It does not start where the file says no."""

    def __init__(self, name: str, mark: str):
        if Path(mark).exists():
            raise OSError("no memory is left")
        super().__init__(name, Script())


async def is_not_given_up(actor: Any) -> bool:
    try:
        await actor.status.remote()
    except ActorDiedError:
        return False
    except ActorUnavailableError:  # it is being restarted
        pass
    return True


@pytest.mark.slow
def test_an_actor_that_ray_has_given_up_is_launched_again(ray_session, tmp_path):
    mark = tmp_path / "full"

    def launch(name: str, again: bool = False) -> Any:
        ray_name = f"relaunched-{name}" + (f"-{time.time_ns()}" if again else "")  # as GeneratorLauncher
        actor = ray_session.remote(Unstartable).options(name=ray_name, num_cpus=0.01, max_restarts=-1)
        return actor.remote(name, str(mark))

    async def run() -> list[str]:
        warnings: list[str] = []
        pool = GeneratorPool(
            {name: launch(name) for name in ("a", "b")}, GeneratorConfig(), asyncio.Condition(), warnings.append, launch
        )
        await pool.publish(0, [ray_session.put({"version": 0})])
        first = pool.generators["b"]
        mark.touch()
        ray_session.kill(first, no_restart=False)
        async with asyncio.timeout(60):
            while await is_not_given_up(first):
                await asyncio.sleep(0.1)
            pool.quarantine("b", restart=False)
            while not warnings:
                await asyncio.sleep(0.01)
            mark.unlink()
            while "b" not in pool.healthy:
                await asyncio.sleep(0.01)
        assert pool.generators["b"] is not first and pool.dead == {}
        assert (await pool.generators["b"].status.remote()).version == 0
        for handle in pool.generators.values():
            ray_session.kill(handle)
        return warnings

    first, *_, last = asyncio.run(run())
    assert first.startswith("b could not be started: launched again (1 of 3)") and "no memory is left" in first
    assert last == "b is back, with version 0"
