"""What the controller does beside its calls, again and again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger(__name__)

PAUSE_S = 1.0  # before a loop that failed goes on


async def keep_running(name: str, loop: Callable[[], Awaitable[None]], warn: Callable[[str], None]) -> None:
    """Run the loop to its end, and begin it anew when it raises: without its pool's size, its watchdog or its gauges a
    run is worse off, but goes on. Each error is logged, and a person is told of it unless it is the one before."""
    told = ""
    while True:
        try:
            await loop()
            return
        except Exception as error:
            logger.exception("%s failed, and begins anew", name)
            text = f"{name} failed, and begins anew: {type(error).__name__}: {error}"
            if text != told:
                warn(text)
            told = text
            await asyncio.sleep(PAUSE_S)
