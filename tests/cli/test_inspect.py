"""`weft inspect`: the table of a base, and the content of an adapter."""

import json
from pathlib import Path

from tests import tiny
from tests.bases import Bases
from tests.cli.conftest import Weft
from weft.methods.checkpoint import directory
from weft.model.loader import Base

HELD = ("--quantization", "none", "--device", "cpu")


def test_a_base_is_told_as_a_table(weft: Weft, path: Path) -> None:
    result = weft("inspect", str(path), *HELD, "--method", "lora", "--method", "ia3", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert "full fine-tuning, ratio 1" in result.output
    assert "overhead, measured" in result.output
    assert "Σ R(I + O)" in result.output
    assert "2 × 8·(128 + 64)" in result.output
    assert "4 × 32 + 2 × 128" in result.output
    assert "prefix" not in result.output


def test_a_base_is_told_as_json(weft: Weft, path: Path, base: Base) -> None:
    result = weft("inspect", str(path), *HELD, "--repeats", "0", "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["digest"] == base.shape.digest
    assert told["forward_s_measured"] is None
    by_method = {one["method"]: one for one in told["methods"]}
    assert by_method["prefix"]["num_parameters"] == by_method["prefix"]["num_parameters_by_formula"] == 2 * 16 * 2 * 32
    assert by_method["prefix"]["ratio"] == told["num_parameters"] / (2 * 16 * 2 * 32)


def test_an_adapter_is_told(weft: Weft, path: Path, base: Base, tmp_path: Path) -> None:
    directory.write(tiny.random_lora(base.shape, rank=3, seed=1, targets=("q_proj",)), tmp_path, base.shape)
    result = weft("inspect", str(tmp_path), "--base", str(path), *HELD)
    assert result.exit_code == 0, result.output
    assert "the one that it was trained for" in result.output
    assert "NOT" not in result.output
    assert "model.layers.1.self_attn.q_proj  ‖ΔW‖" in result.output
    told = json.loads(weft("inspect", str(tmp_path), "--base", str(path), *HELD, "--json").stdout)
    assert (told["method"], told["rank"], told["modules"]) == ("lora", 3, ["q_proj"])
    assert told["num_parameters"] == 2 * 3 * (64 + 64)
    assert told["slot_bytes"] == 4 * told["num_parameters"]
    assert told["base_matches"] is True
    assert [one["site"] for one in told["norms"]] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_another_base_of_the_same_shape_is_told_apart(weft: Weft, path: Path, base: Base, tmp_path: Path) -> None:
    directory.write(tiny.random_prefix(base.shape, length=4, seed=1), tmp_path / "adapter", base.shape)
    other = tiny.save_base(tmp_path / "base", seed=1)
    told = json.loads(weft("inspect", str(tmp_path / "adapter"), "--base", str(other), *HELD, "--json").stdout)
    assert told["base_matches"] is False
    assert told["trained_for_digest"] == base.shape.digest
    assert told["num_virtual_tokens"] == 4
    shown = weft("inspect", str(tmp_path / "adapter"), "--base", str(other), *HELD)
    assert "NOT the one that it was trained for" in shown.output


def test_what_cannot_be_inspected_is_said(weft: Weft, path: Path, base: Base, bases: Bases, tmp_path: Path) -> None:
    directory.write(tiny.random_ia3(base.shape, seed=1), tmp_path / "adapter", base.shape)
    result = weft("inspect", str(tmp_path / "adapter"))
    assert (result.exit_code, "--base: must name the model directory" in result.stderr) == (2, True)
    result = weft("inspect", str(path), "--base", str(path))
    assert (result.exit_code, "--base: is for adapters" in result.stderr) == (2, True)
    result = weft("inspect", str(tmp_path / "none"))
    assert (result.exit_code, "does not exist" in result.stderr) == (1, True)
    result = weft("inspect", str(path), *HELD, "--method", "lor")
    assert (result.exit_code, "method: must be one of lora" in result.stderr) == (1, True)
    result = weft("inspect", str(tmp_path / "adapter"), "--base", str(bases.path("gpt2")), *HELD)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
