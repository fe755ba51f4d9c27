"""The GPU benchmark runs from end to end without a GPU, and its formulas give known numbers."""

import json
from pathlib import Path

import pytest
import torch
from benchmarks import gpu, roofline
from benchmarks.gpu_base import SHAPES, Loras, make_base
from benchmarks.roofline import Device, Work

from weft.config import Quantization
from weft.methods.protocol import SiteKind

CPU = torch.device("cpu")


def test_every_row_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    assert gpu.main(["--shape", "tiny", "--device", "cpu", "--output", str(path)]) == 0
    written = json.loads(path.read_text())
    assert {row["row"] for row in written["rows"]} == {f"G{number}" for number in range(1, 11)}
    values = {row["what"]: row["value"] for row in written["rows"] if not row["note"]}
    assert [row["row"] for row in written["rows"] if row["note"]] == ["G9"], "a CPU has no device time"
    assert all(row["bound"] > row["value"] for row in written["rows"] if row["unit"] == "tok/s")
    assert len(values) == 12
    assert all(row["is_met"] is None for row in written["rows"]), "targets are for a GPU and the large shape"
    assert capsys.readouterr().out.count("not judged") == 12


def test_rows_that_fail_or_come_too_late_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(bench: gpu.Bench) -> list[gpu.Result]:
        """G3, G5: of no use."""
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "ROWS", (broken,))
    path = tmp_path / "gpu.json"
    arguments = ["--shape", "tiny", "--device", "cpu", "--output", str(path)]
    assert gpu.main(arguments) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["row"], row["value"], row["note"]) == ("G3", None, "RuntimeError: out of memory")
    assert gpu.main([*arguments, "--minutes", "-1"]) == 1
    (row,) = json.loads(path.read_text())["rows"]
    assert row["note"] == "no time was left"


def test_without_bitsandbytes_the_base_is_bf16_and_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.quantization_on(CPU) == (Quantization.NF4, "")

    def missing(*arguments: object, **named: object) -> None:
        raise RuntimeError("no library for this device")

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", missing)
    quantization, why = gpu.quantization_on(CPU)
    assert quantization is Quantization.NONE
    assert "no library for this device" in why


def test_the_roofline_of_known_numbers() -> None:
    device = Device("one", bytes_per_s=1000.0, flops_per_s=1e6)
    work = Work(weight_bytes=400, kv_bytes_per_token=2, flops_per_row=100)
    # (400 + 10 · 5 · 2 + 500) bytes take a second; ten rows are ten tokens.
    assert roofline.bound(device, work, rows=10, context=5, adapter_bytes=500) == pytest.approx(10.0)
    # 1e5 rows · 100 operations take ten seconds, 1e4 tokens each; the bytes less.
    busy = Work(weight_bytes=400, kv_bytes_per_token=0, flops_per_row=100)
    assert roofline.bound(device, busy, rows=10**5, context=5, adapter_bytes=0) == pytest.approx(1e4)


@pytest.mark.parametrize("quantization", [Quantization.NF4, Quantization.NONE])
def test_what_a_step_reads_of_a_base(quantization: Quantization) -> None:
    shape = SHAPES["tiny"]
    work = roofline.work_of(make_base(shape, CPU, quantization))
    hidden, ffn, kv = shape.hidden_size, shape.intermediate_size, 2 * 16
    linear = shape.num_layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn)
    head = shape.vocab_size * hidden
    per_weight = 0.5 + 4 / 64 if quantization is Quantization.NF4 else 2
    assert work.weight_bytes == per_weight * linear + 2 * head
    assert work.flops_per_row == 2 * (linear + head)
    assert work.kv_bytes_per_token == 2 * 2 * shape.num_layers * kv


def test_loras_differ_and_have_the_bytes_that_the_bound_counts() -> None:
    shape = SHAPES["tiny"]
    base = make_base(shape, CPU, Quantization.NONE)
    loras = Loras(base.shape, CPU, rank=4, num_buffers=2)
    buffers = [loras.packed(index).buffer for index in range(3)]
    assert not buffers[0].equal(buffers[1])
    assert buffers[2].equal(buffers[0])
    sites = base.shape.of_kind(SiteKind.LINEAR)
    assert loras.size_bytes == sum(2 * 4 * (site.in_features + site.out_features) for site in sites)
