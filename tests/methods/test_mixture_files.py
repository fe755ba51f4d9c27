"""A mixture's two files: reading returns what was written, and the same mixture gives the same bytes."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests import tiny
from weft.config import AdapterLimits, ModelConfig, Quantization
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import mixture as files
from weft.methods.mixture import Expert, Level, Mixture, MixtureConfig, MixtureParams
from weft.methods.protocol import BaseShape
from weft.model import loader

LIMITS = AdapterLimits()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseShape:
    path = tiny.save_base(tmp_path_factory.mktemp("base"))
    config = ModelConfig(path=path, quantization=Quantization.NONE, device="cpu", dtype="float32")
    return loader.load(config, attention="sdpa").shape


def made(base: BaseShape, config: MixtureConfig) -> Mixture:
    shape = (1 if config.shared else base.num_layers, config.num_choices, base.embedding_size)
    experts = tuple(Expert(f"{index:x}" * 64, f"expert-{index}" if index else "") for index in range(3))
    return Mixture(config, MixtureParams(torch.randn(shape)), experts)


def read(path: Path, base: BaseShape) -> Mixture:
    config = json.loads((path / files.CONFIG_FILE).read_text())
    return files.read(config, safetensors.torch.load_file(path / files.WEIGHTS_FILE), base, LIMITS)


def test_what_is_written_is_read(base: BaseShape, tmp_path: Path) -> None:
    flags = (False, True)
    for index, (normalize, shared, null, rms, absolute) in enumerate(itertools.product(flags, repeat=5)):
        config = MixtureConfig(
            num_experts=3,
            top_k=1 + index % (3 + null),
            temperature=0.1 + index,
            level=list(Level)[index % 2],
            normalize=normalize,
            shared=shared,
            null_expert=null,
            rms_norm=rms,
            absolute=absolute,
        )
        mixture = made(base, config)
        files.write(mixture, tmp_path, base)
        again = read(tmp_path, base)
        assert (again.config, again.experts) == (config, mixture.experts)
        assert again.params.weight.equal(mixture.params.weight)


def test_experts_as_weft_0_1_names_them_are_read(base: BaseShape, tmp_path: Path) -> None:
    mixture = made(base, MixtureConfig(num_experts=3, top_k=2))
    files.write(mixture, tmp_path, base)
    path = tmp_path / files.CONFIG_FILE
    path.write_text(path.read_text().replace('"digest"', '"generation"'))
    assert read(tmp_path, base).experts == mixture.experts
    path.write_text(path.read_text().replace('"generation"', '"digest": "x", "generation"', 1))
    with pytest.raises(InvalidAdapter, match="generation"):
        read(tmp_path, base)


def test_the_order_of_experts_changes_no_byte(base: BaseShape, tmp_path: Path) -> None:
    mixture = made(base, MixtureConfig(num_experts=3, top_k=2, null_expert=True))
    order = [2, 0, 1]
    turned = mixture._replace(
        params=MixtureParams(mixture.params.weight[:, [*order, 3]]),
        experts=tuple(mixture.experts[index] for index in order),
    )
    for name, one in (("a", mixture), ("b", turned), ("c", turned._replace(params=mixture.params))):
        files.write(one, tmp_path / name, base)
    for name in (files.CONFIG_FILE, files.WEIGHTS_FILE):
        a, b, c = ((tmp_path / directory / name).read_bytes() for directory in "abc")
        assert a == b
        if name == files.WEIGHTS_FILE:
            assert a != c, "negative control: experts turned without their rows"


def test_half_precision_is_read_as_what_it_says(base: BaseShape, tmp_path: Path) -> None:
    mixture = made(base, MixtureConfig(num_experts=3, top_k=2))
    files.write(mixture, tmp_path, base)
    config = json.loads((tmp_path / files.CONFIG_FILE).read_text())
    half = mixture.params.weight.bfloat16()
    again = files.read(config, {files.WEIGHT: half}, base, LIMITS)
    assert again.params.weight.dtype is torch.float32
    assert again.params.weight.equal(half.float())


def test_a_router_is_as_wide_as_what_it_reads(base: BaseShape, tmp_path: Path) -> None:
    """If a base's embeddings are narrower than its hidden states, a router can read only the latter."""
    narrow = replace(base, embedding_size=32)
    for level in Level:
        files.write(made(base, MixtureConfig(num_experts=3, top_k=2, level=level)), tmp_path, base)
        if level is Level.TOKEN:
            assert read(tmp_path, narrow).params.weight.shape[2] == base.embedding_size
        else:
            with pytest.raises(InvalidAdapter, match="level: must be token"):
                read(tmp_path, narrow)
    assert base.embedding_size != 32, "negative control"


def test_as_many_experts_as_the_limit_says(base: BaseShape, tmp_path: Path) -> None:
    files.write(made(base, MixtureConfig(num_experts=3, top_k=2)), tmp_path, base)
    config = json.loads((tmp_path / files.CONFIG_FILE).read_text())
    tensors = safetensors.torch.load_file(tmp_path / files.WEIGHTS_FILE)
    files.read(config, tensors, base, replace(LIMITS, num_experts_max=3))
    with pytest.raises(InvalidAdapter, match=r"experts: must be a list.*limit 2.*given 3"):
        files.read(config, tensors, base, replace(LIMITS, num_experts_max=2))
