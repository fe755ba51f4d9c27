"""Every knob, frozen, with its unit in its name, its limits and its description. Names follow vLLM's.

Values are checked on construction: pydantic raises ValidationError, a ValueError, which names the field and its limit.
"""

import os
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, ByteSize, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from weft.v1 import endpoint

_WEIGHT = re.compile(r"[a-z0-9_-]+=(?!0+(\.0*)?$)[0-9]{1,4}(\.[0-9]{1,3})?")  # above 0

MIB = 1 << 20
GIB = 1 << 30


class Quantization(StrEnum):
    """Storage of the base's linear weights (bitsandbytes)."""

    NF4 = "nf4"
    INT8 = "int8"
    NONE = "none"


class LogLevel(StrEnum):
    """Lowest level that the server logs; prompts are never logged."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


def typed_path(text: str | Path) -> Path:
    """Return the path that a user typed, made absolute if it is written as a path.

    Path drops a leading "./" and a trailing "/"; without them, ./models/typo would look like a hub id.
    """
    path = Path(text).expanduser()
    typed = str(text)
    return path.absolute() if typed.startswith((".", "/", "~")) or typed.endswith("/") else path


def default_store() -> Path:
    """Return the user's own directory for adapters (XDG base directories: $XDG_DATA_HOME, or ~/.local/share)."""
    data = os.environ.get("XDG_DATA_HOME", "")
    root = Path(data) if os.path.isabs(data) else Path("~/.local/share").expanduser()
    return root / "weft" / "adapters_store"


def _typed_path(value: object) -> object:
    if value == "":
        raise ValueError("must be a path")
    return typed_path(value) if isinstance(value, str | Path) else value


def _size(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return int(TypeAdapter(ByteSize).validate_python(value))
    except ValueError:
        raise ValueError("must be a size of at least 0, such as 512MiB, 1.5GiB or 4096") from None


Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Number = Annotated[float, Field(ge=0)]
Port = Annotated[int, Field(ge=0, le=65535)]
Size = Annotated[int, Field(ge=0), BeforeValidator(_size)]  # bytes; a text may have a unit
TypedPath = Annotated[Path, BeforeValidator(_typed_path)]

CHECKS = ConfigDict(allow_inf_nan=False, validate_default=False, defer_build=True)


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class ModelConfig:
    """The base model, and how it is held."""

    path: TypedPath = Field(
        description="A Hugging Face causal-LM directory, a .gguf file, or a hub id (org/name, org/name@revision)."
    )
    quantization: Quantization = Quantization.NF4
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description='"auto" takes CUDA if available.')
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        default="auto",
        description='"auto" is bfloat16; float32 for an unquantized float32 checkpoint, and on a CPU that does not '
        "multiply bfloat16 (model/packed.py).",
    )
    num_threads: Count = Field(default=0, description="CPU threads of a step; 0 leaves torch's default.")
    double_quant: bool = Field(
        default=False,
        description="[nf4] Hold the scales in 8 bits too, as QLoRA did: 7 % less memory, 15 to 20 % slower. On CUDA "
        "they are held in 32 bits once loaded.",
    )
    shadow_bytes: Size = Field(
        default=0,
        description="[nf4 on CUDA] Memory for 16-bit copies of weights, which make steps of more than 64 rows faster; "
        "0 makes none.",
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class EngineConfig:
    """Size of the batch and of the KV cache."""

    max_num_seqs: Positive = 64
    max_num_batched_tokens: Count = 2048
    max_model_len: Count | None = Field(
        default=None,
        description="Prompt, virtual and generated tokens of one request; None takes the model's own limit, or what "
        "the KV cache holds if that is less.",
    )
    memory_bytes: Size | None = Field(
        default=None, description="Weights, adapters and KV cache together; None takes what is free."
    )
    block_size: Positive = 16
    num_kv_blocks: Count | None = None
    kv_cache_bytes: Size | None = Field(
        default=None,
        description="Size of the paged pool; None takes `num_kv_blocks` if set, else room for `max_num_seqs` requests "
        "of `max_model_len`, bounded by 1 GiB and half of the free memory on a CPU, 80 % of it on CUDA.",
    )
    step_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=120.0,
        description="Longest step; an engine that takes longer is taken for hung, and the server ends with exit code "
        "1.",
    )
    enable_prefix_caching: bool = True
    max_queued_requests: Positive = 256
    max_queued_tokens: Positive = Field(
        default=4 << 20, description="Prompt tokens of all accepted requests, running ones included."
    )
    stream_interval_s: Number = Field(
        default=0.04,
        description="Time between deliveries of tokens to streams, since each message takes time from steps; first "
        "tokens and ends are sent at once, and at 0 all tokens are.",
    )

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}), "
                f"given {self.max_num_batched_tokens}"
            )


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class AdapterLimits:
    """Limits of an adapter (the default limits of the error contract)."""

    file_bytes_max: Size = 512 * MIB
    header_bytes_max: Size = 1 * MIB
    config_bytes_max: Size = 256 * 1024
    metadata_bytes_max: Size = 16 * 1024
    num_tensors_max: Count = 8192
    rank_max: Count = 256
    bottleneck_size_max: Count = 2048
    scaling_max: Number = 64.0
    weight_abs_max: Number = 1e3
    num_virtual_tokens_max: Count = 256
    num_invocation_tokens_max: Count = 256
    num_experts_max: Count = 64
    ignored_config_keys: tuple[str, ...] = Field(
        default=(), description="Unknown keys of adapter_config.json that may be ignored."
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class ResidencyConfig:
    """Memory for adapters, in bytes: bytes alone decide how many fit, never a count."""

    device_bytes: Size = 1 * GIB
    host_bytes: Size = 4 * GIB
    pinned_bytes_max: Size | None = Field(
        default=None, description="Pinned adapters together; None takes half of `device_bytes`, for the others' sake."
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class RequestLimits:
    """Bounds of one generate request."""

    prompt_bytes_max: Size = 1 * MIB
    messages_max: Count = 2048
    max_new_tokens_max: Count = 4096
    max_new_tokens_default: Count = 256
    stop_count_max: Count = 4
    stop_bytes_max: Size = 128
    logprobs_max: Count = 5
    composition_parts_max: Count = 8
    composition_weight_abs_max: Number = 4.0
    token_ranges_max: Count = 16
    request_id_bytes_max: Size = 128
    cache_salt_bytes_max: Size = 128
    deadline_default_s: Number | None = Field(
        default=600.0, description="Deadline of requests without one; None sets no limit."
    )
    deadline_max_s: Number | None = Field(default=3600.0, description="Longest deadline; None leaves it to callers.")
    stream_bytes_max: Size = Field(
        default=512 * 1024,
        description="Memory of the tokens that a caller may leave unread until its stream ends, about 128 bytes for "
        "each token and each of its alternatives.",
    )
    token_gates_max: Count = Field(
        default=MIB, description="Gates of an answer with token_gates: tokens times layers times experts."
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class ServerConfig:
    """Addresses and lifetimes of the server process."""

    host: str = endpoint.HOST
    port: Port = Field(default=endpoint.PORT, description="0 picks a free one.")
    metrics_host: str = "127.0.0.1"
    metrics_port: Port = Field(default=9464, description="0 picks a free one.")
    drain_timeout_s: Number = Field(default=30.0, description="Time that requests may take to end after SIGTERM.")
    reflection: bool = True
    connections_max: Positive = Field(
        default=4096,
        description="gRPC connections; fewer if the process may not open that many files beside its own.",
    )
    receive_bytes_max: Size = Field(
        default=MIB + 256 * 1024,
        description="Size of a message from a client; parsing it holds up every other call for up to 40 ms per MiB.",
    )
    stream_write_timeout_s: Number = Field(
        default=30.0, description="Time that a stream may wait for its caller to read until it ends."
    )
    prompt_bytes_waiting_max: Size = Field(
        default=64 * MIB, description="Long prompts that wait for the tokenizer, together; further ones are refused."
    )
    tokenize_calls_max: Positive = Field(default=16, description="Tokenize calls at a time.")
    register_calls_max: Positive = Field(
        default=64, description="RegisterAdapter and UnregisterAdapter calls at a time."
    )
    load_calls_max: Positive = Field(default=64, description="Calls that load or unload, at a time.")
    watches_max: Positive = Field(default=256, description="WatchAdapters calls at a time.")
    staging_bytes_max: Size = Field(
        default=4 * GIB, description="Files that are being uploaded, together; further uploads are refused."
    )
    unregister_timeout_default_s: Number = 30.0
    unregister_timeout_max_s: Number = 600.0
    upload_idle_timeout_s: Number = 10.0
    upload_bytes_per_s_min: Count = Field(
        default=64 * 1024, description="Average rate below which an upload ends, once the idle timeout has passed."
    )
    uploads_max: Positive = Field(default=16, description="Uploads that are received at a time.")
    uploads_waiting_max: Count = Field(default=64, description="Uploads that may wait; further ones are refused.")
    log_level: LogLevel = Field(default=LogLevel.INFO, description="Lowest level logged; prompts never are.")


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class AccessConfig:
    """Who may do what, and how connections are protected. The files are followed: a change takes effect by itself."""

    token_file: TypedPath | None = Field(
        default=None, description="Tokens of callers, from `weft tokens add`; None gives every caller all rights."
    )
    tls_cert_file: TypedPath | None = Field(default=None, description="PEM certificate chain; None serves without TLS.")
    tls_key_file: TypedPath | None = Field(default=None, description="PEM key of the certificate, unencrypted.")
    tls_client_ca_file: TypedPath | None = Field(
        default=None,
        description="PEM authorities; callers must present a certificate that one of them signed (mTLS).",
    )
    metrics_token_file: TypedPath | None = Field(
        default=None, description="File whose first line whoever scrapes the metrics must send as a bearer token."
    )
    insecure_public: bool = Field(
        default=False, description="Listen on addresses that other machines reach even without TLS and tokens."
    )
    audit_log_file: TypedPath | None = Field(
        default=None, description="Append a line for each change of adapters to this file (`weft audit verify`)."
    )


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class TenantLimits:
    """Quotas of each tenant of the token file; None is no limit."""

    requests_max: Positive | None = Field(default=None, description="Requests that are accepted at a time.")
    tokens_per_minute_max: Positive | None = Field(
        default=None, description="Computed prompt tokens and generated ones; a minute's may be used at once."
    )
    adapters_max: Count | None = Field(default=None, description="Registered adapters.")
    adapter_bytes_max: Size | None = Field(default=None, description="Files of registered adapters, together.")
    pinned_bytes_max: Size | None = Field(default=None, description="Pinned adapters, together.")
    uploads_max: Positive | None = Field(default=None, description="Uploads at a time, waiting ones included.")
    weights: tuple[str, ...] = Field(
        default=(), description="TENANT=WEIGHT: its part of the batch beside tenants of weight 1."
    )

    def __post_init__(self) -> None:
        for text in self.weights:
            if not _WEIGHT.fullmatch(text):
                raise ValueError(f"tenant_weights must be TENANT=WEIGHT, such as acme=2.5, given {text!r}")

    def weight_of(self, tenant: str) -> float:
        """Return a tenant's weight, 1 unless another one is set."""
        given = dict(text.split("=") for text in self.weights)
        return float(given.get(tenant, 1.0))


@dataclass(frozen=True, slots=True, kw_only=True, config=CHECKS)
class WeftConfig:
    """Configuration of a server. The descriptions of the sections are their titles in `weft serve --help`."""

    model: ModelConfig = Field(description="the base model, and how it is held")
    store: TypedPath = Field(default_factory=default_store)
    allowed_sources: tuple[TypedPath, ...] = ()
    engine: EngineConfig = Field(default_factory=EngineConfig, description="size of the batch and of the KV cache")
    adapters: AdapterLimits = Field(default_factory=AdapterLimits, description="limits of an adapter")
    residency: ResidencyConfig = Field(default_factory=ResidencyConfig, description="memory for adapters, in bytes")
    requests: RequestLimits = Field(default_factory=RequestLimits, description="bounds of one generate request")
    server: ServerConfig = Field(default_factory=ServerConfig, description="addresses and lifetimes of the server")
    tenants: TenantLimits = Field(default_factory=TenantLimits, description="quotas of each tenant")
    access: AccessConfig = Field(default_factory=AccessConfig, description="who may do what, and TLS")
