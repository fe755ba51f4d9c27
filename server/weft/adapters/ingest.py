"""Read the two files of an adapter into a packed adapter: for uploads, local directories and stored versions alike.

The files are data. Our own strict parsers read them, never a loader of PEFT or transformers.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from weft import __version__
from weft.adapters import packed_adapter
from weft.adapters.identifiers import AdapterDigest, AdapterId, AdapterReference, check_adapter_id
from weft.adapters.packed_adapter import PackedAdapter
from weft.adapters.registry import AdapterInfo
from weft.adapters.safetensors_header import TensorEntry, read_header
from weft.adapters.strict_json import DuplicateKeyFault, JsonFault, parse_object
from weft.config import AdapterLimits
from weft.errors import DataLoss, InvalidAdapter
from weft.methods import mixture as mixture_method
from weft.methods.checkpoint import base_binding, directory
from weft.methods.checkpoint import mixture as mixture_files
from weft.methods.protocol import BaseShape
from weft.v1.adapter_files import MIXTURE_FILES, PEFT_FILES, FilePair

CONFIG_FILE = PEFT_FILES.config

_DEPTH_MAX = 16  # of a config; PEFT's own reach 3
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


class Ingested(NamedTuple):
    """An adapter that passed every check."""

    info: AdapterInfo
    packed: PackedAdapter


class Ingest(NamedTuple):
    """Reads adapters for one base, within limits.

    dtype: of the matrices in slots and of virtual keys and values. pinned: whether packed adapters are in pinned
    memory, from which a CUDA device copies while it computes.
    """

    base: BaseShape
    limits: AdapterLimits
    dtype: torch.dtype
    pinned: bool = False

    @property
    def checked_for(self) -> str:
        """Digest of all that a check and a description depend on besides the adapter's files."""
        base = self.base
        held = base.digest, base.name, base.held_as, sorted(base.same_weights.items()), base.rope_factors
        settings = json.dumps([__version__, held, str(self.dtype), asdict(self.limits)])
        return hashlib.sha256(settings.encode()).hexdigest()

    def read(
        self, config_file: BinaryIO, weights_file: BinaryIO, *, size_bytes: int, files: FilePair = PEFT_FILES
    ) -> Ingested:
        """Check everything and pack the adapter.

        files: names of the two files, which also decide whether they are an adapter or a mixture.
        Raises InvalidAdapter or AdapterUnusable, naming the fault; DataLoss if a file is shorter than it was.
        """
        config = read_config(config_file.read(self.limits.config_bytes_max + 1), self.limits, field=files.config)
        if files == PEFT_FILES:
            directory.form_of(config)  # before its tensors, which may be of dtypes that no served type has
        header = read_header(weights_file, self.limits, field=files.weights)
        tensors = _tensors(weights_file, header.tensors, files.weights)
        if files == MIXTURE_FILES:
            return self._mixture(config, tensors, header.metadata, size_bytes)
        adapter = directory.read(config, tensors, header.metadata, self.base, self.limits)
        laid_out = packed_adapter.build(adapter, self.base, dtype=self.dtype, pinned=self.pinned)
        base_model = config.get("base_model_name_or_path")
        info = AdapterInfo(
            method=adapter.method.name,
            size_bytes=size_bytes,
            packed_bytes=laid_out.size_bytes,
            rank=adapter.rank,
            num_virtual_tokens=adapter.num_virtual_tokens,
            num_parameters=adapter.num_parameters,
            modules=tuple(sorted({self.base.sites[name].suffix for name in adapter.sites})),
            base_model_name=base_model[:256] if isinstance(base_model, str) else "",
            trained_held_as=directory.trained_held_as(config, header.metadata, self.base),
            trained_rope_factors=base_binding.trained_rope_factors(header.metadata, self.base),
            invocation_tokens=adapter.invocation_tokens,
        )
        return Ingested(info, laid_out)

    def _mixture(
        self, config: Mapping[str, object], tensors: Mapping[str, Tensor], metadata: Mapping[str, str], size_bytes: int
    ) -> Ingested:
        """Read the router alone; the registry checks that its experts are available."""
        mixture = mixture_files.read(config, tensors, self.base, self.limits)
        for index, expert in enumerate(mixture.experts):
            if expert.adapter_id:
                check_adapter_id(expert.adapter_id, field=f"mixture_config.experts[{index}].adapter_id")
        laid_out = packed_adapter.build_router(mixture, pinned=self.pinned)
        info = AdapterInfo(
            method=mixture_method.METHOD.name,
            size_bytes=size_bytes,
            packed_bytes=laid_out.size_bytes,
            num_parameters=mixture.params.weight.numel(),
            trained_held_as=mixture_files.trained_held_as(config, self.base),
            trained_rope_factors=base_binding.trained_rope_factors(metadata, self.base),
            experts=tuple(
                AdapterReference(AdapterId(expert.adapter_id), AdapterDigest(expert.digest))
                for expert in mixture.experts
            ),
            is_sequence_level=mixture.config.level is mixture_method.Level.SEQUENCE,
        )
        return Ingested(info, laid_out)


def read_config(data: bytes, limits: AdapterLimits, *, field: str = CONFIG_FILE) -> dict[str, object]:
    """Return the object in `data`, all numbers finite, or raise InvalidAdapter CONFIG_INVALID, which names `field`.

    `weft.methods.checkpoint` interprets the keys. Here the contents never cause an import, compilation or look-up.
    """
    most, given = limits.config_bytes_max, len(data)
    if given > most:
        raise InvalidAdapter.rule("CONFIG_INVALID", field, "has too many bytes", limit=most, given=given)
    try:
        return parse_object(data, depth_max=_DEPTH_MAX)
    except DuplicateKeyFault as fault:
        raise InvalidAdapter.rule("CONFIG_INVALID", field, str(fault), given=fault.name) from None
    except JsonFault as fault:
        raise InvalidAdapter.at("CONFIG_INVALID", field, str(fault)) from None


def _tensors(file: BinaryIO, entries: Mapping[str, TensorEntry], field: str) -> dict[str, Tensor]:
    """Return the tensors, all views of one buffer into which the file is read.

    The file is not mapped: a page of a mapped file that was cut, or that the disk cannot read, ends the process.
    """
    data = bytearray(max(entry.end for entry in entries.values()))
    file.seek(0)
    view, num_read = memoryview(data), 0
    while num_read < len(data):
        count = file.readinto(view[num_read:])  # pyright: ignore[reportAttributeAccessIssue]  # every binary file has it
        if not count:
            raise DataLoss("BLOB_CORRUPT", f"{field}: was cut to {num_read} of {len(data)} bytes while it was read")
        num_read += count
    return {
        name: torch.frombuffer(
            data,
            dtype=_DTYPES[entry.dtype],
            count=(entry.end - entry.begin) // _DTYPES[entry.dtype].itemsize,
            offset=entry.begin,
        ).view(entry.shape)
        for name, entry in entries.items()
    }
