"""The conditions of a measurement, which every benchmark prints beside its table."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch


def conditions(*packages: str) -> dict[str, str]:
    """Return machine, versions, commit and day."""
    versions = {package: version(package) for package in ("torch", *packages)}
    machine = {"cpu": _cpu_name(), "cores": str(os.cpu_count()), "threads": str(torch.get_num_threads())}
    return {**machine, **versions, "commit": _commit(), "day": _day()}


def line(found: dict[str, str]) -> str:
    """Return the conditions in one line."""
    return ", ".join(_LINE.get(key, key + " {}").format(value) for key, value in found.items())


_LINE = {"cpu": "{}", "cores": "{} cores", "threads": "{} threads", "day": "{}"}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((text.partition(":")[2].strip() for text in lines if text.startswith("model name")), "unknown")


def _commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--exclude", "*"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


def _day() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"
