"""Every method on every architecture equals Hugging Face PEFT: its files, its logits.

PEFT is the oracle: an adapter is written by Weft, loaded by PEFT, and both compute the same prompts in float32.
"""

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.serving import Row, Step
from weft.config import AdapterLimits, ModelConfig, Quantization
from weft.kernels.selection import REFERENCE, select
from weft.methods.checkpoint import directory
from weft.methods.protocol import Adapter, BaseShape
from weft.model import loader, paged_attention

_ADAPTERS: dict[str, Callable[[BaseShape], Adapter]] = {
    "lora-r1": lambda base: tiny.random_lora(base, rank=1, seed=1),
    "lora-r8": lambda base: tiny.random_lora(base, rank=8, seed=2),
    "ia3": lambda base: tiny.random_ia3(base, seed=3),
    "prefix-5": lambda base: tiny.random_prefix(base, length=5, seed=4),
    "prefix-16": lambda base: tiny.random_prefix(base, length=16, seed=5),
    "prefix-19": lambda base: tiny.random_prefix(base, length=19, seed=6),
    "prompt-3": lambda base: tiny.random_prompt(base, length=3, seed=7),
    "prompt-33": lambda base: tiny.random_prompt(base, length=33, seed=8),  # beyond Mistral's window
    "ptuning-16": lambda base: tiny.random_ptuning(base, length=16, seed=9),
}
_TOLERANCE = 1e-4
_PROMPTS = [[5, 9, 77, 3, 120, 64, 2], list(range(40, 73)), [1]]


@pytest.fixture(scope="module", params=sorted(tiny.ARCHITECTURES))
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, tiny.save_base(tmp_path_factory.mktemp("bases") / request.param, request.param)


@pytest.fixture(scope="module")
def base(architecture: tuple[str, Path]) -> loader.Base:
    paged_attention.register()
    config = ModelConfig(path=architecture[1], quantization=Quantization.NONE, device="cpu", dtype="float32")
    return loader.load(config, attention=paged_attention.ATTENTION)


def _peft_logits(base_path: Path, adapter_path: Path) -> list[torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base_path, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(model, str(adapter_path)).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([prompt])).logits[0, -len(prompt) :] for prompt in _PROMPTS]


@pytest.mark.parametrize("kind", sorted(_ADAPTERS))
@pytest.mark.parametrize("kernels", ["reference", "selected"])
def test_served_logits_equal_peft(
    kind: str, kernels: str, base: loader.Base, architecture: tuple[str, Path], tmp_path: Path
) -> None:
    adapter = _ADAPTERS[kind](base.shape)
    directory.write(adapter, tmp_path, base.shape)
    wanted = _peft_logits(architecture[1], tmp_path)
    chosen = REFERENCE if kernels == "reference" else select(base.device, base.dtype)
    got = Step(base, chosen).logits([Row(prompt, adapter) for prompt in _PROMPTS])
    plain = Step(base, chosen).logits([Row(prompt) for prompt in _PROMPTS])
    for mine, peft_s, without in zip(got, wanted, plain, strict=True):
        torch.testing.assert_close(mine, peft_s, atol=_TOLERANCE, rtol=0)
        # Negative control: the comparison would see an adapter that does nothing.
        assert (without - peft_s).abs().max() > 100 * _TOLERANCE


@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_made_lora_with_patterns_is_read_exactly(
    base: loader.Base, architecture: tuple[str, Path], tmp_path: Path, use_rslora: bool
) -> None:
    """A file that PEFT wrote: unequal ranks and alphas by pattern, rsLoRA."""
    suffixes = sorted({site.suffix for site in base.shape.sites.values()})
    first = next(name for name, site in base.shape.sites.items() if site.suffix == suffixes[0])
    config = peft.LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=suffixes,
        use_rslora=use_rslora,
        rank_pattern={suffixes[-1]: 7, first: 2},
        alpha_pattern={suffixes[-1]: 3},
        init_lora_weights=False,
        task_type="CAUSAL_LM",
        fan_in_fan_out=architecture[0] == "gpt2",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(architecture[1], dtype=torch.float32), config)
    model.save_pretrained(str(tmp_path))
    adapter = _read(tmp_path, base.shape)
    assert adapter.sites[first].rank == 2
    wanted = _peft_logits(architecture[1], tmp_path)
    got = Step(base, REFERENCE).logits([Row(prompt, adapter) for prompt in _PROMPTS])
    for mine, peft_s in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, peft_s, atol=_TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", sorted(_ADAPTERS))
def test_save_and_load_is_bit_equal(kind: str, base: loader.Base, tmp_path: Path) -> None:
    adapter = _ADAPTERS[kind](base.shape)
    directory.write(adapter, tmp_path, base.shape)
    again = _read(tmp_path, base.shape)
    assert again.method is adapter.method
    assert again.num_parameters == adapter.num_parameters
    for one, other in zip(adapter.tensors(), again.tensors(), strict=True):
        assert torch.equal(one, other)


def _read(path: Path, base: BaseShape) -> Adapter:
    import json

    from safetensors import safe_open
    from safetensors.torch import load_file

    weights = path / directory.WEIGHTS_FILE
    with safe_open(weights, "pt") as file:
        metadata = file.metadata()
    config = json.loads((path / directory.CONFIG_FILE).read_text())
    return directory.read(config, load_file(weights), metadata, base, AdapterLimits())
