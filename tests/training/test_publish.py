"""From a recipe to an answer: trained, published to a real server or store, and served; the card and the plan."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from tests.server.live import LiveServer, Loop
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from weft.adapters.store import AdapterStore
from weft.cli import app as weft_app
from weft.client import Client
from weft.config import AdapterLimits, ModelConfig, Quantization, ServerConfig, WeftConfig
from weft.methods.lora.math import LoraConfig
from weft_training import command, plan
from weft_training.comparison import compare
from weft_training.config import Optimizer
from weft_training.recipe import load, options
from weft_training.trainer import prepare

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("abc", "dragon", "loom", "weave", "threads", "hi", "warp", "weft")


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Path:
    """Write a recipe that teaches the tiny base to answer yes."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "{word} = ", "completion": "yes"}}\n' for word in WORDS))
    path = tmp_path / "recipe.yaml"
    sections = {
        "model": {"path": str(tiny_base), "device": "cpu"},
        "adapter": {"method": "lora", "rank": 4},
        "data": {"train": str(rows)},
        "optimization": {"num_steps": 80, "batch_size": 8, "learning_rate": 0.02},
        "output": {"path": str(tmp_path / "yes")},
    }
    path.write_text(yaml.safe_dump(sections))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(command.app, [str(argument) for argument in arguments])


@pytest.fixture
def server(tiny_base: Path, tmp_path: Path) -> Iterator[LiveServer]:
    loop = Loop()
    model = ModelConfig(path=tiny_base, device="cpu")
    ports = ServerConfig(port=0, metrics_port=0)
    live = LiveServer(loop, WeftConfig(model=model, store=tmp_path / "served-store", server=ports))
    yield live
    live.stop()
    loop.close()


def test_a_recipe_is_trained_uploaded_and_answers(recipe: Path, server: LiveServer) -> None:
    address = f"127.0.0.1:{server.serving.port}"
    done = run(recipe, "--publish", address)
    assert done.exit_code == 0, done.output
    assert f'weft generate "…" --adapter yes --server {address}' in done.output
    with Client(address) as client:

        def answer(adapter: str | None) -> str:
            return client.generate("loom = ", adapter=adapter, max_new_tokens=3, temperature=0.0).text

        assert answer("yes") == "yes", done.output
        assert answer(None) != "yes", "the control: the base alone"
    again = run(recipe, "--publish", address, "--overwrite", "--seed", "1")  # other content under a taken id
    assert again.exit_code == 1
    assert "--replace" in again.stderr or "exists" in again.stderr or "other content" in again.stderr
    assert run(recipe, "--publish", address, "--overwrite", "--seed", "1", "--replace").exit_code == 0


def test_a_store_gets_it_offline_through_its_own_checks(recipe: Path, tmp_path: Path) -> None:
    done = run(recipe, "--steps", "2", "--publish", tmp_path / "store", "--adapter-id", "named")
    assert done.exit_code == 0, done.output
    manifests = AdapterStore(tmp_path / "store", AdapterLimits()).recover().manifests
    assert {adapter_id: manifest.method for adapter_id, manifest in manifests.items()} == {"named": "lora"}
    assert manifests["named"].digest[:12] in done.output.replace("\n", "")
    refused = run(recipe, "--steps", "3", "--overwrite", "--publish", tmp_path / "store", "--adapter-id", "named")
    assert refused.exit_code == 1
    assert AdapterStore(tmp_path / "store", AdapterLimits()).recover().manifests == manifests


def test_nothing_is_published_of_a_run_that_fails(recipe: Path, tmp_path: Path) -> None:
    done = run(recipe, "--lr", "1e30", "--gradient-norm-max", "1e30", "--publish", tmp_path / "store")
    assert done.exit_code == 1
    assert "must be finite" in done.stderr
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "yes").exists()
    done = run(recipe, "--publish", tmp_path / "store", "--adapter-id", "No.Id", "--steps", 10**6)
    assert done.exit_code == 1  # before training, which would take hours
    assert "adapter_id: must match" in done.stderr


def test_the_card_tells_what_made_it(recipe: Path, tmp_path: Path) -> None:
    assert run(recipe, "--steps", "4", "--evaluation-share", "0.25").exit_code == 0
    output = tmp_path / "yes"
    assert {path.name for path in output.iterdir()} == {
        "README.md",
        "loss.png",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    text = (output / "README.md").read_text()
    config = load(recipe).train
    prepared = prepare(config)
    assert prepared.model.base.shape.digest in text
    assert "weft generate" in text
    assert "evaluation loss" in text
    inside = tmp_path / "again.yaml"
    inside.write_text(text.split("```yaml\n")[1].split("```")[0])
    again = load(inside).train  # the recipe in the card is one
    assert (again.num_steps, again.evaluation_share, again.adapter) == (4, 0.25, config.adapter)


def test_without_matplotlib_the_card_has_no_curve(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with the server's distribution alone, which runs the demo."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(recipe, "--steps", "2").exit_code == 0
    assert not (tmp_path / "yes" / "loss.png").exists()
    assert "loss.png" not in (tmp_path / "yes" / "README.md").read_text()


def test_a_dry_run_tells_sizes_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    done = run(recipe, "--dry-run")
    assert done.exit_code == 0, done.output
    assert "efficiency ratio, base / adapter" in done.output
    assert "full fine-tuning, AdamW in mixed precision" in done.output
    assert sorted(tmp_path.iterdir()) == before


def test_dry_run_and_inspect_count_the_same_modules(recipe: Path, tiny_base: Path, tmp_path: Path) -> None:
    adapter = {"method": "lora", "rank": 4, "layers": [1], "exclude": ["mlp.up_proj"]}
    adapter["rank_pattern"] = {"1.self_attn.q_proj": 2}
    path = tmp_path / "part.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | {"adapter": adapter}))
    config = load(path).train
    counted = plan.make(config, prepare(config)).num_adapter
    assert run(path, "--steps", 1).exit_code == 0
    line = ["inspect", str(tmp_path / "yes"), "--base", str(tiny_base), "--device", "cpu", "--json"]
    told = CliRunner().invoke(weft_app, line)
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout)
    assert found["num_parameters"] == counted == 2 * (64 + 64) + 4 * (3 * 64 + 2 * 32 + 64 + 2 * (64 + 128))
    assert len(found["modules"]) == 6
    assert all(".layers.1." in module for module in found["modules"])


def test_the_qlora_recipe_is_qlora(tiny_base: Path, recipe: Path, tmp_path: Path) -> None:
    qlora = Path(__file__).parents[2] / "training" / "recipes" / "qlora.yaml"
    line = (
        f"--base={tiny_base} --data={tmp_path / 'rows.jsonl'} --output={tmp_path / 'q'} --steps=2 --warmup-steps=1 "
        "--evaluate-every=1"
    )
    config = load(*options([str(qlora), *line.split()])).train
    assert (config.model.quantization, config.model.double_quant) == (Quantization.NF4, True)
    assert config.optimizer is Optimizer.PAGED_ADAMW_8BIT
    state = next(p.quant_state for p in prepare(config).model.base.model.parameters() if hasattr(p, "quant_state"))
    assert state.nested
    done = run(qlora, *line.split())
    assert done.exit_code == 0, done.output
    assert (tmp_path / "q" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_plans_numbers_are_the_bases(tiny_base: Path, recipe: Path, checkpointing: bool) -> None:
    def planned(quantization: Quantization) -> plan.Plan:
        config = replace(
            load(recipe).train,
            model=ModelConfig(path=tiny_base, quantization=quantization, device="cpu"),
            gradient_checkpointing=checkpointing,
        )
        return plan.make(config, prepare(config))

    whole, packed = planned(Quantization.NONE), planned(Quantization.NF4)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    counted = sum(parameter.numel() for parameter in plain.parameters())
    assert whole.num_base == packed.num_base == counted
    assert whole.base_bytes == pytest.approx(4 * counted, rel=0.01)  # float32 as stored, and small buffers
    assert packed.base_bytes < whole.base_bytes / 2
    assert whole.num_adapter == whole.num_trained == 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert whole.efficiency_ratio == counted / whole.num_adapter
    assert whole.full_fine_tuning_bytes == packed.full_fine_tuning_bytes == 16 * counted
    held = whole.base_bytes + 4 * 4 * whole.num_adapter  # the adapter, its gradient and two moments in float32
    assert whole.memory_ratio == 16 * counted / held < packed.memory_ratio
    usual = replace(load(recipe).train, adapter=LoraConfig())
    prepared = prepare(usual)
    (compared,) = compare(prepared.model.base, ["lora"], repeats=0).methods
    assert plan.make(usual, prepared).efficiency_ratio == compared.ratio  # `weft inspect` and --dry-run agree
    tokens = 8 * 11  # rows of one pass, and the longest row
    per_layer = whole.activation_bytes / (2 * tokens * 64 * 4)  # in hidden states of float32
    assert (per_layer < 8) is checkpointing
