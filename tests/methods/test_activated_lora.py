"""Activated LoRAs of PEFT are read, and served as PEFT computes them, wherever their invocation is."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.serving import Row, Step
from weft.config import AdapterLimits
from weft.engine.token_ranges import OPEN, TokenRange
from weft.kernels.selection import REFERENCE, select
from weft.methods import activation
from weft.methods.checkpoint import directory
from weft.methods.lora.math import LoraConfig
from weft.methods.protocol import Adapter, SiteKind
from weft.model import loader

_TOLERANCE = 1e-4
_INVOCATION = [7, 9, 7]
_CONTEXT = list(range(20, 53))
# By the begin of the last invocation.
_PROMPTS: dict[int | None, list[int]] = {
    None: [*_CONTEXT, 7, 9, 9, 7],
    0: [*_INVOCATION, *_CONTEXT],
    20: [*_CONTEXT[:20], *_INVOCATION, *_CONTEXT[20:]],
    33: [*_CONTEXT, *_INVOCATION],
    13: [*_CONTEXT[:5], *_INVOCATION, *_CONTEXT[5:10], *_INVOCATION, *_CONTEXT],
    8: [*_CONTEXT[:6], 7, 9, *_INVOCATION, 9, 60],  # overlapping: 7 9 7 9 7
}


@pytest.fixture(scope="module", params=sorted(tiny.ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def peft_made(path: Path, base: loader.Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory that PEFT wrote."""
    made = tmp_path_factory.mktemp("made")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=sorted({site.suffix for site in base.shape.of_kind(SiteKind.LINEAR)}),
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=path.name == "gpt2",
        alora_invocation_tokens=_INVOCATION,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    peft.get_peft_model(model, config).save_pretrained(str(made))
    return made


def _peft_logits(path: Path, adapter: Path, prompts: list[list[int]]) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model: Any = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([prompt])).logits[0] for prompt in prompts]


def _read(made: Path, base: loader.Base) -> Adapter:
    config = json.loads((made / directory.CONFIG_FILE).read_text())
    return directory.read(config, load_file(made / directory.WEIGHTS_FILE), {}, base.shape, AdapterLimits())


def _row(adapter: Adapter, prompt: list[int]) -> Row:
    """As a request is admitted (weft/api/composition.py)."""
    begin = activation.begin(adapter.invocation_tokens, prompt)
    if begin is None:
        return Row(prompt)
    return Row(prompt, adapters=[(adapter, 1.0)], ranges=[(TokenRange(begin, OPEN),) if begin else ()])


def test_the_last_invocation_is_found() -> None:
    for wanted, prompt in _PROMPTS.items():
        assert activation.begin(_INVOCATION, prompt) == wanted
    assert activation.begin([1], []) is None
    assert activation.begin([1, 2], [2, 1]) is None
    assert activation.begin([1, 1], [1, 1, 1]) == 1


@given(st.lists(st.integers(0, 1), min_size=1, max_size=6), st.lists(st.integers(0, 1), max_size=40))
def test_the_search_finds_what_a_loop_over_places_finds(invocation: list[int], tokens: list[int]) -> None:
    count = len(invocation)
    places = [i for i in range(len(tokens) - count + 1) if tokens[i : i + count] == invocation]
    assert activation.begin(invocation, tokens) == max(places, default=None)


def test_the_search_is_linear() -> None:
    """If an invocation nearly matches everywhere, a token is compared a few times, not once per invocation token."""
    looked = 0

    class Token(int):
        def __eq__(self, other: object) -> bool:
            nonlocal looked
            looked += 1
            return int(self) == other

        __hash__ = int.__hash__

    tokens = [Token(1)] * 1000
    assert activation.begin([2, *[1] * 200], tokens) is None
    assert looked <= 4 * len(tokens)


@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_served_logits_equal_peft(kernels: str, path: Path, base: loader.Base, peft_made: Path) -> None:
    adapter = _read(peft_made, base)
    assert adapter.invocation_tokens == tuple(_INVOCATION)
    prompts = list(_PROMPTS.values())
    wanted = _peft_logits(path, peft_made, prompts)
    step = Step(base, REFERENCE if kernels == "reference" else select(base.device, base.dtype))
    got = step.logits([_row(adapter, prompt) for prompt in prompts])
    everywhere = step.logits([Row(prompt, adapter) for prompt in prompts])
    for begin, mine, peft_s, other in zip(_PROMPTS, got, wanted, everywhere, strict=True):
        torch.testing.assert_close(mine, peft_s, atol=_TOLERANCE, rtol=0)
        if begin != 0:  # negative control: a LoRA that acts everywhere differs
            assert (other - peft_s).abs().max() > 100 * _TOLERANCE


def test_what_is_written_is_what_peft_computes(path: Path, base: loader.Base, tmp_path: Path) -> None:
    """Read, written and read again; PEFT loads the written file, with the tokens that invoke it."""
    plain = tiny.random_lora(base.shape, rank=3, seed=4)
    config = LoraConfig(
        **{
            **{name: getattr(plain.config, name) for name in ("rank", "alpha", "target_modules")},
            "invocation_tokens": tuple(_INVOCATION),
        }
    )
    adapter = Adapter(method=plain.method, config=config, sites=plain.sites)
    directory.write(adapter, tmp_path, base.shape)
    assert _read(tmp_path, base).invocation_tokens == adapter.invocation_tokens
    prompts = list(_PROMPTS.values())
    wanted = _peft_logits(path, tmp_path, prompts)
    got = Step(base, REFERENCE).logits([_row(adapter, prompt) for prompt in prompts])
    for mine, peft_s in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, peft_s, atol=_TOLERANCE, rtol=0)


def test_a_lora_without_an_invocation_is_written_as_ever(base: loader.Base, tmp_path: Path) -> None:
    """Equal content gives equal bytes: its config has no new key."""
    directory.write(tiny.random_lora(base.shape, rank=3, seed=4), tmp_path, base.shape)
    assert "alora_invocation_tokens" not in json.loads((tmp_path / directory.CONFIG_FILE).read_text())
