"""The bench model and its adapters: seeded, random, made on the spot, the same files for every backend."""

import random
from pathlib import Path

import tokenizers
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from weft.methods import lora
from weft.methods.checkpoint import directory
from weft.methods.protocol import Adapter, BaseShape, SiteKind

VOCAB_SIZE = 8192


def save_bench_80m(path: Path) -> Path:
    """`bench-80m`: a Llama of 81 million parameters with random weights, bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    words = {f"w{index}": index for index in range(VOCAB_SIZE)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(path)
    return path


def save_loras(path: Path, base: BaseShape, *, count: int, rank: int) -> list[Path]:
    """PEFT directories of `count` LoRAs on every linear module, with non-zero weights."""
    suffixes = tuple(sorted({site.suffix for site in base.of_kind(SiteKind.LINEAR)}))
    paths = []
    for seed in range(count):
        generator = torch.Generator().manual_seed(seed)
        config = lora.LoraConfig(rank=rank, alpha=2.0 * rank, target_modules=suffixes)
        sites = {}
        for site in base.of_kind(SiteKind.LINEAR):
            params = lora.init(config, site, generator)
            sites[site.name] = params._replace(b=0.02 * torch.randn(params.b.shape, generator=generator))
        paths.append(path / f"lora-{seed:02d}")
        directory.write(Adapter(method=lora.METHOD, config=config, sites=sites), paths[-1], base)
    return paths


def prompts(count: int, num_tokens: int) -> list[list[int]]:
    """Token ids of as many prompts, the same in every run."""
    dice = random.Random(0)
    return [[dice.randrange(1, VOCAB_SIZE) for _ in range(num_tokens)] for _ in range(count)]
