"""Files of the LoRA family and of BitFit that must not become adapters: rows 49-62 of the table of bad inputs.

Over a real channel; after each of them nothing is left in the store, and good requests are answered as before.
"""

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.server.conftest import Sources
from tests.server.files import Files, Parts
from tests.server.live import LiveServer, Loop, refused
from weft.config import WeftConfig
from weft.methods import dora
from weft.methods.base_weight import ModuleWeight

_Q = "base_model.model.model.layers.0.self_attn.q_proj."


class _Good(NamedTuple):
    lora: Parts
    biased: Parts
    dora: Parts
    bitfit: Parts
    adalora: Parts
    vera: Parts


class _Case(NamedTuple):
    row: str
    reason: str  # "" if the file is good after all
    make: Callable[[_Good], Files]
    says: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def good(sources: Sources) -> _Good:
    base = sources.base
    lora = Parts.of(tiny.random_lora(base, rank=8, seed=70), base)
    adalora = {name.removesuffix(".weight"): tensor for name, tensor in lora.tensors.items()}
    adalora |= {n.replace("lora_A", "lora_E"): torch.ones(len(t), 1) for n, t in adalora.items() if "lora_A" in n}
    return _Good(
        lora=lora,
        biased=Parts.of(tiny.random_lora(base, rank=8, seed=71, lora_bias=True), base),
        dora=Parts.of(tiny.random_dora(base, rank=8, seed=72), base),
        bitfit=Parts.of(tiny.random_bitfit(base, seed=73), base),
        adalora=Parts(
            {"peft_type": "ADALORA", "r": 8, "init_r": 8, "target_r": 4, "lora_alpha": 16, "rank_pattern": None},
            adalora,
            {"format": "pt"},
        ),
        vera=Parts.of(tiny.random_vera(base, rank=8, seed=75), base),
    )


def _with(method: str, **tensors: Tensor) -> Callable[[_Good], Files]:
    """Replace or add tensors of layer 0's q_proj, given by the end of their name."""

    def make(good: _Good) -> Files:
        parts: Parts = getattr(good, method)
        changed = {_Q + ending.replace("__", "."): tensor for ending, tensor in tensors.items()}
        return parts.with_tensors({**parts.tensors, **changed})

    return make


def _without(method: str, ending: str) -> Callable[[_Good], Files]:
    def make(good: _Good) -> Files:
        parts: Parts = getattr(good, method)
        return parts.with_tensors({name: t for name, t in parts.tensors.items() if name != _Q + ending})

    return make


def _config(method: str, **changes: Any) -> Callable[[_Good], Files]:
    return lambda good: getattr(good, method).configured(**changes)


def _every(method: str, change: Callable[[str, Tensor], Tensor]) -> Callable[[_Good], Files]:
    def make(good: _Good) -> Files:
        parts: Parts = getattr(good, method)
        return parts.with_tensors({name: change(name, tensor) for name, tensor in parts.tensors.items()})

    return make


def _added(**tensors: Tensor) -> Callable[[_Good], Files]:
    """Add tensors to the LoRA; `__` stands for a dot."""
    return lambda good: good.lora.with_tensors(
        {**good.lora.tensors, **{"base_model.model." + name.replace("__", "."): t for name, t in tensors.items()}}
    )


def _frozen(**changes: Tensor | None) -> Callable[[_Good], Files]:
    """Change VeRA's projection, or leave out a part of it."""

    def make(good: _Good) -> Files:
        changed = {**good.vera.tensors, **{f"base_model.{name}": tensor for name, tensor in changes.items()}}
        return good.vera.with_tensors({name: tensor for name, tensor in changed.items() if tensor is not None})

    return make


_NAN = torch.full((64,), float("nan"))
CASES = [
    *(_Case(f"good-{name}", "", lambda g, name=name: getattr(g, name).files()) for name in _Good._fields),
    # An option requires its tensors, and the tensors require the option.
    _Case("53-dora-without-its-option", "TENSOR_UNKNOWN", _config("dora", use_dora=False), ("magnitude",)),
    _Case("53-option-without-dora", "PAIR_INCOMPLETE", _config("lora", use_dora=True), ("lora_magnitude_vector",)),
    _Case("53-bias-without-its-option", "TENSOR_UNKNOWN", _config("biased", lora_bias=False), ("lora_B.bias",)),
    _Case("53-option-without-bias", "PAIR_INCOMPLETE", _config("lora", lora_bias=True), ("lora_B.bias",)),
    _Case("53-dora-with-bias", "FEATURE_UNSUPPORTED", _config("dora", lora_bias=True), ("lora_bias",)),
    _Case("53-use-dora-1", "CONFIG_INVALID", _config("dora", use_dora=1), ("use_dora",)),
    _Case("53-bias-form", "FEATURE_UNSUPPORTED", _config("lora", bias="some"), ("adapter_config.bias", "lora_only")),
    _Case("53-bias-of-dora", "FEATURE_UNSUPPORTED", _config("dora", bias="lora_only"), ("adapter_config.bias",)),
    _Case("53-bias-of-a-base-without", "", _config("lora", bias="all")),  # Llama has no biases, so PEFT saves none
    _Case(
        "53-modules-to-save", "FEATURE_UNSUPPORTED", _config("lora", modules_to_save=["lm_head"]), ("target_modules",)
    ),
    _Case("53-beft-modules-to-save", "FEATURE_UNSUPPORTED", _config("bitfit", modules_to_save=["lm_head"])),
    _Case("53-saved-head", "FEATURE_UNSUPPORTED", _added(lm_head__weight=torch.ones(128, 64)), ("target_modules",)),
    _Case(
        "53-embedding",
        "FEATURE_UNSUPPORTED",
        _added(
            model__embed_tokens__lora_embedding_A=torch.ones(8, 128),
            model__embed_tokens__lora_embedding_B=torch.ones(64, 8),
        ),
        ("embed_tokens", "target_modules"),
    ),
    _Case("53-other-head", "FEATURE_UNSUPPORTED", _added(lm_head__base_layer__weight=torch.ones(128, 64)), ("head",)),
    _Case("57-head", "DIM_MISMATCH", _added(lm_head__base_layer__weight=torch.ones(128, 32)), ("[128, 64]",)),
    _Case(
        "55-saved-projection",
        "TENSOR_UNKNOWN",
        _added(model__layers__0__self_attn__q_proj__base_layer__weight=torch.ones(64, 64)),
    ),
    _Case("49-adalora", "RANK_INVALID", _config("adalora", init_r=0), ("init_r",)),
    _Case("50-adalora", "RANK_TOO_LARGE", _config("adalora", init_r=257), ("limit 256", "given 257")),
    _Case("51-adalora", "RANK_MISMATCH", _config("adalora", init_r=12), ("lora_A",)),
    _Case("51-adalora-pruned", "RANK_MISMATCH", _config("adalora", init_r=4, rank_pattern={"a": [True]}), ("limit 4",)),
    _Case("52-adalora", "SCALE_INVALID", _config("adalora", lora_alpha=1e38), ("lora_alpha",)),
    _Case(
        "53-adalora-alora",
        "FEATURE_UNSUPPORTED",
        _config("adalora", alora_invocation_tokens=[1]),
        ("alora_invocation_tokens",),
    ),
    _Case("53-adalora-dora", "FEATURE_UNSUPPORTED", _config("adalora", use_dora=True), ("use_dora",)),
    _Case("54-adalora", "PAIR_INCOMPLETE", _without("adalora", "lora_E"), ("lora_E",)),
    _Case("49-vera", "RANK_INVALID", _config("vera", r=0), ("adapter_config.r",)),
    _Case("50-vera", "RANK_TOO_LARGE", _config("vera", r=257), ("limit 256", "given 257")),
    _Case("51-vera", "RANK_MISMATCH", _config("vera", r=4), ("vera_A", "limit 4", "given 8")),
    _Case(
        "53-vera", "FEATURE_UNSUPPORTED", _config("vera", save_projection=False), ("adapter_config.save_projection",)
    ),
    _Case("54-vera", "PAIR_INCOMPLETE", _without("vera", "vera_lambda_d"), ("vera_lambda_d",)),
    _Case("54-vera-a", "PAIR_INCOMPLETE", _frozen(vera_A=None), ("base_model.vera_A", "save_projection=True")),
    _Case("55-vera", "MODULE_UNKNOWN", lambda g: _renamed(g.vera, "layers.1.", "layers.9."), ("layers.9.",)),
    _Case("55-vera-c", "TENSOR_UNKNOWN", _frozen(vera_C=torch.ones(8)), ("base_model.vera_C",)),
    _Case("57-vera-a", "DIM_MISMATCH", _frozen(vera_A=torch.ones(8, 127)), ("[8, 128]", "[8, 127]")),
    _Case("57-vera-b", "DIM_MISMATCH", _frozen(vera_B=torch.ones(128)), ("[128, 8]", "[128]")),
    _Case("57-vera", "DIM_MISMATCH", _with("vera", vera_lambda_b=torch.ones(32)), ("[64]", "[32]")),
    _Case("59-vera", "NON_FINITE", _with("vera", vera_lambda_b=_NAN), ("vera_lambda_b",)),
    _Case("59-vera-a", "NON_FINITE", _frozen(vera_A=_NAN[:8, None].expand(8, 128).clone()), ("vera_A",)),
    _Case("60-vera", "WEIGHT_OUT_OF_RANGE", _with("vera", vera_lambda_d=torch.full((8,), 6e4)), ("vera_lambda_d",)),
    _Case("60-vera-times-a", "WEIGHT_OUT_OF_RANGE", _frozen(vera_A=torch.full((8, 128), 900.0)), ("vera_lambda_d",)),
    _Case("62-vera-zero", "ADAPTER_NO_EFFECT", _every("vera", lambda name, t: t * ("lambda_b" not in name))),
    _Case("62-vera-a-zero", "ADAPTER_NO_EFFECT", _frozen(vera_A=torch.zeros(8, 128))),
    _Case("62-vera-larger", "", _frozen(vera_A=torch.ones(8, 200))),  # of a run that adapted larger modules
    _Case("54-dora", "PAIR_INCOMPLETE", _without("dora", "lora_magnitude_vector"), ("lora_magnitude_vector",)),
    _Case("54-bias", "PAIR_INCOMPLETE", _without("biased", "lora_B.bias"), ("lora_B.bias",)),
    _Case("55-bitfit", "MODULE_UNKNOWN", lambda g: _renamed(g.bitfit, "layers.1.", "layers.9."), ("layers.9.",)),
    _Case("56-bitfit", "ADAPTER_NO_EFFECT", lambda g: _renamed(g.bitfit, "model.layers", "h"), ("h.0",)),
    _Case("57-magnitude", "DIM_MISMATCH", _with("dora", lora_magnitude_vector=torch.ones(32)), ("[64]", "[32]")),
    _Case("57-bias", "DIM_MISMATCH", _with("biased", lora_B__bias=torch.ones(1, 64)), ("[64]", "[1, 64]")),
    _Case("57-e", "DIM_MISMATCH", _with("adalora", lora_E=torch.ones(8)), ("[8, 1]", "[8]")),
    _Case("57-beft", "DIM_MISMATCH", _with("bitfit", beft_bias=torch.ones(64)), ("[1, 64]", "[64]")),
    _Case("59-magnitude", "NON_FINITE", _with("dora", lora_magnitude_vector=_NAN), ("magnitude",)),
    _Case("59-bias", "NON_FINITE", _with("biased", lora_B__bias=_NAN), ("lora_B.bias",)),
    _Case("59-e", "NON_FINITE", _with("adalora", lora_E=_NAN[:8, None]), ("lora_E",)),
    _Case("59-beft", "NON_FINITE", _with("bitfit", beft_bias=_NAN[None]), ("beft_bias",)),
    _Case("60-magnitude", "WEIGHT_OUT_OF_RANGE", _with("dora", lora_magnitude_vector=torch.full((64,), 6e4))),
    _Case("60-beft", "WEIGHT_OUT_OF_RANGE", _with("bitfit", beft_bias=torch.full((1, 64), -1e30))),
    _Case("62-beft-zero", "ADAPTER_NO_EFFECT", _every("bitfit", lambda name, t: t * 0)),
    _Case("62-adalora-zero", "ADAPTER_NO_EFFECT", _every("adalora", lambda name, t: t * ("lora_E" not in name))),
    _Case("62-bias-alone", "", _every("biased", lambda name, t: t * (not name.endswith("lora_B.weight")))),
    _Case("62-magnitude-alone", "", _every("dora", lambda name, t: t * ("lora_B" not in name))),
    _Case("62-denormal-magnitude", "", _every("dora", lambda name, t: t * 0 + 1e-40 if "magnitude" in name else t)),
]


def _renamed(parts: Parts, old: str, new: str) -> Files:
    return parts.with_tensors({name.replace(old, new): tensor for name, tensor in parts.tensors.items()})


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
def test_row(case: _Case, server: LiveServer, good: _Good, sources: Sources) -> None:
    path = case.make(good).write(sources.root / "spoiled-family" / case.row)
    if case.reason:
        refused(
            lambda: server.client.register("spoiled", path), "INVALID_ARGUMENT", case.reason, *case.says, retry=False
        )
    else:
        server.client.register("spoiled", path)
        server.client.unregister("spoiled")


def test_an_untrained_dora_has_no_effect(server: LiveServer, sources: Sources) -> None:
    """B is zero and every length is the base's own, which shows only in the base's weight."""
    made = tiny.random_dora(sources.base, rank=4, seed=74)
    untrained = {name: dora.math.init(made.config, sources.base.sites[name]) for name in made.sites}
    parts = Parts.of(replace(made, sites=untrained), sources.base)
    path = parts.files().write(sources.root / "spoiled-family" / "untrained")
    refused(lambda: server.client.register("spoiled", path), "INVALID_ARGUMENT", "ADAPTER_NO_EFFECT", retry=False)
    # The control: lengths that have moved by five percent are an effect.
    moved = {name: t * 1.05 if "magnitude" in name else t for name, t in parts.tensors.items()}
    server.client.register("spoiled", parts.with_tensors(moved).write(sources.root / "spoiled-family" / "moved"))
    server.client.unregister("spoiled")


def test_dora_is_folded_on_the_engine_thread(
    server: LiveServer, good: _Good, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker parses the file; the engine thread alone reads the base's weight."""
    readers: set[str] = set()
    blocks = ModuleWeight.blocks

    def spied(self: ModuleWeight, dtype: torch.dtype) -> Iterator[Tensor]:
        readers.add(threading.current_thread().name)
        return blocks(self, dtype)

    monkeypatch.setattr(ModuleWeight, "blocks", spied)
    server.client.register("dora", good.dora.files().write(sources.root / "spoiled-family" / "dora"))
    assert readers == {"weft-engine"}
    assert server.client.tokens("dora", 12) != server.client.tokens(None, 12)
    server.client.unregister("dora")


def test_a_stored_dora_comes_back_after_a_restart(
    loop: Loop, config: WeftConfig, good: _Good, sources: Sources, tmp_path: Path
) -> None:
    """Restoring waits for the engine thread, which must therefore run by then."""
    config = replace(config, store=tmp_path)
    path = good.dora.files().write(sources.root / "spoiled-family" / "stored")
    answers = []
    for start in range(2):
        live = LiveServer(loop, config)
        try:
            if not start:
                live.client.register("dora", path)
            answers.append((live.client.tokens("dora", 12), live.client.tokens(None, 12)))
        finally:
            live.stop()
    assert answers[0] == answers[1]
    assert answers[0][0] != answers[0][1]
