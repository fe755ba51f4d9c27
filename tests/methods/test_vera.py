"""Properties that only VeRA has: a projection that all sites share, and that is not trained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny
from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.methods.checkpoint import directory
from weft.methods.vera import math as vera
from weft.model import loader
from weft_training import adapter as adapters


def test_what_is_served_is_what_the_vectors_make_of_it(base: loader.Base) -> None:
    adapter = tiny.random_vera(base.shape, rank=5, seed=1)
    for name, params in adapter.sites.items():
        site = base.shape.sites[name]
        x, y = torch.randn(3, site.in_features), torch.randn(3, site.out_features)
        served = vera.delta(adapter.method.unpack(vera.pack(params, torch.float32)), x, y)
        torch.testing.assert_close(served, vera.delta(params, x, y), atol=1e-4, rtol=1e-5)
        assert vera.norms(params)["‖ΔW‖"] > 1


def test_an_untrained_one_adds_nothing_and_every_site_has_one_projection(base: loader.Base) -> None:
    made = adapters.initial(vera.VeraConfig(rank=4), base.shape, torch.Generator().manual_seed(0))
    for name, params in made.sites.items():
        site = base.shape.sites[name]
        assert not vera.delta(params, torch.randn(2, site.in_features), torch.zeros(2, site.out_features)).any()
    count = made.method.count(made.config, [base.shape.sites[name] for name in made.sites], base.shape)
    assert made.num_parameters == count.total == sum(4 + base.shape.sites[name].out_features for name in made.sites)
    moved = adapters.map_tensors(made, lambda tensor: tensor.double())
    assert len({id(params.projection) for params in moved.sites.values()}) == 1
    assert all(params.lambda_b.dtype is torch.float64 for params in moved.sites.values())
    with pytest.raises(ValueError, match="rank: must be at least 1, given 0"):
        vera.VeraConfig(rank=0)


def test_what_it_takes_when_laid_out_is_bounded_before_it_is(base: loader.Base, tmp_path: Path) -> None:
    """The file is small; as a LoRA at every module it is as large as a LoRA's file."""
    adapter = tiny.random_vera(base.shape, rank=8, seed=2)
    directory.write(adapter, tmp_path, base.shape)
    config = json.loads((tmp_path / directory.CONFIG_FILE).read_text())
    tensors = load_file(tmp_path / directory.WEIGHTS_FILE)
    sites = [base.shape.sites[name] for name in adapter.sites]
    laid_out = 4 * 8 * sum(site.in_features + site.out_features for site in sites)
    assert laid_out > 4 * sum(tensor.nbytes for tensor in tensors.values())
    directory.read(config, tensors, {}, base.shape, AdapterLimits(file_bytes_max=laid_out))
    with pytest.raises(InvalidAdapter, match="--adapter-file-bytes-max") as refused:
        directory.read(config, tensors, {}, base.shape, AdapterLimits(file_bytes_max=laid_out - 1))
    assert refused.value.reason == "RANK_TOO_LARGE"
