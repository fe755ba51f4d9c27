"""Counts the calls of a function with the interpreter's own profiler: every Python call and every call into C."""

import gc
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")


def counted(function: Callable[[], T]) -> tuple[T, Counter[str]]:
    """Return a function's result and its calls: "file.py:qualified name", or "C:qualified name"."""
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            calls[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_qualname}"] += 1
        elif event == "c_call":
            calls[f"C:{getattr(argument, '__qualname__', argument)}"] += 1

    gc.disable()  # its callbacks would be counted
    sys.setprofile(count)
    try:
        return function(), calls
    finally:
        sys.setprofile(None)
        gc.enable()
