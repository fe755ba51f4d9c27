"""A Llama of a given shape with random weights, and LoRAs for it, made on the device in seconds, with no download."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from weft.adapters import packed_adapter
from weft.adapters.packed_adapter import PackedAdapter
from weft.config import Quantization
from weft.kernels.selection import select
from weft.methods import lora
from weft.methods.protocol import Adapter, BaseShape, SiteKind
from weft.model import loader, paged_attention, serving_form

_STD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    max_model_len: int = 4096

    def config(self) -> LlamaConfig:
        """Return the config in transformers' form."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            max_position_embeddings=self.max_model_len,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(
            name="8b", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_layers=32, num_heads=32,
            num_kv_heads=8,
        ),
        Shape(
            name="1b", vocab_size=8192, hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32,
            num_kv_heads=8,
        ),
        Shape(
            name="tiny", vocab_size=128, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4,
            num_kv_heads=2,
        ),
    )
}  # fmt: skip


def make_model(shape: Shape, device: torch.device, quantization: Quantization, *, attention: str) -> Any:
    """Make transformers' Llama in bfloat16; with NF4 in `quantization`, its linear modules except the head are NF4."""
    config = shape.config()
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.bfloat16)
    generator = torch.Generator(device).manual_seed(0)

    def noise(like: Tensor) -> Tensor:
        return _STD * torch.randn(like.shape, generator=generator, device=device, dtype=torch.bfloat16)

    for name, module in list(model.named_modules()):
        if quantization is Quantization.NF4 and isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, _nf4(noise(module.weight)))
            continue
        for key, parameter in module.named_parameters(recurse=False):
            value = noise(parameter) if parameter.dim() > 1 else torch.ones(parameter.shape, device=device)
            setattr(module, key, nn.Parameter(value.bfloat16(), requires_grad=False))
    with device:  # its buffers are computed, not loaded
        model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval().requires_grad_(False)


def _nf4(weight: Tensor) -> nn.Module:
    import bitsandbytes as bnb

    size_out, size_in = weight.shape
    linear = bnb.nn.Linear4bit(
        size_in,
        size_out,
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=False,
        quant_type="nf4",
        device="meta",
    )
    held = bnb.nn.Params4bit(weight, requires_grad=False, compress_statistics=False, quant_type="nf4")
    linear.weight = held.to(weight.device)  # the move quantizes
    return linear.eval()


def make_base(shape: Shape, device: torch.device, quantization: Quantization) -> loader.Base:
    """Make a base as it serves, but without a tokenizer."""
    paged_attention.register()
    model = make_model(shape, device, quantization, attention=paged_attention.ATTENTION)
    base = loader.wrap(
        loader.Checkpoint(
            model=model,
            tokenizer=None,
            name=shape.name,
            digest=shape.name,
            quantization=quantization,
            dtype=torch.bfloat16,
        )
    )
    serving_form.take(base, select(base.device, base.dtype))
    return base


class Loras:
    """LoRAs of one rank on every linear site, in any number.

    num_buffers: number of LoRAs with host weights of their own; the others share these, but each is loaded separately.
    """

    def __init__(self, base: BaseShape, device: torch.device, *, rank: int, num_buffers: int) -> None:
        suffixes = tuple(sorted({site.suffix for site in base.of_kind(SiteKind.LINEAR)}))
        config = lora.math.LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=suffixes)
        sites = {
            site.name: lora.math.LoraParams(
                torch.zeros(rank, site.in_features), torch.zeros(site.out_features, rank), config.alpha / rank
            )
            for site in base.of_kind(SiteKind.LINEAR)
        }
        pinned = device.type == "cuda"
        adapter = Adapter(method=lora.METHOD, config=config, sites=sites)
        self._template = packed_adapter.build(adapter, base, dtype=torch.bfloat16)
        self.size_bytes = self._template.buffer.nbytes
        self._buffers = []
        generator = torch.Generator(device).manual_seed(1)
        for _ in range(num_buffers):
            values = torch.randn(self.size_bytes // 2, generator=generator, device=device, dtype=torch.bfloat16)
            buffer = torch.empty(self.size_bytes, dtype=torch.uint8, pin_memory=pinned)
            buffer.view(torch.bfloat16).copy_(_STD * values)
            self._buffers.append(buffer)

    def packed(self, index: int) -> PackedAdapter:
        """Return the adapter with this number."""
        return replace(self._template, buffer=self._buffers[index % len(self._buffers)])
