"""Kernels for CUDA compile for their target GPUs, and fit their shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

_SHARED_BYTES_MAX = 227 << 10  # of a program on an H100 or H200


def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.kernels.compile_cuda"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    attention, deltas = {"_store", "_attend", "_join"}, {"_scale_inputs", "_shrink", "_fill", "_finish", "_expand"}
    odd, nf4 = {f"odd{name}" for name in deltas}, {"_multiply", "_add_up"}
    routers = {"_route"}
    assert {kernel["name"] for kernel in kernels} == attention | deltas | odd | nf4 | routers
    assert [kernel for kernel in kernels if kernel["shared"] > _SHARED_BYTES_MAX] == []
    # Addresses of weights come from memory: a kernel that does not state their alignment reads one number at a time.
    assert [kernel for kernel in kernels if kernel["name"] in deltas and kernel["narrow"]] == []
    odd = [kernel["narrow"] for kernel in kernels if kernel["name"] in ("odd_shrink", "odd_expand")]
    assert min(odd) > 0, "rows that begin anywhere can only be read so"
