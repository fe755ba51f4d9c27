"""The readers of hostile bytes, each with examples to begin from and the errors that it may raise."""

import itertools
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.message import DecodeError
from safetensors.torch import load_file

from tests import tiny
from tests.mixing import mixtures
from weft.adapters.catalog import Manifest, ManifestFault, decode
from weft.adapters.identifiers import AdapterDigest, AdapterId, parse_reference
from weft.adapters.ingest import read_config
from weft.adapters.safetensors_header import read_header
from weft.adapters.strict_json import JsonFault, parse_object
from weft.api import composition, validation
from weft.api.composition import WeightedReference
from weft.api.servicers import generation
from weft.config import AdapterLimits, RequestLimits
from weft.engine import token_ranges
from weft.engine.token_ranges import TokenRange
from weft.errors import WeftError
from weft.methods.bottleneck.math import BottleneckConfig, Form
from weft.methods.checkpoint import directory
from weft.methods.checkpoint import mixture as mixture_files
from weft.model.loader import Base
from weft.v1.generation_pb2 import GenerateRequest

_LIMITS = AdapterLimits()
_REQUEST_LIMITS = RequestLimits()
_JSON_DEPTH = 8
_FILE_MAX = 16_000  # of larger files, few changes would meet the header
_ID = AdapterId("alpha")


class Target(NamedTuple):
    """A reader.

    examples: bytes that it accepts. read: reads some, or raises one of `refusals`.
    """

    examples: Sequence[bytes]
    read: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...] = (WeftError,)


def targets(base: Base, files: Path) -> dict[str, Target]:
    """Return every target by name. `base` is any base; `files` is an empty directory for examples."""
    adapters = [_saved(files / name) for name in _write_adapters(base, files)]
    mixtures_ = [_saved(files / name) for name in _write_mixtures(base, files)]
    return {
        "header": Target(
            [saved.weights for saved in adapters + mixtures_ if len(saved.weights) < _FILE_MAX], _read_header
        ),
        "adapter_config": Target([config for config, _, _ in adapters], _Config(directory, base, adapters).read),
        "mixture_config": Target([config for config, _, _ in mixtures_], _Config(mixture_files, base, mixtures_).read),
        "request": Target(
            _requests(), _Request(replace(base, tokenizer=_WithTemplate())).read, (WeftError, DecodeError)
        ),
        "json": Target([config for config, _, _ in adapters + mixtures_], _read_json, (JsonFault,)),
        "manifest": Target(_manifests(), _read_manifest, (ManifestFault,)),
        "token_ranges": Target([struct.pack("<6i", 0, 3, 3, 9, 20, 2**31 - 1)], _read_ranges),
        "reference": Target([b"reverse-lora", b"a@" + b"0f" * 32], _read_reference),
    }


class _Saved(NamedTuple):
    config: bytes
    weights: bytes
    tensors: dict


def _write_adapters(base: Base, files: Path) -> list[str]:
    shape = base.shape
    adapters = {
        "lora": tiny.random_lora(shape, rank=2, seed=1),
        "dora": tiny.random_dora(shape, rank=2, seed=2),
        "vera": tiny.random_vera(shape, rank=2, seed=3),
        "bitfit": tiny.random_bitfit(shape, seed=4),
        "ia3": tiny.random_ia3(shape, seed=5),
        "prefix": tiny.random_prefix(shape, length=2, seed=6),
        "prompt": tiny.random_prompt(shape, length=2, seed=7),
        "ptuning": tiny.random_ptuning(shape, length=2, seed=8),
        "bottleneck": tiny.random_bottleneck(shape, BottleneckConfig(form=Form.SUM, size=2), seed=9),
    }
    for name, adapter in adapters.items():
        directory.write(adapter, files / name, shape)
    return list(adapters)


def _write_mixtures(base: Base, files: Path) -> list[str]:
    for name, shared in (("mixture", False), ("shared", True)):
        made = mixtures.made(base.shape, seed=1, num_experts=2, top_k=1, shared=shared)
        mixture_files.write(made.mixture, files / name, base.shape)
    return ["mixture", "shared"]


def _saved(path: Path) -> _Saved:
    [config], [weights] = path.glob("*.json"), path.glob("*.safetensors")
    return _Saved(config.read_bytes(), weights.read_bytes(), load_file(weights))


def _read_header(data: bytes) -> None:
    read_header(data, _LIMITS)


class _Config(NamedTuple):
    """Reads a configuration, with the tensors of each example until some suit it."""

    form: Any  # weft.methods.checkpoint.directory or .mixture
    base: Base
    examples: Sequence[_Saved]

    def read(self, data: bytes) -> None:
        config = read_config(data, _LIMITS)
        metadata = () if self.form is mixture_files else ({},)
        refusals: list[WeftError] = []
        for saved in self.examples:
            try:
                self.form.read(config, saved.tensors, *metadata, self.base.shape, _LIMITS)
                return
            except WeftError as refusal:
                refusals.append(refusal)
        raise refusals[0]


class _WithTemplate(NamedTuple):
    """All that the check reads of a tokenizer."""

    chat_template: str = "{{ messages }}"


class _Request(NamedTuple):
    """Parses a message as the transport does, and checks it."""

    base: Base

    def read(self, data: bytes) -> None:
        validation.check(generation._spec(GenerateRequest.FromString(data)), _REQUEST_LIMITS, self.base)


def _requests() -> list[bytes]:
    full = GenerateRequest(request_id="r1", text="hello world", cache_salt="salt")
    for name, weight in (("reverse-lora", 0.5), ("upper-ia3@" + "0f" * 32, -2.0)):
        part = full.composition.adapters.add(adapter_id=name, weight=weight)
        part.token_ranges.add(begin=0, end=4)
        part.token_ranges.add(begin=9)
    full.sampling.temperature, full.sampling.top_p, full.sampling.top_k = 0.7, 0.9, 40
    full.sampling.min_p, full.sampling.repetition_penalty, full.sampling.seed = 0.1, 1.2, 7
    full.stopping.max_new_tokens, full.stopping.min_new_tokens, full.stopping.ignore_eos = 16, 2, True
    full.stopping.stop.extend(["\n", "end"])
    full.stopping.stop_token_ids.extend([1, 2])
    full.options.token_ids, full.options.gates, full.options.token_gates, full.options.logprobs = True, True, True, 3
    full.steering.restrict.extend(["a", "b"])
    full.steering.mask.append("c")
    full.steering.bounds.add(expert="a", floor=0.1, ceiling=0.5)
    talk = GenerateRequest(adapter_id="upper-lora")
    talk.messages.messages.add(role="system", content="Be brief.")
    talk.messages.messages.add(role="user", content="Hello")
    ids = GenerateRequest()
    ids.token_ids.ids.extend([1, 5, 9, 100])
    return [message.SerializeToString() for message in (full, talk, ids)]


def _read_json(data: bytes) -> None:
    assert parse_object(data, depth_max=_JSON_DEPTH) == json.loads(data)


def _manifests() -> list[bytes]:
    manifest = Manifest(
        adapter_id=_ID,
        digest=AdapterDigest("0f" * 32),
        size_bytes=1234,
        method="lora",
        pinned=True,
        create_time="2026-11-29T10:00:00Z",
        source="/adapters/alpha",
    )
    return [manifest.encode(), manifest.encode(1)]


def _read_manifest(data: bytes) -> None:
    assert decode(data, _ID).encode() == data or decode(data, _ID).encode(1) == data


def _read_ranges(data: bytes) -> None:
    """Check ranges as a request's, and compare the runs that they cut a prompt into with their own edges."""
    numbers = struct.unpack(f"<{len(data) // 8 * 2}i", data[: len(data) // 8 * 8])
    ranges = tuple(itertools.starmap(TokenRange, zip(numbers[::2], numbers[1::2], strict=True)))
    [part] = composition.check([WeightedReference(_ID, 1.0, ranges)], _REQUEST_LIMITS, base_model="base")
    acting = [token for token in range(50) if not ranges or any(one.begin <= token < one.end for one in ranges)]
    cut = list(token_ranges.runs([part.ranges], 0, 50))
    assert [run[0] for run in cut[1:]] == [run[1] for run in cut[:-1]]
    assert [token for begin, end, of in cut for token in range(begin, end) if of] == acting


def _read_reference(data: bytes) -> None:
    parse_reference(data.decode("utf-8", "surrogateescape"), base_model="base")
