"""A request's numbers do not depend on its neighbours, in every family that is served.

The self-test detects if they do. The negative controls serve bases that the gate refuses, or remove the part that makes
a base right.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.families.configurations import CONFIGURATIONS, Configuration
from tests.families.measured import decode, load, save
from weft.config import ModelConfig, Quantization
from weft.kernels.selection import select
from weft.model import families, gate, loader, paged_attention, rope, self_test, serving_form
from weft.model.gate import BaseRefused

_EQUAL = {(row.family, row.variant) for row in families.table() if row.base == "equal"}
_PROMPT = [9, 9, 31, 7]
_NEIGHBOUR = [5 + place % 90 for place in range(70)]


def _named(name: str) -> Configuration:
    return next(configuration for configuration in CONFIGURATIONS if configuration.name == name)


@pytest.mark.parametrize(
    "configuration",
    [configuration for configuration in CONFIGURATIONS if (configuration.family, configuration.variant) in _EQUAL],
    ids=lambda configuration: configuration.name,
)
def test_a_neighbour_changes_nothing(configuration: Configuration, tmp_path: Path) -> None:
    save(configuration, tmp_path)
    base = load(tmp_path)
    [alone] = decode(base, [(_PROMPT, None)])
    beside, _ = decode(base, [(_PROMPT, None), (_NEIGHBOUR, None)])
    after = decode(base, [(_NEIGHBOUR, None), (_PROMPT, None)])[1]
    for other in (beside, after):
        assert other.token_ids == alone.token_ids
        torch.testing.assert_close(other.logprobs, alone.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["bloom", "codegen", "lfm2", "xglm"])
def test_the_self_test_catches_rows_that_see_one_another(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(_named(name), tmp_path)
    with pytest.raises(BaseRefused, match=r"AttentionInterface|convolution"):
        load(tmp_path)
    monkeypatch.setattr(gate, "require_served", lambda hf_config, name: _skeleton(hf_config))
    with pytest.raises(BaseRefused, match="does not pass its self-test: as served, beside another request"):
        load(tmp_path)


def _skeleton(hf_config: Any) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def test_the_self_test_catches_rotary_factors_that_follow_the_longest_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(_named("phi3 longrope"), tmp_path)
    load(tmp_path)
    monkeypatch.setattr(rope, "fix", lambda model, max_model_len: "")
    with pytest.raises(BaseRefused, match="does not pass its self-test"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("quantization", list(Quantization))
def test_the_self_test_catches_a_position_that_is_off_by_one(
    name: str, quantization: Quantization, tmp_path: Path
) -> None:
    save(_named(name), tmp_path)
    _prove(tmp_path, quantization, _unchanged)
    with pytest.raises(BaseRefused, match="differ from its own attention"):
        _prove(tmp_path, quantization, _one_further_after_the_first_chunk)


def _prove(path: Path, quantization: Quantization, plant: Callable[[Any], None]) -> None:
    paged_attention.register()
    config = ModelConfig(path=path, quantization=quantization, device="cpu")
    checkpoint = loader.read(config, attention=paged_attention.ATTENTION)
    expected = self_test.expect(checkpoint.model, max_model_len=checkpoint.max_model_len)
    base = loader.wrap(checkpoint)
    kernels = select(base.device, base.dtype)
    serving_form.take(base, kernels)
    plant(base.model)
    self_test.require(base, expected, kernels.attend)


def _unchanged(model: Any) -> None:
    del model


def _one_further_after_the_first_chunk(model: Any) -> None:
    def plant(module: Any, args: Any, named: dict[str, Any]) -> Any:
        paged = named.get("paged")
        if paged is None:
            return None
        positions = named["position_ids"].clone()
        paging = paged.paging
        for index, begin in enumerate(paging.query_start[:-1].tolist()):
            end = int(paging.query_start[index + 1])
            if int(paging.context_lens[index]) > end - begin:  # an earlier chunk is in the cache
                positions[:, begin:end] = (positions[:, begin:end] - 1).clamp(min=0)
        return args, {**named, "position_ids": positions}

    model.register_forward_pre_hook(plant, with_kwargs=True)


def test_longrope_takes_the_factors_of_the_longest_request(tmp_path: Path) -> None:
    """Short factors up to the original length, long ones beyond: each as transformers has them at that length."""
    save(_named("phi3 longrope"), tmp_path)
    ids = torch.tensor([[3 + place % 90 for place in range(70)]])
    for max_model_len, tokens, said in ((32, ids[:, :30], "short factors"), (256, ids, "long factors")):
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        ours = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        assert said in str(rope.fix(ours, max_model_len))
        with torch.inference_mode():
            torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
            ours(ids)  # a longer request passes by, and nothing changes
            again = ours(tokens).logits
            torch.testing.assert_close(again, theirs(tokens).logits, atol=1e-5, rtol=1e-5)
