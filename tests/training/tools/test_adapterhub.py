"""AdapterHub's bottlenecks equal the formulas written out on stock models of five architectures; what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.methods import textbook_bottleneck as textbook
from tests.serving import Row, Step
from tests.training.tools import adapterhub_files
from tests.training.tools.adapterhub_files import KINDS
from torch import Tensor
from transformers import AutoModelForCausalLM

from weft.config import AdapterLimits
from weft.errors import InvalidAdapter
from weft.kernels.selection import select
from weft.methods.checkpoint import directory
from weft.model import loader
from weft_training.tools import adapterhub

TOLERANCE = 1e-4
PROMPTS = [[5, 9, 77, 3, 120, 64, 2], list(range(40, 73)), [1]]
Spoil = Callable[[dict[str, Any], dict[str, Tensor]], None]


@pytest.fixture(scope="module", params=sorted(tiny.ARCHITECTURES))
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("kind", list(KINDS))
def test_adapterhub_files_are_read_exactly(kind: str, base: loader.Base, path: Path, tmp_path: Path) -> None:
    layers = "transformer.h" if path.name == "gpt2" else "model.layers"
    config, tensors, networks = adapterhub_files.made(kind, layers)
    adapter = adapterhub.read(config, tensors, base.shape, AdapterLimits())
    assert adapter.config.form == KINDS[kind][1]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    textbook.attach(model, networks, KINDS[kind][1])
    step = Step(base, select(base.device, base.dtype))
    got = step.logits([Row(prompt, adapter) for prompt in PROMPTS])
    plain = step.logits([Row(prompt) for prompt in PROMPTS])
    for mine, theirs, without in zip(got, textbook.logits(model, PROMPTS), plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=0)
        assert (without - theirs).abs().max() > 100 * TOLERANCE
    directory.write(adapter, tmp_path, base.shape)  # and in our own form
    again = directory.load(tmp_path, base.shape, AdapterLimits())
    assert all(torch.equal(a, b) for a, b in zip(adapter.tensors(), again.tensors(), strict=True))
    assert again.config == adapter.config


def _inner(**changes: Any) -> Spoil:
    return lambda config, tensors: config["config"].update(changes)


BAD: dict[str, tuple[str, str, Spoil]] = {
    "gating": ("FEATURE_UNSUPPORTED", "config.use_gating", _inner(use_gating=True)),
    "norm after": ("FEATURE_UNSUPPORTED", "config.ln_after", _inner(ln_after=True)),
    "post_add": ("FEATURE_UNSUPPORTED", "config.residual_before_ln", _inner(residual_before_ln="post_add")),
    "no residual": ("FEATURE_UNSUPPORTED", "config.original_ln_after", _inner(original_ln_after=False)),
    "invertible": ("FEATURE_UNSUPPORTED", "config.inv_adapter", _inner(inv_adapter="nice")),
    "compacter": ("FEATURE_UNSUPPORTED", "config.phm_layer", _inner(phm_layer=True)),
    "cross attention": ("FEATURE_UNSUPPORTED", "config.cross_adapter", _inner(cross_adapter=True)),
    "LoRA": ("FEATURE_UNSUPPORTED", "config.architecture", _inner(architecture="lora")),
    "learned scaling": ("FEATURE_UNSUPPORTED", "config.scaling", _inner(scaling="learned")),
    "tanh": ("FEATURE_UNSUPPORTED", "config.non_linearity", _inner(non_linearity="tanh")),
    "an unknown key": ("CONFIG_FIELD_FORBIDDEN", "config.surprise", _inner(surprise=1)),
    "a name for a config": ("FEATURE_UNSUPPORTED", "adapter_config.config", lambda c, t: c.update(config="pfeiffer")),
    "no place": ("CONFIG_TARGETS", "mh_adapter or output_adapter", _inner(mh_adapter=False, output_adapter=False)),
    "a map without a default": ("RANK_INVALID", "config.reduction_factor", _inner(reduction_factor={"0": 16})),
    "another factor": ("RANK_MISMATCH", "bottleneck_down", _inner(reduction_factor=8)),
    "a second adapter": (
        "TENSOR_UNKNOWN",
        "second adapter",
        lambda c, t: t.update({"model.layers.0.output_adapters.adapters.two.adapter_up.bias": torch.zeros(64)}),
    ),
    "a layer too many": (
        "MODULE_UNKNOWN",
        "layer 9",
        lambda c, t: t.update({"model.layers.9.output_adapters.adapters.reverse.adapter_up.bias": torch.zeros(64)}),
    ),
    "a foreign tensor": (
        "TENSOR_UNKNOWN",
        "gate",
        lambda c, t: t.update({"model.layers.0.output_adapters.adapters.reverse.gate.bias": torch.zeros(1)}),
    ),
    "nothing": ("ADAPTER_NO_EFFECT", "changes nothing", lambda c, t: t.clear()),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_what_adapterhub_means_otherwise_is_refused(kind: str, llama: loader.Base) -> None:
    config, tensors, _ = adapterhub_files.made("double_seq_bn", "model.layers")
    adapterhub.read(config, tensors, llama.shape, AdapterLimits())  # the control: it was good
    reason, text, spoil = BAD[kind]
    spoil(config, tensors)
    with pytest.raises(InvalidAdapter) as refused:
        adapterhub.read(config, tensors, llama.shape, AdapterLimits())
    assert refused.value.reason == reason
    assert text in refused.value.message
