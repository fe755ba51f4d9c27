"""An adapter is bound to the weights that it was trained on, not to how a server holds them."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests import tiny
from tests.bases import Bases, load
from weft.config import AdapterLimits, Quantization
from weft.errors import AdapterUnusable
from weft.methods.checkpoint import directory
from weft.methods.checkpoint.base_binding import base_name, held_as
from weft.model.loader import Base

_HOLDINGS = [
    (Quantization.NONE, False, "none"),
    (Quantization.INT8, False, "int8"),
    (Quantization.NF4, False, "nf4"),
    (Quantization.NF4, True, "nf4-double"),
]


def test_the_same_weights_know_one_another_however_they_are_held(bases: Bases) -> None:
    shapes = {
        holding: bases("llama", quantization, double_quant=double).shape for quantization, double, holding in _HOLDINGS
    }
    assert len({shape.digest for shape in shapes.values()}) == len(shapes)  # keys and values depend on the holding
    for holding, shape in shapes.items():
        assert shape.held_as == holding
        for other, trained_on in shapes.items():
            told = held_as(trained_on.digest, shape, file="x")
            assert told == ("" if other == holding else other)


def test_another_quantization_is_served(bases: Bases, tmp_path: Path) -> None:
    trained_on, serving = bases().shape, bases("llama", Quantization.NF4).shape
    directory.write(tiny.random_lora(trained_on, rank=4, seed=1), tmp_path, trained_on)
    assert directory.load(tmp_path, serving, AdapterLimits()).rank == 4


def test_other_weights_are_refused_with_both_names(base: Base, tmp_path: Path) -> None:
    trained_on = base.shape
    directory.write(tiny.random_lora(trained_on, rank=4, seed=1), tmp_path / "adapter", trained_on)
    serving = load(tiny.save_base(tmp_path / "other-llama", seed=1)).shape
    with pytest.raises(AdapterUnusable) as raised:
        directory.load(tmp_path / "adapter", serving, AdapterLimits())
    for text in ("on llama (", trained_on.digest[:12], "other-llama", serving.digest[:12], "other weights"):
        assert text in raised.value.message


def test_a_base_is_named_without_its_place(path: Path, base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    assert base_name("org/name") == "org/name"
    assert base_name("/home/somebody/models/name/") == "name"
    assert base_name("./models/name") == base_name("../name") == "name"
    with pytest.raises(AdapterUnusable) as raised:
        held_as("0" * 64, base.shape, file="x", name="/home/somebody/name")
    assert "somebody" not in raised.value.message
    monkeypatch.chdir(path)  # the model as "." has a name, too
    assert load(Path()).shape.name == "llama"
    assert held_as(None, replace(base.shape, digest=""), file="x") == ""
