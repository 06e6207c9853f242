"""What one machine is doing: names as MLflow's own, for the System metrics tab of its UI."""

from __future__ import annotations

import os
import threading
from typing import Any

from raygrpo.types import StepMetrics

PREFIX = "system/"


class MachineMetrics:
    """CPU as the mean since the call before, memory, disk, and NVIDIA GPUs where there are some. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cpu = cpu_seconds()

    def __call__(self) -> StepMetrics:
        import psutil

        memory = psutil.virtual_memory()
        metrics = {
            "cpu_utilization_percentage": self._cpu_percentage(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": psutil.disk_usage(os.sep).percent,
        }
        return {PREFIX + name: value for name, value in (metrics | _gpu_metrics()).items()}

    def _cpu_percentage(self) -> float:
        """psutil.cpu_percent looks back to the last call in the same thread; an actor is called in several."""
        with self._lock:
            before, self._cpu = self._cpu, cpu_seconds()
            busy, passed = (now - then for now, then in zip(self._cpu, before, strict=True))
        return min(100.0, max(0.0, 100 * busy / passed)) if passed > 0 else 0.0


def cpu_seconds() -> tuple[float, float]:
    """(busy, all): seconds of all cores since the machine started."""
    import psutil

    times = psutil.cpu_times()
    passed = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)  # user and nice hold these
    return passed - times.idle - getattr(times, "iowait", 0.0), passed


def of_node(metrics: StepMetrics, node: str) -> StepMetrics:
    """The same under the name of a node, as MLflow writes it where a run has several."""
    return {f"{PREFIX}{node}/{name.removeprefix(PREFIX)}": value for name, value in metrics.items()}


def _gpu_metrics() -> StepMetrics:
    try:
        import pynvml  # type: ignore[import-not-found]  # vLLM for CUDA brings it along

        pynvml.nvmlInit()
    except Exception:  # no such package, no driver, no GPU
        return {}
    metrics: StepMetrics = {}
    try:
        for i in range(pynvml.nvmlDeviceGetCount()):
            device: Any = pynvml.nvmlDeviceGetHandleByIndex(i)
            memory, rates = pynvml.nvmlDeviceGetMemoryInfo(device), pynvml.nvmlDeviceGetUtilizationRates(device)
            metrics[f"gpu_{i}_utilization_percentage"] = float(rates.gpu)
            metrics[f"gpu_{i}_memory_usage_megabytes"] = memory.used / 1e6
            metrics[f"gpu_{i}_memory_usage_percentage"] = 100 * memory.used / memory.total
            metrics[f"gpu_{i}_power_usage_watts"] = pynvml.nvmlDeviceGetPowerUsage(device) / 1e3
    except pynvml.NVMLError:  # a device that does not tell this, or is gone: what was read stands
        pass
    finally:
        pynvml.nvmlShutdown()
    return metrics
