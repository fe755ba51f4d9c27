"""The bench models and their adapters: random, seeded, made when first needed, the same files for every backend.

They lie outside git: models in `benchmarks/.models/<model>`, adapters in `benchmarks/.models/adapters/<model>/<kind>`.
Adapters are PEFT directories in bfloat16 on every linear module, bound to no base, so that they also serve a quantized
one; bottleneck adapters, which PEFT does not have, are in our own format.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from weft.config import ModelConfig, Quantization
from weft.methods import bottleneck, ia3, lora, prefix
from weft.methods.checkpoint import directory
from weft.methods.protocol import Adapter, BaseShape, SiteKind
from weft.model import loader, paged_attention

VOCAB_SIZE = 8192
FOLDER = Path(__file__).resolve().parent / ".models"
_NUM_VIRTUAL_TOKENS = 16
_REDUCTION_FACTOR = 16.0  # AdapterHub's default: a width of 48 in bench-80m


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """Sizes in which bench models differ; all are Llamas with tied embeddings."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int = VOCAB_SIZE


SIZES: Mapping[str, Size] = MappingProxyType(
    {
        "bench-80m": Size(hidden_size=768, intermediate_size=2048, num_layers=12, num_heads=12, num_kv_heads=4),
        "bench-1b": Size(hidden_size=2048, intermediate_size=8192, num_layers=16, num_heads=32, num_kv_heads=8),
    }
)


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of adapter: its method, and its rank if it has one. `str` is its folder and the start of its ids."""

    method: str
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.method}-r{self.rank}" if self.rank else self.method


def lora_of(rank: int) -> Kind:
    """Return a LoRA on every linear module."""
    return Kind("lora", rank)


IA3, PREFIX, BOTTLENECK = Kind("ia3"), Kind("prefix"), Kind("bottleneck")


class Hold(NamedTuple):
    """`count` adapters of a kind, from number `first` on."""

    kind: Kind
    count: int
    first: int = 0

    @property
    def ids(self) -> list[str]:
        return [f"{self.kind}-{seed:04d}" for seed in self._seeds]

    @property
    def _seeds(self) -> range:
        return range(self.first, self.first + self.count)

    def paths(self, model: str, *, folder: Path = FOLDER) -> list[tuple[str, str]]:
        """Return (id, directory) of each, whether or not it has been made."""
        within = folder / "adapters" / model / str(self.kind)
        return [(adapter_id, str(within / adapter_id)) for adapter_id in self.ids]

    def make(self, model: str, *, folder: Path = FOLDER) -> list[tuple[str, str]]:
        """Make the missing ones, and return `paths`."""
        listed = self.paths(model, folder=folder)
        places = zip(self._seeds, (Path(path) for _, path in listed), strict=True)
        missing = [(seed, path) for seed, path in places if not (path / directory.CONFIG_FILE).exists()]
        if missing:
            shape = shape_of(base(model, folder=folder))
            for seed, path in missing:
                write(made(self.kind, shape, seed), path, shape)
        return listed


def base(name: str, *, folder: Path = FOLDER) -> Path:
    """Return the directory of a model of SIZES, making it if needed."""
    path = folder / name
    if not (path / "tokenizer.json").exists():  # the last file that is written
        save(SIZES[name], path)
    return path


def save(size: Size, path: Path) -> Path:
    """Write a checkpoint directory in bfloat16, with a tokenizer of one word per token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(path)
    words = {f"w{index}": index for index in range(size.vocab_size)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0").save_pretrained(path)
    return path


def shape_of(path: Path) -> BaseShape:
    """Return the shape that adapters are fitted to, without the digest that would bind them to one quantization."""
    paged_attention.register()
    config = ModelConfig(path=path, quantization=Quantization.NONE, device="cpu", dtype="bfloat16")
    return replace(loader.load(config, attention=paged_attention.ATTENTION).shape, digest="")


def write(adapter: Adapter, path: Path, shape: BaseShape) -> None:
    """Write the adapter's directory, its matrices in bfloat16; the config comes last."""
    directory.write(adapter, path, shape)
    config = (path / directory.CONFIG_FILE).read_bytes()
    (path / directory.CONFIG_FILE).unlink()
    weights = path / directory.WEIGHTS_FILE
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    (path / directory.CONFIG_FILE).write_bytes(config)


def made(kind: Kind, shape: BaseShape, seed: int) -> Adapter:
    """Make an adapter with an effect: nothing in it is zero or one as at the start of training."""
    generator = torch.Generator().manual_seed(seed)
    return _MAKERS[kind.method](kind, shape, generator)


def _lora(kind: Kind, shape: BaseShape, generator: torch.Generator) -> Adapter:
    linear = shape.of_kind(SiteKind.LINEAR)
    suffixes = tuple(sorted({site.suffix for site in linear}))
    config = lora.math.LoraConfig(rank=kind.rank, alpha=2.0 * kind.rank, target_modules=suffixes)
    sites = {}
    for site in linear:
        params = lora.math.init(config, site, generator)
        sites[site.name] = params._replace(b=0.02 * torch.randn(params.b.shape, generator=generator))
    return Adapter(method=lora.METHOD, config=config, sites=sites)


def _ia3(kind: Kind, shape: BaseShape, generator: torch.Generator) -> Adapter:
    del kind
    config = ia3.math.Ia3Config(target_modules=("k_proj", "v_proj", "down_proj"), feedforward_modules=("down_proj",))
    sites = {}
    for site in shape.of_kind(SiteKind.LINEAR):
        if site.suffix in config.target_modules:
            params = ia3.math.init(config, site)
            noise = torch.randn(params.scale.shape, generator=generator)
            sites[site.name] = params._replace(scale=1 + 0.1 * noise)
    return Adapter(method=ia3.METHOD, config=config, sites=sites)


def _prefix(kind: Kind, shape: BaseShape, generator: torch.Generator) -> Adapter:
    del kind
    config = prefix.math.PrefixConfig(num_virtual_tokens=_NUM_VIRTUAL_TOKENS)
    return Adapter(method=prefix.METHOD, config=config, sites={}, prefix=prefix.math.init(config, shape, generator))


def _bottleneck(kind: Kind, shape: BaseShape, generator: torch.Generator) -> Adapter:
    del kind
    config = bottleneck.math.BottleneckConfig(reduction_factor=_REDUCTION_FACTOR, has_norm=False)
    sites = {}
    for site in bottleneck.math.places(config, shape.sites.values()):
        params = bottleneck.math.init(config, site, generator)
        sites[site.name] = params._replace(up=0.02 * torch.randn(params.up.shape, generator=generator))
    return Adapter(method=bottleneck.METHOD, config=config, sites=sites)


_MAKERS: Mapping[str, Callable[[Kind, BaseShape, torch.Generator], Adapter]] = MappingProxyType(
    {"lora": _lora, "ia3": _ia3, "prefix": _prefix, "bottleneck": _bottleneck}
)


def prompts(count: int, num_tokens: int) -> list[list[int]]:
    """Return token ids of `count` prompts, the same in every run."""
    dice = random.Random(0)
    return [[dice.randrange(1, VOCAB_SIZE) for _ in range(num_tokens)] for _ in range(count)]
