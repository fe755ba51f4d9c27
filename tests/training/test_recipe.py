"""Recipes: every one in the folder is read, options win, and faults are named by file, line and key."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from weft.config import Quantization
from weft.methods.ia3.math import Ia3Config
from weft.methods.lora.math import LoraConfig
from weft.settings import InvalidSettings
from weft_training import command
from weft_training.adapter import USUAL
from weft_training.config import Schedule, recipe_of
from weft_training.recipe import Given, Recipe, load, options

RECIPES = Path(__file__).parents[2] / "training" / "recipes"
WHOLE = """\
model:
  path: base
  quantization: none
adapter:
  method: lora
  rank: 4
  rank_pattern: {down_proj: 2}
data:
  train: [a.jsonl, b.jsonl]
optimization:
  learning_rate: 1e-3
  schedule: linear
output:
  path: out
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


def loaded(path: Path | None, line: str = "") -> Recipe:
    return load(path, options(line.split())[1])


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_of_the_folder_is_read(path: Path) -> None:
    recipe = load(path)
    assert recipe.train.output == Path("adapters") / path.stem.replace("distillation", "distilled")
    assert path.read_text().startswith("# ")


def test_there_is_a_recipe_for_every_method() -> None:
    methods = {yaml.safe_load(path.read_text())["adapter"]["method"] for path in RECIPES.glob("*.yaml")}
    assert methods >= set(USUAL)


@pytest.mark.parametrize("method", ["lora", "dora", "vera", "ia3", "bitfit", "bottleneck"])
def test_every_method_of_modules_takes_layers(tmp_path: Path, method: str) -> None:
    text = WHOLE.replace("method: lora", f"method: {method}\n  layers: [2, 3]")
    text = text.replace("  rank: 4\n  rank_pattern: {down_proj: 2}\n", "")
    path = written(tmp_path, text)
    for line, layers in (("", (2, 3)), ("--layers 0,1", (0, 1))):
        adapter = loaded(path, line).train.adapter
        assert asdict(adapter)["layers"] == layers
    if method != "bottleneck":  # it has sublayers
        line = "--target-modules layers.2.mlp.up_proj,q_proj --exclude layers.3.self_attn.q_proj"
        adapter = loaded(path, line).train.adapter
        assert asdict(adapter)["target_modules"] == ("layers.2.mlp.up_proj", "q_proj")
        assert asdict(adapter)["exclude"] == ("layers.3.self_attn.q_proj",)


def test_values_are_of_their_fields_types(tmp_path: Path) -> None:
    config = load(written(tmp_path, WHOLE)).train
    assert config.adapter == LoraConfig(rank=4, rank_pattern={"down_proj": 2})
    assert config.model.quantization is Quantization.NONE
    assert config.data == (Path("a.jsonl"), Path("b.jsonl"))
    assert (config.learning_rate, config.schedule) == (1e-3, Schedule.LINEAR)


def test_options_win_over_the_recipe(tmp_path: Path) -> None:
    line = "--optimization.learning-rate 0.5 --seed=7 --packing --data c.jsonl --teacher t --distillation.alpha 0.25"
    config = loaded(written(tmp_path, WHOLE), line).train
    assert (config.learning_rate, config.seed, config.packing) == (0.5, 7, True)
    assert config.data == (Path("c.jsonl"),)
    assert config.distillation is not None
    assert config.distillation.alpha == 0.25


def test_no_recipe_is_needed() -> None:
    line = "--base b --method ia3 --data d --output o --steps 3 --lr 0.1 --target-modules k_proj,down_proj"
    config = loaded(None, line).train
    assert config.adapter == Ia3Config(target_modules=("k_proj", "down_proj"), feedforward_modules=("down_proj",))
    assert (config.num_steps, config.learning_rate, config.output) == (3, 0.1, Path("o"))


def test_a_config_survives_the_way_through_its_recipe(tmp_path: Path) -> None:
    config = loaded(written(tmp_path, WHOLE), "--teacher t --max-length 9 --evaluation e.jsonl --tensorboard tb").train
    again = load(written(tmp_path, yaml.safe_dump(recipe_of(config)))).train
    assert again == config


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  rank: 4", "  rnak: 4", ":6: adapter.rnak: no such key; did you mean rank?"),
        ("  rank: 4", "  init_std: 4", ":6: adapter.init_std: the method lora has none"),
        ("  rank: 4", "  rank: four", ":6: adapter.rank: must be a whole number, given 'four'"),
        ("  rank: 4", "  rank: [4]", ":6: adapter.rank: must be a whole number, given ['4']"),
        ("  rank: 4", "  rank:", ":6: adapter.rank: must be a whole number, given nothing"),
        ("  rank: 4", "  rank: 4\n  rank: 5", ":7: rank: stands here a second time"),
        ("down_proj: 2", "down_proj: x", ":7: adapter.rank_pattern.down_proj: must be a whole number, given 'x'"),
        ("method: lora", "method: lore", ":5: method: must be one of"),
        (
            "quantization: none",
            "quantization: nf5",
            ":3: model.quantization: must be 'nf4', 'int8' or 'none', given 'nf5'",
        ),
        ("1e-3", "-1", ":11: optimization.learning_rate: must be above 0, given '-1'"),
        ("1e-3", "nan", ":11: optimization.learning_rate: must be a finite number, given 'nan'"),
        ("optimization:", "optimisation:", ":10: optimisation: no such section; did you mean optimization?"),
        (
            "  schedule: linear",
            "  patience: 2",
            ":12: optimization.patience: must be 0 without evaluation data, given 2",
        ),
        ("  path: out", "  adapter_id: a\n  path: out", ":14: output.adapter_id: needs output.publish"),
        ("model:\n", "model:\n\t", ":2: is not YAML"),
        ("  path: out", "", ": output.path: must be given, here or as --output"),
    ],
)
def test_what_is_wrong_is_named_by_file_line_and_key(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in WHOLE
    path = written(tmp_path, WHOLE.replace(old, new, 1))
    with pytest.raises(InvalidSettings) as error:
        load(path)
    assert str(error.value).startswith(f"{path}{message}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learnig-rate 1", "--learnig-rate: no such key; did you mean learning_rate?"),
        ("--optimization.sede 1", "--optimization.sede: no such key; did you mean seed?"),
        ("--optimisation.seed 1", "--optimisation.seed: no such section; did you mean optimization?"),
        ("--path x", "--path: is in several sections; give --model.path or --output.path"),
        ("--init-std 1", "--init-std: the method lora has none"),
        ("--frobnicate 1", "--frobnicate: no such key; --list-keys lists all"),
        ("--alpha nan", "--alpha: adapter.alpha: must be a finite number, given 'nan'"),
        ("--rank", "--rank: adapter.rank: must be a whole number, given 'true'"),
        ("--output=", "--output: output.path: must be a path, given ''"),
        ("--steps 1.5", "--steps: optimization.num_steps: must be a whole number, given '1.5'"),
        ("--steps 0", "--steps: optimization.num_steps: must be at least 1, given '0'"),
        ("--distillation.alpha 0.5", "--distillation.alpha: distillation.teacher: must be given"),
        (
            "--teacher t --distillation.alpha 2",
            "--distillation.alpha: distillation.alpha: must be at most 1, given '2'",
        ),
        ("--resume", "--resume: output.resume: must be false if checkpoint_every is 0, given true"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InvalidSettings) as error:
        loaded(written(tmp_path, WHOLE), line)
    assert str(error.value).startswith(message)


def test_the_recipes_path_comes_first_and_once() -> None:
    assert options(["r.yaml", "--packing", "--seed", "3"]) == (
        Path("r.yaml"),
        [Given("--packing", None), Given("--seed", "3")],
    )
    with pytest.raises(InvalidSettings, match=r"'r2\.yaml' belongs to no option"):
        options(["r.yaml", "r2.yaml"])


def test_a_recipe_that_ships_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = loaded(Path("prefix"), "--data d --output o").train
    assert config.adapter == loaded(RECIPES / "prefix.yaml", "--data d --output o").train.adapter
    assert (config.model.path / "config.json").is_file()
    assert loaded(Path("prefix"), "--base b --data d --output o").train.model.path == Path("b")
    written(tmp_path, WHOLE).rename("prefix")
    assert loaded(Path("prefix")) == loaded(written(tmp_path, WHOLE))


def test_a_name_that_is_no_recipes_is_refused_with_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidSettings, match=r"^lorra: no such file, .*; did you mean lora"):
        loaded(Path("lorra"))
    with pytest.raises(FileNotFoundError):
        loaded(Path("lora.yaml"))


def test_list_keys_tells_all_of_a_method() -> None:
    found = CliRunner().invoke(command.app, ["--list-keys", "--method", "prefix"])
    assert found.exit_code == 0
    assert "adapter.num_virtual_tokens: integer; default 16" in found.output
    assert "optimization.learning_rate: number; default 0.0002" in found.output
    assert "adapter.rank:" not in found.output
