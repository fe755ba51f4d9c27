"""An adapter learns under the rotary factors of its future server, and a server with others reports that."""

import logging
from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.families.configurations import CONFIGURATIONS
from tests.families.measured import save

from weft.adapters.ingest import Ingest
from weft.config import AdapterLimits, ModelConfig, Quantization
from weft.methods import mixture
from weft.methods.checkpoint import directory
from weft.methods.checkpoint import mixture as mixture_files
from weft.methods.mixture import Expert, Mixture, MixtureConfig
from weft.methods.protocol import BaseShape
from weft.model import loader, rope
from weft.v1.adapter_files import MIXTURE_FILES, PEFT_FILES, FilePair
from weft_training import base as bases
from weft_training import recipe
from weft_training.config import recipe_of

_SHORT, _LONG = "longrope: short factors", "longrope: long factors"


@pytest.fixture(scope="module")
def longrope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("longrope")
    save(next(one for one in CONFIGURATIONS if one.name == "phi3 longrope"), path)
    return path


def _config(path: Path) -> ModelConfig:
    return ModelConfig(path=path, device="cpu", quantization=Quantization.NONE)


@pytest.mark.parametrize(("given", "taken", "name"), [(None, 256, _LONG), (32, 32, _SHORT), (33, 33, _LONG)])
def test_the_factors_are_those_of_a_server_of_that_length(
    given: int | None, taken: int, name: str, longrope: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        base = bases.load(_config(longrope), max_model_len=given)
    assert (base.max_model_len, base.shape.rope_factors) == (taken, name)
    assert f"{name}, since max_model_len {taken} " in caplog.text
    served = loader.read(_config(longrope), attention="eager").model
    rope.fix(served, taken)
    torch.testing.assert_close(_frequencies(base.model), _frequencies(served), atol=0, rtol=0)


def _frequencies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq")}


@pytest.mark.parametrize("given", [1, 257])
def test_a_length_that_the_base_was_not_made_for_is_refused(given: int, longrope: Path) -> None:
    with pytest.raises(ValueError, match=f"max_model_len must be 2 to 256, the base's limit, given {given}"):
        bases.load(_config(longrope), max_model_len=given)


def test_a_server_of_other_factors_knows(longrope: Path, tmp_path: Path) -> None:
    short, long = (bases.load(_config(longrope), max_model_len=length).shape for length in (32, None))
    directory.write(tiny.random_lora(short, rank=2, seed=1), tmp_path / "short", short)
    assert _told(tmp_path / "short", long) == _SHORT
    assert _told(tmp_path / "short", short) == ""


def test_a_router_was_trained_under_factors_too(longrope: Path, tmp_path: Path) -> None:
    short, long = (bases.load(_config(longrope), max_model_len=length).shape for length in (32, None))
    config = MixtureConfig(num_experts=2, top_k=2)
    params = mixture.init(config, short.num_layers, short.embedding_size, torch.Generator().manual_seed(1))
    experts = (Expert("ab" * 32), Expert("cd" * 32))
    mixture_files.write(Mixture(config, params, experts), tmp_path / "routed", short)
    assert _told(tmp_path / "routed", long, MIXTURE_FILES) == _SHORT
    assert _told(tmp_path / "routed", short, MIXTURE_FILES) == ""


def test_bases_of_one_set_of_frequencies_say_nothing(
    path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, longrope: Path
) -> None:
    """The negative control: neither a log line, nor a word in the file, nor a warning."""
    with caplog.at_level(logging.WARNING, logger="weft_training"):
        base = bases.load(_config(path), max_model_len=32)
    assert not caplog.records
    assert (base.max_model_len, base.shape.rope_factors) == (32, "")
    directory.write(tiny.random_lora(base.shape, rank=2, seed=1), tmp_path / "a", base.shape)
    assert b"rope" not in (tmp_path / "a" / directory.WEIGHTS_FILE).read_bytes()
    assert _told(tmp_path / "a", base.shape) == ""


def _told(adapter: Path, shape: BaseShape, files: FilePair = PEFT_FILES) -> str:
    ingest = Ingest(shape, AdapterLimits(), torch.float32, pinned=False)
    with (adapter / files.config).open("rb") as config, (adapter / files.weights).open("rb") as weights:
        return ingest.read(config, weights, files=files, size_bytes=0).info.trained_rope_factors


def test_a_recipe_has_it_beside_the_model(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "model: {path: base, max_model_len: 32}\nadapter: {method: lora}\ndata: {train: rows}\noutput: {path: out}\n"
    )
    config = recipe.load(file).train
    assert config.max_model_len == 32
    assert recipe_of(config)["model"]["max_model_len"] == 32
    changed = recipe.load(file, [recipe.Given("--model.max_model_len", "16")]).train
    assert changed.max_model_len == 16
