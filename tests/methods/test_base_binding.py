"""An adapter is bound to the weights that it was trained on, not to how a server holds them."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from weft.config import AdapterLimits, ModelConfig, Quantization
from weft.errors import AdapterUnusable
from weft.methods.checkpoint import directory
from weft.methods.checkpoint.base_binding import base_name, held_as
from weft.model import loader

_HOLDINGS = [
    (Quantization.NONE, False, "none"),
    (Quantization.INT8, False, "int8"),
    (Quantization.NF4, False, "nf4"),
    (Quantization.NF4, True, "nf4-double"),
]


def _load(path: Path, quantization: Quantization = Quantization.NONE, *, double_quant: bool = False) -> loader.Base:
    config = ModelConfig(path=path, quantization=quantization, device="cpu", double_quant=double_quant)
    return loader.load(config, attention="sdpa")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


def test_the_same_weights_know_one_another_however_they_are_held(path: Path) -> None:
    shapes = {
        holding: _load(path, quantization, double_quant=double).shape for quantization, double, holding in _HOLDINGS
    }
    assert len({shape.digest for shape in shapes.values()}) == len(shapes)  # keys and values depend on the holding
    for holding, shape in shapes.items():
        assert shape.held_as == holding
        for other, trained_on in shapes.items():
            told = held_as(trained_on.digest, shape, file="x")
            assert told == ("" if other == holding else other)


def test_another_quantization_is_served(path: Path, tmp_path: Path) -> None:
    trained_on, serving = _load(path).shape, _load(path, Quantization.NF4).shape
    directory.write(tiny.random_lora(trained_on, rank=4, seed=1), tmp_path, trained_on)
    assert directory.load(tmp_path, serving, AdapterLimits()).rank == 4


def test_other_weights_are_refused_with_both_names(path: Path, tmp_path: Path) -> None:
    trained_on = _load(path).shape
    directory.write(tiny.random_lora(trained_on, rank=4, seed=1), tmp_path / "adapter", trained_on)
    serving = _load(tiny.save_base(tmp_path / "other-llama", seed=1)).shape
    with pytest.raises(AdapterUnusable) as raised:
        directory.load(tmp_path / "adapter", serving, AdapterLimits())
    for text in ("tiny-llama", trained_on.digest[:12], "other-llama", serving.digest[:12], "other weights"):
        assert text in raised.value.message


def test_a_base_is_named_without_its_place(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_name("org/name") == "org/name"
    assert base_name("/home/somebody/models/name/") == "name"
    assert base_name("./models/name") == base_name("../name") == "name"
    shape = _load(path).shape
    with pytest.raises(AdapterUnusable) as raised:
        held_as("0" * 64, shape, file="x", name="/home/somebody/name")
    assert "somebody" not in raised.value.message
    monkeypatch.chdir(path)  # the model as "." has a name, too
    assert _load(Path()).shape.name == "tiny-llama"
    assert held_as(None, replace(shape, digest=""), file="x") == ""
