"""Tiny random bases of five architectures and adapters of every method, for tests that need real ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from weft.methods import bitfit, bottleneck, dora, ia3, lora, prefix, prompt, ptuning, vera
from weft.methods.protocol import Adapter, BaseShape, SiteKind

VOCAB_SIZE = 128
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # large enough that different adapters give different tokens
}
ARCHITECTURES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**_SIZES),
    "mistral": lambda: MistralConfig(**_SIZES, sliding_window=24),
    "phi3": lambda: Phi3Config(**_SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=256,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.2,
    ),
}


def save_base(directory: Path, architecture: str = "llama", *, seed: int = 0) -> Path:
    """Make a checkpoint directory with a tokenizer of one token per ASCII character."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[architecture]()).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.2)  # zero biases would hide a method's effect on them
    model.save_pretrained(directory)
    save_tokenizer(directory, VOCAB_SIZE)
    return directory


def save_tokenizer(directory: Path, vocab_size: int) -> None:
    """Write a tokenizer of one token per character, the first `vocab_size` of Unicode."""
    characters = {chr(code): code for code in range(vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(characters, unk_token="\x00"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="\x00").save_pretrained(directory)


def random_lora(
    base: BaseShape, *, rank: int, seed: int, targets: tuple[str, ...] | None = None, lora_bias: bool = False
) -> Adapter:
    """Return a LoRA with a visible effect at every linear site, or at the sites whose suffix is in `targets`."""
    generator = torch.Generator().manual_seed(seed)
    suffixes = tuple(sorted({site.suffix for site in base.of_kind(SiteKind.LINEAR)}))
    config = lora.math.LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=targets or suffixes, lora_bias=lora_bias)
    sites = {}
    for site in base.sites.values():
        if site.suffix in config.target_modules:
            params = lora.math.init(config, site, generator)
            sites[site.name] = params._replace(b=torch.randn(params.b.shape, generator=generator) * 0.2)
            if lora_bias:
                sites[site.name] = sites[site.name]._replace(
                    bias=torch.randn(site.out_features, generator=generator) * 0.2
                )
    return Adapter(method=lora.METHOD, config=config, sites=sites)


def random_dora(base: BaseShape, *, rank: int, seed: int, targets: tuple[str, ...] | None = None) -> Adapter:
    """Return a DoRA with a visible effect at every linear site, or at the sites whose suffix is in `targets`."""
    generator = torch.Generator().manual_seed(seed)
    suffixes = tuple(sorted({site.suffix for site in base.of_kind(SiteKind.LINEAR)}))
    config = dora.math.DoraConfig(rank=rank, alpha=2.0 * rank, target_modules=targets or suffixes)
    sites = {}
    for site in base.sites.values():
        if site.suffix in config.target_modules:
            params = dora.math.init(config, site, generator)
            stretch = 1 + 0.3 * torch.randn(site.out_features, generator=generator)
            sites[site.name] = params._replace(
                b=torch.randn(params.b.shape, generator=generator) * 0.2, magnitude=params.magnitude * stretch
            )
    return Adapter(method=dora.METHOD, config=config, sites=sites)


def random_vera(base: BaseShape, *, rank: int, seed: int, targets: tuple[str, ...] = ()) -> Adapter:
    """Return a VeRA with a visible effect at every linear site, or at the sites whose suffix is in `targets`."""
    generator = torch.Generator().manual_seed(seed)
    config = vera.math.VeraConfig(rank=rank, target_modules=targets)
    begun = vera.math.begin(config, base, generator)
    sites = {
        name: params._replace(
            lambda_d=torch.randn(rank, generator=generator),
            lambda_b=torch.randn(len(params.lambda_b), generator=generator),
        )
        for name, params in begun.sites.items()
    }
    return Adapter(method=vera.METHOD, config=begun.config, sites=sites)


def random_bitfit(
    base: BaseShape, *, seed: int, kinds: tuple[SiteKind, ...] = (SiteKind.LINEAR, SiteKind.NORM)
) -> Adapter:
    """Return biases with a visible effect at every site of some kinds."""
    generator = torch.Generator().manual_seed(seed)
    chosen = base.of_kind(*kinds)
    config = bitfit.math.BitfitConfig(target_modules=tuple(sorted({site.suffix for site in chosen})))
    sites = {
        site.name: bitfit.math.init(config, site)._replace(
            bias=torch.randn(site.out_features, generator=generator) * 0.2
        )
        for site in chosen
    }
    return Adapter(method=bitfit.METHOD, config=config, sites=sites)


_IA3_TARGETS = {
    "qkv_proj": ("qkv_proj", "down_proj"),
    "c_attn": ("c_attn", "mlp.c_proj"),
    "k_proj": ("k_proj", "v_proj", "down_proj"),
}


def random_ia3(base: BaseShape, *, seed: int) -> Adapter:
    """Return an IA³ on keys, values and the feed-forward input."""
    generator = torch.Generator().manual_seed(seed)
    suffixes = {site.suffix for site in base.of_kind(SiteKind.LINEAR)}
    targets = next(targets for key, targets in _IA3_TARGETS.items() if key in suffixes)
    config = ia3.math.Ia3Config(target_modules=targets, feedforward_modules=targets[-1:])
    sites = {}
    for site in base.sites.values():
        if any(site.name.endswith("." + target) for target in targets):
            is_feedforward = site.name.endswith("." + targets[-1])
            size = site.in_features if is_feedforward else site.out_features
            scale = 1 + 0.5 * torch.randn(size, generator=generator)
            sites[site.name] = ia3.math.Ia3Params(scale, is_feedforward)
    return Adapter(method=ia3.METHOD, config=config, sites=sites)


def random_prefix(base: BaseShape, *, length: int, seed: int) -> Adapter:
    """Return a prefix of `length` virtual positions."""
    config = prefix.math.PrefixConfig(num_virtual_tokens=length, init_std=1.0)
    params = prefix.math.init(config, base, torch.Generator().manual_seed(seed))
    return Adapter(method=prefix.METHOD, config=config, sites={}, prefix=params)


def random_prompt(base: BaseShape, *, length: int, seed: int) -> Adapter:
    """Return a prompt of `length` rows."""
    config = prompt.math.PromptConfig(num_virtual_tokens=length)
    params = prompt.math.init(config, base, torch.Generator().manual_seed(seed))
    return Adapter(method=prompt.METHOD, config=config, sites={}, prefix=params)


def random_ptuning(base: BaseShape, *, length: int, seed: int) -> Adapter:
    """Return `length` rows as an encoder of P-tuning could have made them."""
    config = ptuning.math.PtuningConfig(num_virtual_tokens=length)
    params = ptuning.math.init(config, base, torch.Generator().manual_seed(seed))
    return Adapter(method=ptuning.METHOD, config=config, sites={}, prefix=params)


def random_bottleneck(base: BaseShape, config: bottleneck.math.BottleneckConfig, *, seed: int) -> Adapter:
    """Return a bottleneck adapter with a visible effect wherever its config places one."""
    generator = torch.Generator().manual_seed(seed)
    sites = {}
    for site in bottleneck.math.places(config, base.sites.values()):
        params = bottleneck.math.init(config, site, generator)
        randoms = {
            name: getattr(params, name) + 0.2 * torch.randn(getattr(params, name).shape, generator=generator)
            for name in ("down_bias", "up", "up_bias", "norm", "norm_bias")
            if getattr(params, name) is not None
        }
        sites[site.name] = params._replace(**randoms)
    return Adapter(method=bottleneck.METHOD, config=config, sites=sites)
