"""A mixture's two files: reading returns what was written, and the same mixture gives the same bytes."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import mixture as files
from weft.methods.mixture import Expert, Level, Mixture, MixtureConfig, MixtureParams
from weft.methods.protocol import BaseShape

LIMITS = AdapterLimits()


def made(shape: BaseShape, config: MixtureConfig) -> Mixture:
    size = (1 if config.shared else shape.num_layers, config.num_choices, shape.embedding_size)
    experts = tuple(Expert(f"{index:x}" * 64, f"expert-{index}" if index else "") for index in range(3))
    return Mixture(config, MixtureParams(torch.randn(size)), experts)


def read(path: Path, shape: BaseShape) -> Mixture:
    config = json.loads((path / files.CONFIG_FILE).read_text())
    return files.read(config, safetensors.torch.load_file(path / files.WEIGHTS_FILE), shape, LIMITS)


def test_what_is_written_is_read(shape: BaseShape, tmp_path: Path) -> None:
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
        mixture = made(shape, config)
        files.write(mixture, tmp_path, shape)
        again = read(tmp_path, shape)
        assert (again.config, again.experts) == (config, mixture.experts)
        assert again.params.weight.equal(mixture.params.weight)


def test_experts_as_weft_0_1_names_them_are_read(shape: BaseShape, tmp_path: Path) -> None:
    mixture = made(shape, MixtureConfig(num_experts=3, top_k=2))
    files.write(mixture, tmp_path, shape)
    path = tmp_path / files.CONFIG_FILE
    path.write_text(path.read_text().replace('"digest"', '"generation"'))
    assert read(tmp_path, shape).experts == mixture.experts
    path.write_text(path.read_text().replace('"generation"', '"digest": "x", "generation"', 1))
    with pytest.raises(InvalidAdapter, match="generation"):
        read(tmp_path, shape)


def test_the_order_of_experts_changes_no_byte(shape: BaseShape, tmp_path: Path) -> None:
    mixture = made(shape, MixtureConfig(num_experts=3, top_k=2, null_expert=True))
    order = [2, 0, 1]
    turned = mixture._replace(
        params=MixtureParams(mixture.params.weight[:, [*order, 3]]),
        experts=tuple(mixture.experts[index] for index in order),
    )
    for name, one in (("a", mixture), ("b", turned), ("c", turned._replace(params=mixture.params))):
        files.write(one, tmp_path / name, shape)
    for name in (files.CONFIG_FILE, files.WEIGHTS_FILE):
        a, b, c = ((tmp_path / directory / name).read_bytes() for directory in "abc")
        assert a == b
        if name == files.WEIGHTS_FILE:
            assert a != c, "negative control: experts turned without their rows"


def test_half_precision_is_read_as_what_it_says(shape: BaseShape, tmp_path: Path) -> None:
    mixture = made(shape, MixtureConfig(num_experts=3, top_k=2))
    files.write(mixture, tmp_path, shape)
    config = json.loads((tmp_path / files.CONFIG_FILE).read_text())
    half = mixture.params.weight.bfloat16()
    again = files.read(config, {files.WEIGHT: half}, shape, LIMITS)
    assert again.params.weight.dtype is torch.float32
    assert again.params.weight.equal(half.float())


def test_a_router_is_as_wide_as_what_it_reads(shape: BaseShape, tmp_path: Path) -> None:
    """If a base's embeddings are narrower than its hidden states, a router can read only the latter."""
    narrow = replace(shape, embedding_size=32)
    for level in Level:
        files.write(made(shape, MixtureConfig(num_experts=3, top_k=2, level=level)), tmp_path, shape)
        if level is Level.TOKEN:
            assert read(tmp_path, narrow).params.weight.shape[2] == shape.embedding_size
        else:
            with pytest.raises(InvalidAdapter, match="level: must be token"):
                read(tmp_path, narrow)
    assert shape.embedding_size != 32, "negative control"


def test_as_many_experts_as_the_limit_says(shape: BaseShape, tmp_path: Path) -> None:
    files.write(made(shape, MixtureConfig(num_experts=3, top_k=2)), tmp_path, shape)
    config = json.loads((tmp_path / files.CONFIG_FILE).read_text())
    tensors = safetensors.torch.load_file(tmp_path / files.WEIGHTS_FILE)
    files.read(config, tensors, shape, replace(LIMITS, num_experts_max=3))
    with pytest.raises(InvalidAdapter, match=r"experts: must be a list.*limit 2.*given 3"):
        files.read(config, tensors, shape, replace(LIMITS, num_experts_max=2))
