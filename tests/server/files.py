"""Adapter files, good and bad, as bytes."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import safetensors.torch
from torch import Tensor

from weft.adapters.ingest import CONFIG_FILE
from weft.adapters.safetensors_header import WEIGHTS_FILE
from weft.config import MIB
from weft.methods.checkpoint import directory
from weft.methods.protocol import Adapter, BaseShape
from weft.v1 import adapter_service_pb2

LORA_A = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
LORA_B = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


class Files(NamedTuple):
    """The two files of a PEFT directory."""

    config: bytes
    weights: bytes

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True, exist_ok=True)
        (path / CONFIG_FILE).write_bytes(self.config)
        (path / WEIGHTS_FILE).write_bytes(self.weights)
        return path


class Parts(NamedTuple):
    """The same in parts, to change one of them and assemble it again."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @classmethod
    def of(cls, adapter: Adapter, base: BaseShape) -> Self:
        with tempfile.TemporaryDirectory() as path:
            directory.write(adapter, Path(path), base)
            weights = Path(path, WEIGHTS_FILE)
            with safetensors.safe_open(weights, "pt") as file:
                metadata = dict(file.metadata())
            tensors = safetensors.torch.load(weights.read_bytes())
            return cls(json.loads(Path(path, CONFIG_FILE).read_text()), tensors, metadata)

    def configured(self, **changes: Any) -> Files:
        """Return the adapter with these keys of the config changed."""
        return self._replace(config={**self.config, **changes}).files()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Files:
        return self._replace(tensors=dict(tensors)).files()

    def files(self) -> Files:
        tensors = {name: tensor.clone().contiguous() for name, tensor in self.tensors.items()}
        weights = safetensors.torch.save(tensors, metadata=self.metadata) if tensors else with_header({}, b"")
        return Files(json.dumps(self.config).encode(), weights)


class Good(NamedTuple):
    """A good adapter of each method, as raw material for bad ones."""

    lora: Parts
    ia3: Parts
    prefix: Parts
    prompt: Parts
    ptuning: Parts

    def header(self, change: Callable[[dict[str, Any]], object]) -> Files:
        """Return the LoRA with a changed safetensors header."""
        files = self.lora.files()
        header, data = split_header(files.weights)
        change(header)
        return files._replace(weights=with_header(header, data))

    def raw(self, weights: bytes) -> Files:
        return self.lora.files()._replace(weights=weights)

    def tensor(self, name: str, change: Callable[[Tensor], Tensor]) -> Files:
        return self.lora.with_tensors({**self.lora.tensors, name: change(self.lora.tensors[name])})

    def renamed(self, rename: Callable[[str], str]) -> Files:
        return self.lora.with_tensors({rename(name): tensor for name, tensor in self.lora.tensors.items()})


def with_header(header: Mapping[str, Any] | bytes, data: bytes, *, length: int | None = None) -> bytes:
    """Return a safetensors file with exactly this header, valid or not."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def split_header(weights: bytes) -> tuple[dict[str, Any], bytes]:
    """Return (header, data) of a good file."""
    length = int.from_bytes(weights[:8], "little")
    return json.loads(weights[8 : 8 + length]), weights[8 + length :]


def upload_header(adapter_id: str, files: Files, **fields: Any) -> adapter_service_pb2.UploadHeader:
    declared = [
        adapter_service_pb2.UploadFile(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in zip((CONFIG_FILE, WEIGHTS_FILE), files, strict=True)
    ]
    return adapter_service_pb2.UploadHeader(adapter_id=adapter_id, files=declared, **fields)


def chunk(file_index: int, offset: int, data: bytes) -> adapter_service_pb2.UploadAdapterRequest:
    return adapter_service_pb2.UploadAdapterRequest(
        chunk=adapter_service_pb2.UploadChunk(file_index=file_index, offset=offset, data=data)
    )


def upload_messages(
    adapter_id: str, files: Files, *, chunk_bytes: int = MIB, **fields: Any
) -> Iterator[adapter_service_pb2.UploadAdapterRequest]:
    """Yield the messages of a good upload."""
    yield adapter_service_pb2.UploadAdapterRequest(header=upload_header(adapter_id, files, **fields))
    for index, data in enumerate(files):
        for offset in range(0, len(data), chunk_bytes):
            yield chunk(index, offset, data[offset : offset + chunk_bytes])
