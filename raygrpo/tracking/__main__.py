"""`python -m raygrpo.tracking RUN_DIR`: deliver to MLflow what a run could not while the server was away."""

from __future__ import annotations

import argparse
import sys

from raygrpo.tracking.tracker import replay


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m raygrpo.tracking", description=__doc__)
    parser.add_argument("run_dir", help="the run's directory (holds metrics.jsonl and spool/)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds to wait for the server (default: %(default)s)"
    )
    arguments = parser.parse_args()
    try:
        links = replay(arguments.run_dir, arguments.timeout)
    except ValueError as error:
        parser.error(str(error))
    if links.undelivered:
        print(
            f"{links.undelivered} steps and files still wait in {links.spool}: {links.tracking_uri} does not take them",
            file=sys.stderr,
        )
        return 1
    print(
        f"everything is in MLflow run {links.run_id} at {links.tracking_uri}"
        + (f": {links.run_url}" if links.run_url else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
