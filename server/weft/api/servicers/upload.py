"""Uploads: a few at a time, each one header, then the chunks of each file in the header's order."""

import contextlib
import math
import time
from asyncio import wait_for
from collections.abc import AsyncIterator
from typing import TypeAlias

from weft.adapters.identifiers import check_digest
from weft.adapters.versions import StagedFile, Staging
from weft.api.work import Work
from weft.config import MIB, AdapterLimits
from weft.errors import DeadlineExceeded, InvalidAdapter, InvalidRequest, WeftError
from weft.v1 import adapter_service_pb2
from weft.v1.adapter_files import FOREIGN_FILES, PAIRS, foreign_refused, pair_of

_CHUNK_BYTES_MAX = 1 * MIB
_PAUSE_S = 0.25  # a client that is silent for this long is waiting for the answer

Messages: TypeAlias = AsyncIterator[adapter_service_pb2.UploadAdapterRequest]


class Upload:
    """One upload that is being received. bytes_per_s_min: average; a trickle holds its place as silence does."""

    def __init__(self, messages: Messages, work: Work, *, idle_timeout_s: float, bytes_per_s_min: int) -> None:
        self._messages = messages
        self._work = work
        self._idle_timeout_s = idle_timeout_s
        self._bytes_per_s_min = bytes_per_s_min
        self._started_s = time.monotonic()
        self._num_bytes = 0

    async def header(self) -> adapter_service_pb2.UploadHeader:
        """Receive the header, which must be the first message."""
        first = await self._next()
        if first is None or first.WhichOneof("part") != "header":
            raise InvalidRequest.at("UPLOAD_PROTOCOL", "header", "must be the first message")
        return first.header

    async def receive(self, header: adapter_service_pb2.UploadHeader, staging: Staging) -> None:
        """Write the files that a checked `header` declares; return when the stream has ended as it should."""
        for index, declared in enumerate(header.files):
            file = staging.open_file(declared.name, declared.size_bytes)
            await self._receive_file(index, declared, file)
        if await self._next() is not None:
            raise InvalidRequest.at("UPLOAD_PROTOCOL", "chunk", "more bytes than the header declares")

    async def _receive_file(self, index: int, declared: adapter_service_pb2.UploadFile, file: StagedFile) -> None:
        while file.size_bytes < declared.size_bytes:
            message = await self._next()
            if message is None:
                field, rule = f"header.files[{index}]", "ended early; bytes declared and received"
                size, given = declared.size_bytes, file.size_bytes
                raise InvalidRequest.rule("UPLOAD_TRUNCATED", field, rule, limit=size, given=given)
            data = _data(message, index, file.size_bytes, declared.size_bytes - file.size_bytes)
            self._num_bytes += len(data)
            await self._work.run(file.write, data)
        await self._work.run(file.close)
        found = file.digest.sha256
        if found != declared.sha256:
            field, rule = f"header.files[{declared.name}].sha256", "is not the digest of the bytes"
            raise InvalidAdapter.rule("CHECKSUM_MISMATCH", field, rule, limit=declared.sha256, given=found)

    async def _next(self) -> adapter_service_pb2.UploadAdapterRequest | None:
        slowest, elapsed_s = self._bytes_per_s_min, time.monotonic() - self._started_s
        left_s = self._idle_timeout_s + self._num_bytes / slowest - elapsed_s if slowest else math.inf
        try:
            return await wait_for(anext(self._messages, None), min(self._idle_timeout_s, left_s))
        except TimeoutError:
            raise DeadlineExceeded(
                "UPLOAD_STALLED",
                f"upload: no message for {self._idle_timeout_s:g} s, or fewer than {slowest} bytes per second",
                metadata={"limit": self._idle_timeout_s, "bytes_per_s_min": slowest},
            ) from None


async def discard(messages: Messages, *, bytes_max: int, timeout_s: float) -> None:
    """Read and drop the rest of a refused upload.

    A client that is writing when its call ends may see the write fail (grpc.aio: "Internal error from Core") instead of
    the status. So the call ends only when the client has sent all, pauses, has sent too much or has taken too long.
    """
    ends_at = time.monotonic() + timeout_s
    num_bytes = 0
    with contextlib.suppress(TimeoutError, WeftError):
        while num_bytes <= bytes_max:
            message = await wait_for(anext(messages, None), min(_PAUSE_S, ends_at - time.monotonic()))
            if message is None:
                return
            num_bytes += len(message.chunk.data)


def check_files(header: adapter_service_pb2.UploadHeader, limits: AdapterLimits) -> None:
    """Refuse files that cannot become an adapter, before any byte of them is kept."""
    sizes = {pair.config: limits.config_bytes_max for pair in PAIRS}
    sizes |= {pair.weights: limits.file_bytes_max for pair in PAIRS}
    for index, file in enumerate(header.files):
        field = f"header.files[{index}]"
        if file.name not in sizes:
            rule = f"must be one of {', '.join(sizes)} (safetensors only)"
            if file.name in FOREIGN_FILES:
                rule = foreign_refused(file.name)
            raise InvalidAdapter.rule("FORMAT_UNSUPPORTED", f"{field}.name", rule, given=file.name)
        size, most, size_field = file.size_bytes, sizes[file.name], f"{field}.size_bytes"
        if size > most:
            raise InvalidAdapter.rule("ADAPTER_TOO_LARGE", size_field, "is too large", limit=most, given=size)
        if size == 0:
            raise InvalidAdapter.rule("UPLOAD_TRUNCATED", size_field, "must be at least 1", given=0)
        check_digest(file.sha256, field=f"{field}.sha256", reason="CHECKSUM_INVALID")
    names = [file.name for file in header.files]
    if pair_of(names) is None:
        rule = f"must be {' or '.join(' and '.join(pair) for pair in PAIRS)}, each once"
        raise InvalidRequest.rule("UPLOAD_PROTOCOL", "header.files", rule, given=", ".join(names) or "none")


def _data(message: adapter_service_pb2.UploadAdapterRequest, index: int, received: int, missing: int) -> bytes:
    """Return the bytes of a message, which must be the next chunk."""
    chunk = message.chunk
    if message.WhichOneof("part") != "chunk" or (chunk.file_index, chunk.offset) != (index, received):
        text, most = f"expected file {index} at offset {received}", f"{index}:{received}"
        given = f"{chunk.file_index}:{chunk.offset}"
        raise InvalidRequest.at("UPLOAD_PROTOCOL", "chunk", text, limit=most, given=given)
    most, given = min(_CHUNK_BYTES_MAX, missing), len(chunk.data)
    if not 1 <= given <= most:
        rule = "must have at least 1 byte"
        raise InvalidRequest.rule("UPLOAD_PROTOCOL", "chunk.data", rule, limit=most, given=given)
    return chunk.data
