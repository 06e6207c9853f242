"""`raygrpo` with a controller that stops for ever between the acknowledgements of a version and the gate.

    python tests/stalled_publish.py MARK VERSION train CONFIG ...

Touches the file MARK when it stands there, for a test that kills the driver at that moment.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import raygrpo.roles.controller
from raygrpo.cli import main

if __name__ == "__main__":
    mark, version = Path(sys.argv.pop(1)), int(sys.argv.pop(1))

    class StalledController(raygrpo.roles.controller.RolloutController):
        """Of this script, and so sent to the actor's process as it is."""

        def __init__(self, *arguments: Any, **settings: Any):
            super().__init__(*arguments, **settings)
            publish = self._pool.publish

            async def publish_and_stall(published: int, weights: list[Any]) -> Any:
                result = await publish(published, weights)
                if published == version:
                    mark.touch()
                    await asyncio.sleep(3600.0)
                return result

            self._pool.publish = publish_and_stall  # type: ignore[method-assign]

    raygrpo.roles.controller.RolloutController = StalledController  # type: ignore[misc]
    main()
