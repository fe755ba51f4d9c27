"""Files that must not become adapters: rows 30-66 and 68-69 of the table of bad inputs, over a real channel.

After each of them nothing is left in the store, and a good request is answered exactly as before.
"""

import bz2
import gzip
import io
import lzma
import os
import pickle
import socket
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.server.conftest import Sources
from tests.server.files import LORA_A, LORA_B, Files, Good, Parts, upload_messages, with_header
from tests.server.live import WAIT_S, LiveServer, refused
from weft.adapters.ingest import CONFIG_FILE
from weft.adapters.safetensors_header import WEIGHTS_FILE
from weft.client.failure import failure_of

SOFT: Mapping[str, Callable[[Good], Parts]] = {"prompt": lambda good: good.prompt, "ptuning": lambda good: good.ptuning}


class Case(NamedTuple):
    """Bad files and the expected reasons; "OK" if a file is good after all."""

    row: str
    code: str
    reason: str
    make: Callable[[Good], Files]
    says: tuple[str, ...] = ()


def _bad(row: str, reason: str, make: Callable[[Good], Files], *says: str) -> Case:
    return Case(row, "INVALID_ARGUMENT", reason, make, says)


def _fine(row: str, make: Callable[[Good], Files]) -> Case:
    return Case(row, "OK", "", make)


def _config(**changes: Any) -> Callable[[Good], Files]:
    return lambda good: good.lora.configured(**changes)


def _raw(weights: bytes) -> Callable[[Good], Files]:
    return lambda good: good.raw(weights)


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[Good], Files]:
    return lambda good: good.header(change)


def _tensor_header(**changes: Any) -> Callable[[Good], Files]:
    """Change the description of one tensor."""
    return _header(lambda header: header[LORA_A].update(changes))


def _raw_config(config: bytes) -> Callable[[Good], Files]:
    return lambda good: good.lora.files()._replace(config=config)


def _without(*names: str) -> Callable[[Good], Files]:
    return lambda good: good.lora.with_tensors({k: v for k, v in good.lora.tensors.items() if k not in names})


def _config_text(good: Good) -> bytes:
    return good.lora.files().config


def _zipped(name: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, b"0" * 100_000)
    return buffer.getvalue()


def _tarred(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return buffer.getvalue()


def _torch_saved() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, buffer)
    return buffer.getvalue()


def _one(dtype: str = "F32", shape: Any = (4,), offsets: Any = (0, 16), data: bytes = b"\0" * 16) -> bytes:
    """Return a file of one tensor, which need not belong to any module: its header is refused before that matters."""
    return with_header({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, data)


def _two(first: tuple[int, int], second: tuple[int, int], num_bytes: int) -> bytes:
    header = {
        name: {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}
        for name, (begin, end) in (("a", first), ("b", second))
    }
    return with_header(header, b"\0" * num_bytes)


def _short_of(number: int) -> bytes:
    return b'"shape":[1],"data_offsets":[0,%d]}' % number


_DEEP = b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}"
_MANY = b"{" + b",".join(b'"%x":0' % i for i in range(90_000)) + b"}"
_A = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
_CATASTROPHIC = "(a+)+$(.*.*.*.*.*)*x"

FORMATS = [
    _bad("30-torch-zip", "FORMAT_UNSUPPORTED", _raw(_torch_saved()), "safetensors only"),
    _bad("30-pickle-4", "FORMAT_UNSUPPORTED", _raw(pickle.dumps({"a": 1}, 4)), "safetensors only"),
    _bad("30-pickle-2", "FORMAT_UNSUPPORTED", _raw(pickle.dumps({"a": 1}, 2)), "safetensors only"),
    _bad("30-pickle-0", "FORMAT_UNSUPPORTED", _raw(pickle.dumps({"a": 1}, 0)), "safetensors only"),
    _bad("31-zip-slip", "FORMAT_UNSUPPORTED", _raw(_zipped("../../etc/cron.d/x")), "safetensors only"),
    _bad("31-tar", "FORMAT_UNSUPPORTED", _raw(_tarred("../x")), "safetensors only"),
    _bad("31-gzip", "FORMAT_UNSUPPORTED", _raw(gzip.compress(b"0" * 100_000)), "safetensors only"),
    _bad("31-bzip2", "FORMAT_UNSUPPORTED", _raw(bz2.compress(b"0" * 100_000)), "safetensors only"),
    _bad("31-xz", "FORMAT_UNSUPPORTED", _raw(lzma.compress(b"0" * 100_000)), "safetensors only"),
    _bad("31-7z", "FORMAT_UNSUPPORTED", _raw(b"7z\xbc\xaf\x27\x1c\x00\x04" + b"\0" * 64), "safetensors only"),
    _bad("31-gguf", "FORMAT_UNSUPPORTED", _raw(b"GGUF\x03\0\0\0" + b"\xff" * 64), "safetensors only"),
    _bad("31-hdf5", "FORMAT_UNSUPPORTED", _raw(b"\x89HDF\r\n\x1a\n" + b"\0" * 64), "safetensors only"),
    _bad("31-onnx", "FORMAT_UNSUPPORTED", _raw(b"\x08\x07\x12\x07pytorch" + b"\0" * 64), "safetensors only"),
]

HEADERS = [
    _bad("34-1-byte", "HEADER_TOO_SHORT", _raw(b"\x01")),
    _bad("34-7-bytes", "HEADER_TOO_SHORT", _raw(b"\x01" * 7), "7"),
    _bad("35-beyond-file", "HEADER_TOO_LARGE", _raw(with_header(b"{}", b"", length=1000))),
    _bad("35-beyond-limit", "HEADER_TOO_LARGE", _raw(with_header(b"{" + b" " * (1 << 20) + b"}", b"")), "1048576"),
    _bad("35-2-to-63", "HEADER_TOO_LARGE", _raw(with_header(b"{}", b"", length=1 << 63))),
    _bad("36-not-utf8", "HEADER_INVALID", _raw(with_header(b'{"\xff\xfe":1}', b""))),
    _bad("36-not-json", "HEADER_INVALID", _raw(with_header(b"{not json}", b""))),
    _bad("36-not-an-object", "HEADER_INVALID", _raw(with_header(b"[1, 2, 3]", b""))),
    _bad("36-leading-space", "HEADER_INVALID", _raw(with_header(b' {"a":' + _A + b"}", b"\0" * 4))),
    _bad("36-padded-with-zeros", "HEADER_INVALID", _raw(with_header(b'{"a":' + _A + b"}\0\0", b"\0" * 4))),
    _bad("37-tensor-twice", "DUPLICATE_KEY", _raw(with_header(b'{"a":' + _A + b',"a":' + _A + b"}", b"\0" * 4)), "a"),
    _bad("37-metadata-twice", "DUPLICATE_KEY", _raw(with_header(b'{"__metadata__":{},"__metadata__":{}}', b""))),
    _bad(
        "37-inner-key-twice", "DUPLICATE_KEY", _raw(with_header(b'{"a":{"dtype":"F32","dtype":"F16"}}', b"")), "dtype"
    ),
    _bad("38-overlap", "OFFSETS_INVALID", _raw(_two((0, 8), (4, 12), 12))),
    _bad("38-hole", "OFFSETS_INVALID", _raw(_two((0, 8), (12, 20), 20))),
    _bad("38-first-not-0", "OFFSETS_INVALID", _raw(_one(offsets=(4, 20), data=b"\0" * 20))),
    _bad("38-trailing-bytes", "OFFSETS_INVALID", _raw(_one(data=b"\0" * 16 + b"PK\x05\x06"))),
    _bad("39-negative", "OFFSETS_INVALID", _raw(_one(offsets=(-4, 12)))),
    _bad("39-float", "OFFSETS_INVALID", _raw(_one(offsets=(0, 16.0)))),
    _bad("39-string", "OFFSETS_INVALID", _raw(_one(offsets=("0", "16")))),
    _bad("39-2-to-63", "OFFSETS_INVALID", _raw(_one(offsets=(0, 1 << 63)))),
    _bad("39-backwards", "OFFSETS_INVALID", _raw(_one(offsets=(16, 0)))),
    _bad("40-product-overflows", "SHAPE_INVALID", _raw(_one(shape=(1 << 62, 4)))),
    _bad("40-other-bytes", "SHAPE_INVALID", _raw(_one(shape=(5,)))),
    _bad("40-negative-dim", "SHAPE_INVALID", _raw(_one(shape=(-2, -2)))),
    *(
        _bad(f"41-{dtype}", "DTYPE_UNSUPPORTED", _raw(_one(dtype=dtype)), dtype)
        for dtype in ("F64", "I8", "U8", "I64", "BOOL", "F8_E4M3", "C64", "")
    ),
    _bad("42-empty-tensor", "SHAPE_INVALID", _raw(_one(shape=(0,), offsets=(0, 0), data=b""))),
    _bad("42-rank-0", "SHAPE_INVALID", _raw(_one(shape=(), offsets=(0, 4), data=b"\0" * 4))),
    _bad("43-depth", "HEADER_INVALID", _raw(with_header(_DEEP, b""))),
    _bad("43-keys", "HEADER_INVALID", _raw(with_header(_MANY, b""))),
    _bad("43-long-key", "HEADER_INVALID", _raw(with_header(b'{"' + b"k" * 1_000_000 + b'":' + _A + b"}", b"\0" * 4))),
    _bad("43-lone-surrogate", "HEADER_INVALID", _raw(with_header(b'{"\\ud800":' + _A + b"}", b"\0" * 4))),
    _bad("44-metadata-number", "METADATA_INVALID", _header(lambda header: header.update(__metadata__={"a": 1}))),
    _bad("44-metadata-list", "METADATA_INVALID", _header(lambda header: header.update(__metadata__=[]))),
    _bad(
        "44-metadata-long", "METADATA_INVALID", _header(lambda h: h.update(__metadata__={"a": "x" * 20_000})), "16384"
    ),
    _fine("44-metadata-html", _header(lambda h: h["__metadata__"].update(x="<script>{{7*7}}</script>"))),
    _bad("45-no-tensor", "TENSOR_COUNT", _raw(with_header(b"{}", b""))),
    _bad(
        "45-8193-tensors",
        "TENSOR_COUNT",
        _raw(
            with_header(
                {f"{i:x}": {"dtype": "F16", "shape": [1], "data_offsets": [2 * i, 2 * i + 2]} for i in range(8193)},
                b"\0" * 2 * 8193,
            )
        ),
        "8192",
        "8193",
    ),
]

CONFIGS = [
    _bad("46-not-json", "CONFIG_INVALID", _raw_config(b"peft_type: LORA")),
    _bad("46-nan", "CONFIG_INVALID", _raw_config(b'{"peft_type":"LORA","lora_alpha":NaN}'), "NaN"),
    _bad("46-infinity", "CONFIG_INVALID", _raw_config(b'{"peft_type":"LORA","lora_alpha":-Infinity}')),
    _bad("46-duplicate", "CONFIG_INVALID", _raw_config(b'{"peft_type":"LORA","r":8,"r":16}'), "twice"),
    _bad("46-bom", "CONFIG_INVALID", _raw_config(b'\xef\xbb\xbf{"peft_type":"LORA"}'), "byte order mark"),
    _bad(
        "46-10-mib", "CONFIG_INVALID", _raw_config(b'{"peft_type":"LORA","x":"' + b"x" * 10_000_000 + b'"}'), "262144"
    ),
    _bad("46-a-list", "CONFIG_INVALID", _raw_config(b"[]")),
    _bad("46-depth", "CONFIG_INVALID", _raw_config(_DEEP)),
    _fine(
        "47-auto-mapping", _config(task_type=None, auto_mapping={"base_model_class": "system", "parent_library": "os"})
    ),
    _bad("47-megatron-core", "CONFIG_FIELD_FORBIDDEN", _config(megatron_core="os.path"), "megatron_core"),
    _bad("47-megatron-config", "CONFIG_FIELD_FORBIDDEN", _config(megatron_config={"a": 1}), "megatron_config"),
    _bad(
        "47-state-dict-path", "CONFIG_FIELD_FORBIDDEN", _config(prompt_tuning_init_state_dict_path="/etc"), "state_dict"
    ),
    _bad(
        "47-unknown-key",
        "CONFIG_FIELD_FORBIDDEN",
        _config(surprise=0, peft_version="0.99.1"),
        "adapter_config.surprise",
        "peft_version 0.99.1",
        "--adapter-ignored-config-key surprise",
    ),
    *(
        _fine(f"47-unknown-key-that-is-off-{index}", _config(surprise=value))
        for index, value in enumerate((None, False, "", [], {}))
    ),
    _fine("47-unknown-null", _config(surprise=None)),
    _fine("47-inert", _config(layers_pattern="h", loftq_config={"a": 1}, revision="x", peft_version="9")),
    _fine("48-regex", _config(target_modules=_CATASTROPHIC, exclude_modules="(x+x+)+y")),
    *(
        _bad(f"49-rank-{rank!r}", "RANK_INVALID", _config(r=rank), "adapter_config.r")
        for rank in (0, -8, 1.5, True, "8", 2**31, None, [8])
    ),
    _bad("49-rank-pattern", "RANK_INVALID", _config(rank_pattern={"q_proj": 0}), "rank_pattern"),
    _bad("50-rank", "RANK_TOO_LARGE", _config(r=257), "limit 256", "given 257", "--adapter-rank-max"),
    _bad("50-rank-pattern", "RANK_TOO_LARGE", _config(rank_pattern={"q_proj": 1024}), "limit 256", "given 1024"),
    _bad("51-rank-of-config", "RANK_MISMATCH", _config(r=4), "lora_A"),
    *(
        _bad(f"52-alpha-{alpha!r}", "SCALE_INVALID", _config(lora_alpha=alpha), "lora_alpha")
        for alpha in (1e38, -1, "8", True, 64 * 8 + 1)
    ),
    _bad("52-alpha-1e999", "CONFIG_INVALID", _raw_config(b'{"peft_type":"LORA","r":8,"lora_alpha":1e999}')),
    _bad("52-alpha-pattern", "SCALE_INVALID", _config(alpha_pattern={"q_proj": 1e9})),
    *(
        _bad(f"53-{peft_type}", "FEATURE_UNSUPPORTED", _config(peft_type=peft_type), "peft_type")
        for peft_type in ("NO_SUCH_METHOD", "XLORA", None, 7, ["LORA"])
    ),
    *(
        _bad(f"53-{name}", "FEATURE_UNSUPPORTED", _config(**{name: value}), name)
        for name, value in {
            "use_qalora": True,
            "layer_replication": [[0, 1]],
            "target_parameters": ["a.weight"],
            "init_lora_weights": "pissa",
            "task_type": "SEQ_CLS",
        }.items()
    ),
    *(
        _bad(f"50-invocation-{name}", "CONFIG_INVALID", _config(alora_invocation_tokens=value), says)
        for name, value, says in [
            ("empty", [], "alora_invocation_tokens"),
            ("text", "<go>", "alora_invocation_tokens"),
            ("many", [1] * 257, "limit 256"),
            ("negative", [1, -1], "[1]"),
            ("beyond", [128], "limit 127"),
            ("float", [1.0], "[0]"),
            ("bool", [True], "[0]"),
        ]
    ),
    _bad("53-invocation-bias", "FEATURE_UNSUPPORTED", _config(alora_invocation_tokens=[1], bias="all"), "bias"),
    _bad("53-invocation-dora", "FEATURE_UNSUPPORTED", _config(alora_invocation_tokens=[1], use_dora=True), "use_dora"),
]

TENSORS = [
    _bad("54-a-without-b", "PAIR_INCOMPLETE", _without(LORA_B), "q_proj"),
    _bad("54-b-without-a", "PAIR_INCOMPLETE", _without(LORA_A), "q_proj"),
    _bad(
        "54-named-twice",
        "PAIR_INCOMPLETE",
        lambda g: g.lora.with_tensors(
            {**g.lora.tensors, LORA_A.removeprefix("base_model.model."): g.lora.tensors[LORA_A] + 1}
        ),
    ),
    _bad("54-mixed-dtypes", "PAIR_INCOMPLETE", lambda g: g.tensor(LORA_A, lambda t: t.bfloat16()), "dtype"),
    _bad(
        "55-module",
        "MODULE_UNKNOWN",
        lambda g: g.lora.with_tensors(
            {
                **g.lora.tensors,
                **{
                    f"base_model.model.extra.lora_{x}.weight": g.lora.tensors[y]
                    for x, y in (("A", LORA_A), ("B", LORA_B))
                },
            }
        ),
        "extra",
    ),
    _bad(
        "55-layer",
        "MODULE_UNKNOWN",
        lambda g: g.renamed(lambda name: name.replace("layers.1.", "layers.9.")),
        "layers.9.",
    ),
    _bad(
        "55-unused-tensor",
        "TENSOR_UNKNOWN",
        lambda g: g.lora.with_tensors({**g.lora.tensors, "x.gamma": torch.ones(3)}),
    ),
    _bad(
        "56-other-prefix",
        "ADAPTER_NO_EFFECT",
        lambda g: g.renamed(lambda name: name.replace("model.layers", "h")),
        "h.0",
    ),
    _bad("57-in-features", "DIM_MISMATCH", lambda g: g.tensor(LORA_A, lambda t: t[:, :32]), "[8, 64]", "[8, 32]"),
    _bad("57-out-features", "DIM_MISMATCH", lambda g: g.tensor(LORA_B, lambda t: t[:32]), "[64, 8]", "[32, 8]"),
    _bad(
        "57-swapped",
        "DIM_MISMATCH",
        lambda g: g.renamed(lambda n: n.translate(str.maketrans("AB", "BA")) if "lora_" in n else n),
    ),
    Case(
        "58-other-base",
        "FAILED_PRECONDITION",
        "BASE_MISMATCH",
        lambda g: g.lora._replace(metadata={"format": "pt", "weft_base_digest": "0" * 64}).files(),
        ("0000",),
    ),
    *(
        _bad(
            f"59-{value}", "NON_FINITE", lambda g, v=value: g.tensor(LORA_B, lambda t: _spoiled(t, float(v))), "lora_B"
        )
        for value in ("nan", "inf", "-inf")
    ),
    _bad("59-ia3", "NON_FINITE", lambda g: g.ia3.with_tensors(_all_spoiled(g.ia3, float("nan")))),
    _bad("59-prefix", "NON_FINITE", lambda g: g.prefix.with_tensors(_all_spoiled(g.prefix, float("inf")))),
    *(
        _bad(
            f"60-{value}",
            "WEIGHT_OUT_OF_RANGE",
            lambda g, v=value: g.tensor(LORA_A, lambda t: _spoiled(t, float(v))),
            "lora_A",
        )
        for value in ("6e4", "-1e30", "1000.5")
    ),
    _fine("60-at-the-limit", lambda g: g.tensor(LORA_A, lambda t: _spoiled(t, 1000.0))),
    _fine(
        "62-denormal", lambda g: g.lora.with_tensors({k: torch.full_like(v, 1e-40) for k, v in g.lora.tensors.items()})
    ),
    _bad(
        "62-zero",
        "ADAPTER_NO_EFFECT",
        lambda g: g.lora.with_tensors({k: v * ("lora_A" in k) for k, v in g.lora.tensors.items()}),
        "changes nothing",
    ),
    _bad("62-alpha-0", "ADAPTER_NO_EFFECT", _config(lora_alpha=0)),
    _bad(
        "62-ia3-ones",
        "ADAPTER_NO_EFFECT",
        lambda g: g.ia3.with_tensors({k: v * 0 + 1 for k, v in g.ia3.tensors.items()}),
    ),
    _bad(
        "63-length",
        "DIM_MISMATCH",
        lambda g: g.ia3.with_tensors({k: v[..., :16] if v.shape[0] == 1 else v[:16] for k, v in g.ia3.tensors.items()}),
    ),
    _bad("63-not-a-subset", "CONFIG_TARGETS", lambda g: g.ia3.configured(target_modules=["k_proj"]), "down_proj"),
    *(
        _bad(
            f"64-virtual-{n}",
            "PREFIX_INVALID",
            lambda g, n=n: g.prefix.configured(num_virtual_tokens=n),
            "num_virtual_tokens",
        )
        for n in (0, -1, 257, 10**6, 5.0, "5")
    ),
    _bad("64-length", "PREFIX_INVALID", lambda g: g.prefix.configured(num_virtual_tokens=6), "[6, "),
    *(
        _bad(f"64-{name}-{n}", "PREFIX_INVALID", lambda g, get=get, n=n: get(g).configured(num_virtual_tokens=n), "num")
        for name, get in SOFT.items()
        for n in (0, -1, 257, 10**6, 5.0, "5", True, None)
    ),
    *(
        case
        for name, get in SOFT.items()
        for case in (
            _bad(
                f"64-{name}-length",
                "PREFIX_INVALID",
                lambda g, get=get: get(g).configured(num_virtual_tokens=6),
                "[6, 64",
            ),
            _bad(
                f"64-{name}-width",
                "PREFIX_INVALID",
                lambda g, get=get: get(g).with_tensors({k: v[:, :32].contiguous() for k, v in get(g).tensors.items()}),
                "embedding size",
                "[5, 64]",
                "[5, 32]",
            ),
            _bad(f"64-{name}-no-tensor", "TENSOR_COUNT", lambda g, get=get: get(g).with_tensors({})),
            _bad(
                f"64-{name}-other-tensor",
                "TENSOR_UNKNOWN",
                lambda g, get=get: get(g).with_tensors({**get(g).tensors, "prompt_encoder.weight": torch.zeros(2)}),
                "prompt_encoder.weight",
            ),
            _bad(
                f"64-{name}-nan",
                "NON_FINITE",
                lambda g, get=get: get(g).with_tensors(_all_spoiled(get(g), float("nan"))),
                "prompt_embeddings",
            ),
            _bad(
                f"64-{name}-large",
                "WEIGHT_OUT_OF_RANGE",
                lambda g, get=get: get(g).with_tensors(_all_spoiled(get(g), 2e3)),
                "prompt_embeddings",
            ),
            _bad(
                f"64-{name}-encoder-decoder",
                "FEATURE_UNSUPPORTED",
                lambda g, get=get: get(g).configured(num_transformer_submodules=2),
                "num_transformer_submodules",
            ),
            _bad(
                f"64-{name}-saved-modules",
                "FEATURE_UNSUPPORTED",
                lambda g, get=get: get(g).configured(modules_to_save=["lm_head"]),
            ),
            _bad(
                f"64-{name}-unknown-key",
                "CONFIG_FIELD_FORBIDDEN",
                lambda g, get=get: get(g).configured(num_tasks=3),
                "num_tasks",
            ),
        )
    ),
    _bad("64-prompt-as-ptuning", "CONFIG_FIELD_FORBIDDEN", lambda g: g.prompt.configured(peft_type="P_TUNING")),
    _bad("64-prompt-as-prefix", "CONFIG_FIELD_FORBIDDEN", lambda g: g.prompt.configured(peft_type="PREFIX_TUNING")),
    _fine(
        "64-prompt-all-keys",
        lambda g: g.prompt.configured(
            prompt_tuning_init="TEXT",
            prompt_tuning_init_text="Reverse:",
            tokenizer_name_or_path="org/base",
            tokenizer_kwargs={"use_fast": True},
            num_attention_heads=4,
            num_layers=2,
            peft_version="0.21.2",
            auto_mapping=None,
            revision=None,
        ),
    ),
    _fine(
        "64-ptuning-all-keys", lambda g: g.ptuning.configured(encoder_dropout=0.1, num_attention_heads=4, num_layers=2)
    ),
    _bad(
        "64-heads",
        "PREFIX_INVALID",
        lambda g: g.prefix.with_tensors({k: v[:, :-32].contiguous() for k, v in g.prefix.tensors.items()}),
    ),
]
CASES = [*FORMATS, *HEADERS, *CONFIGS, *TENSORS]


def _spoiled(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


def _all_spoiled(parts: Parts, value: float) -> Mapping[str, Tensor]:
    return {name: _spoiled(tensor, value) for name, tensor in parts.tensors.items()}


def _attempt(server: LiveServer, case: Case, path: Path) -> None:
    """Register the files at `path` and compare the answer."""
    if case.code == "OK":
        server.client.register("spoiled", path)
        server.client.unregister("spoiled")
    else:
        refused(lambda: server.client.register("spoiled", path), case.code, case.reason, *case.says, retry=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.row)
def test_row(case: Case, server: LiveServer, good: Good, sources: Sources) -> None:
    path = case.make(good).write(sources.root / "spoiled" / case.row.replace("/", "-"))
    with _no_code_runs():
        _attempt(server, case, path)


# Events that no file may ever cause; `exec` and `import` would run code of the file's choice.
_FORBIDDEN_EVENTS = frozenset(
    {
        "pickle.find_class",
        "exec",
        "import",
        "os.system",
        "os.exec",
        "os.posix_spawn",
        "subprocess.Popen",
        "ctypes.dlopen",
    }
)
_trapped: list[str] | None = None
_is_hooked = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _trapped is not None and event in _FORBIDDEN_EVENTS:
        _trapped.append(f"{event} {arguments}")


@contextmanager
def _trap() -> Iterator[list[str]]:
    """Record every forbidden event of any thread of this process, which includes the server."""
    global _trapped, _is_hooked
    if not _is_hooked:
        sys.addaudithook(_audit)  # for good: an audit hook cannot be removed
        _is_hooked = True
    _trapped = []
    try:
        yield _trapped
    finally:
        _trapped = None


@contextmanager
def _no_code_runs() -> Iterator[None]:
    with _trap() as trapped:
        yield
    assert trapped == []


def test_the_trap_catches_pickle() -> None:
    """Negative control of `_no_code_runs`."""
    data = pickle.dumps(Path("x"))
    with _trap() as trapped:
        pickle.loads(data)
    assert any(event.startswith("pickle.find_class") for event in trapped)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_row_30_a_pickle_beside_the_config(name: str, server: LiveServer, good: Good, sources: Sources) -> None:
    path = good.lora.files().write(sources.root / "spoiled" / f"30-{name}")
    (path / WEIGHTS_FILE).unlink()
    (path / name).write_bytes(_torch_saved())
    with _no_code_runs():
        refused(
            lambda: server.client.register("spoiled", path),
            "INVALID_ARGUMENT",
            "FORMAT_UNSUPPORTED",
            "safetensors only; a pickle is refused",
            f"torch.load('{name}', weights_only=True)",
        )


def _symlinked_file(path: Path, other: Path) -> None:
    (path / WEIGHTS_FILE).unlink()
    (path / WEIGHTS_FILE).symlink_to(other / WEIGHTS_FILE)


def _symlinked_directory(path: Path, other: Path) -> None:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        (path / name).unlink()
    path.rmdir()
    path.symlink_to(other, target_is_directory=True)


def _hard_linked(path: Path, other: Path) -> None:
    (path / WEIGHTS_FILE).unlink()
    os.link(other / WEIGHTS_FILE, path / WEIGHTS_FILE)


def _fifo(path: Path, other: Path) -> None:
    (path / WEIGHTS_FILE).unlink()
    os.mkfifo(path / WEIGHTS_FILE)


def _directory(path: Path, other: Path) -> None:
    (path / WEIGHTS_FILE).unlink()
    (path / WEIGHTS_FILE).mkdir()


def _socket(path: Path, other: Path) -> None:
    (path / CONFIG_FILE).unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        here = Path.cwd()
        os.chdir(path)  # the path of a socket may have 107 bytes only
        try:
            listener.bind(CONFIG_FILE)
        finally:
            os.chdir(here)


def _sparse(path: Path, other: Path) -> None:
    with (path / WEIGHTS_FILE).open("wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_symlinked_file, "SOURCE_NOT_REGULAR"),
        (_symlinked_directory, "SOURCE_NOT_REGULAR"),
        (_hard_linked, "SOURCE_NOT_REGULAR"),
        (_fifo, "SOURCE_NOT_REGULAR"),
        (_directory, "SOURCE_NOT_REGULAR"),
        (_socket, "SOURCE_NOT_REGULAR"),
        (_sparse, "ADAPTER_TOO_LARGE"),
    ],
)
def test_row_32_no_plain_file(
    spoil: Callable[[Path, Path], None], reason: str, server: LiveServer, good: Good, tmp_path: Path
) -> None:
    """In the store's own directory, from which relative sources start."""
    name = f"incoming{spoil.__name__}"
    path = good.lora.files().write(server.config.store / name)
    spoil(path, good.lora.files().write(tmp_path / "other"))
    before = time.monotonic()
    refused(lambda: server.client.register("spoiled", name), "INVALID_ARGUMENT", reason, retry=False)
    assert time.monotonic() - before < 5, "a FIFO or a large file was waited for"


@pytest.mark.parametrize(
    "source",
    ["", "/etc", "../outside", "a/../../etc", "versions", "catalog", "staging", "a\\b", "a\0b", "./x", "a//b", "C:\\x"],
)
def test_sources_outside_of_the_store(source: str, server: LiveServer) -> None:
    refused(
        lambda: server.client.register("spoiled", source), "INVALID_ARGUMENT", "SOURCE_INVALID", "source", retry=False
    )


def test_a_source_that_is_not_there(server: LiveServer) -> None:
    refused(lambda: server.client.register("spoiled", "nowhere/at-all"), "INVALID_ARGUMENT", "SOURCE_NOT_FOUND")


def test_row_33_a_source_that_changes_while_it_is_copied(
    server: LiveServer, good: Good, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = good.lora.files().write(sources.root / "spoiled" / "33")
    from weft.adapters import versions

    write = versions.StagedFile.write

    def and_change(file: versions.StagedFile, data: bytes) -> None:
        write(file, data)
        with (path / file.name).open("r+b") as source:
            source.seek(-1, os.SEEK_END)
            source.write(b"\x7f")

    with monkeypatch.context() as patch:
        patch.setattr(versions.StagedFile, "write", and_change)
        refused(lambda: server.client.register("spoiled", path), "INVALID_ARGUMENT", "CHECKSUM_MISMATCH")


def test_row_64_virtual_tokens_and_prompt_past_the_context(server: LiveServer) -> None:
    longest = server.model.base.max_model_len
    refused(
        lambda: server.client.generate("prefix-1", 1, token_ids={"ids": [65] * (longest - 5)}),
        "INVALID_ARGUMENT",
        "CONTEXT_EXCEEDED",
        "5 virtual",
        "256",
    )
    assert len(server.client.tokens("prefix-1", 1, token_ids={"ids": [65] * (longest - 6)})) == 1


def test_row_65_can_never_fit_the_pool(tight: LiveServer, sources: Sources) -> None:
    pool = tight.config.residency.device_bytes
    large = Parts.of(tiny.random_lora(sources.base, rank=64, seed=1), sources.base).files()
    path = large.write(sources.root / "spoiled" / "65-lora")
    refused(lambda: tight.client.register("spoiled", path), "INVALID_ARGUMENT", "ADAPTER_TOO_LARGE", f"limit {pool}")
    many = Parts.of(tiny.random_prefix(sources.base, length=238, seed=1), sources.base).files()
    tight.client.register("spoiled", many.write(sources.root / "spoiled" / "65-fits"))  # 15 of 40 blocks
    tight.client.unregister("spoiled")


def test_row_65_virtual_positions_that_leave_no_room_in_the_context(tight: LiveServer, sources: Sources) -> None:
    """max_model_len is 240 here: one prompt token and one new token must also fit."""
    for make in (tiny.random_prefix, tiny.random_prompt, tiny.random_ptuning):
        path = (
            Parts.of(make(sources.base, length=239, seed=1), sources.base)
            .files()
            .write(sources.root / "spoiled" / f"65-{make.__name__}")
        )
        refused(
            lambda path=path: tight.client.register("spoiled", path), "INVALID_ARGUMENT", "PREFIX_INVALID", "238", "239"
        )


@pytest.mark.parametrize(
    ("source", "code", "reason"),
    [
        ("https://example.org/adapter", "FAILED_PRECONDITION", "SOURCE_DISABLED"),
        ("s3://bucket/adapter", "FAILED_PRECONDITION", "SOURCE_DISABLED"),
        ("hf://org/adapter", "FAILED_PRECONDITION", "SOURCE_DISABLED"),
        ("file:///etc/passwd", "INVALID_ARGUMENT", "SOURCE_SCHEME"),
        ("http://127.0.0.1:1/x", "INVALID_ARGUMENT", "SOURCE_SCHEME"),
        ("ftp://example.org/x", "INVALID_ARGUMENT", "SOURCE_SCHEME"),
        ("data:text/plain,x", "INVALID_ARGUMENT", "SOURCE_SCHEME"),
        ("https://user:s3cr3t@example.org/x", "INVALID_ARGUMENT", "SOURCE_SCHEME"),
    ],
)
def test_rows_68_69_urls(
    source: str, code: str, reason: str, server: LiveServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    failure = refused(lambda: server.client.register("spoiled", source), code, reason, retry=False)
    assert "s3cr3t" not in failure.message + caplog.text + str(failure.metadata)


def test_uploads_are_checked_alike(server: LiveServer, good: Good) -> None:
    """One case of each kind, by upload."""
    chosen = [cases[len(cases) // 2] for cases in (FORMATS, HEADERS, CONFIGS, TENSORS)]
    for case in chosen:
        messages = upload_messages("spoiled", case.make(good))
        refused(lambda messages=messages: server.client.upload(messages), case.code, case.reason, *case.says)


def test_bad_adapter_under_traffic_25x25(server: LiveServer, good: Good, sources: Sources) -> None:
    """25 bad registrations beside 25 streams: no good request fails or changes."""
    bad = [case for case in CASES if case.code != "OK"]
    chosen = bad[:: len(bad) // 25][:25]
    paths = [case.make(good).write(sources.root / "spoiled" / f"25-{i}") for i, case in enumerate(chosen)]
    targets = [(None, "lora-1", "ia3-1", "prefix-1")[i % 4] for i in range(25)]
    alone = {target: server.client.tokens(target, 24) for target in set(targets)}
    failures: list[tuple[str, str]] = []

    def register_all() -> None:
        for case, path in zip(chosen, paths, strict=True):
            try:
                server.client.register("spoiled", path)
                failures.append((case.row, "was accepted"))
            except grpc.RpcError as error:
                found = failure_of(error)
                if (found.code.name, found.reason) != (case.code, case.reason):
                    failures.append((case.row, str(found)))

    spoiler = threading.Thread(target=register_all)
    spoiler.start()
    streams = [server.client.stream(target, 24) for target in targets]
    answers = [stream.result() for stream in streams]
    spoiler.join(WAIT_S)
    assert failures == []
    for target, answer in zip(targets, answers, strict=True):
        assert answer.tokens == alone[target], target
    # Negative control: another adapter would have been detected.
    assert len({tuple(tokens) for tokens in alone.values()}) == len(alone)
