"""MLflow's UI on a store: a server of our own for a local one, an address for one that a server keeps."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable

START_TIMEOUT_S = 180.0  # a busy machine imports MLflow for a minute
STOP_TIMEOUT_S = 10.0


def is_server(uri: str) -> bool:
    """Whether the store is behind an address that a browser can open."""
    return uri.startswith(("http://", "https://"))


def open_browser(url: str) -> None:
    """Where there is a screen; elsewhere the printed address has to do."""
    if sys.platform == "darwin" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)


def serve(uri: str, port: int | None, on_ready: Callable[[str], None]) -> None:
    """Show the local store `uri` at a port of this machine, free to choose where it is None, until interrupted.

    on_ready: called with the address as soon as it answers. Raises RuntimeError where the server does not start or ends
    by itself; nothing of it is left in any case.
    """
    port = port or _free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port)]
    # Without the processes for jobs of MLflow's own (judges, scheduled scorers), of which there are seven.
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"} | os.environ
    server = subprocess.Popen(
        [*command, "--backend-store-uri", uri],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us: we end it
    )
    try:
        if _answers(url, server):
            on_ready(url)
            _, errors = server.communicate()  # reads on, or a full pipe would hold the server
        else:
            _, errors = server.communicate(timeout=STOP_TIMEOUT_S)
        raise RuntimeError(f"the MLflow server ended with code {server.returncode}:\n{errors[-2000:]}")
    except KeyboardInterrupt:
        pass
    finally:
        _stop(server)


def _answers(url: str, server: subprocess.Popen[str]) -> bool:
    """Wait until it does; False where it has ended. Raises RuntimeError after START_TIMEOUT_S."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            return True
        except (OSError, urllib.error.URLError):
            if time.monotonic() > deadline:
                raise RuntimeError(f"the MLflow server does not answer within {START_TIMEOUT_S:g} s") from None
            time.sleep(0.3)
    return False


def _stop(server: subprocess.Popen[str]) -> None:
    """The server and its workers: the process group that it leads."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, number)
            server.wait(STOP_TIMEOUT_S)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    server.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
