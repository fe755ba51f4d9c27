"""gRPC streams over one connection, at little cost in Python: frames are stored with their times, and parsed later.

A load generator belongs on its own machine. Otherwise it shares the cores with the server that it measures, and gRPC's
Python client costs a server of two cores as much as its own streams do. This client answers only what HTTP/2 (RFC 9113)
requires at once (settings, pings and windows), and stores the rest as received.
"""

import asyncio
import struct
import time
from collections import deque
from typing import NamedTuple

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_FRAME_BYTES_MAX = 1 << 14  # RFC 9113, 4.2: what a peer accepts unless it announces more
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS, _PADDED = 1, 1, 4, 8
_WINDOW_MAX = 2**31 - 1
_WINDOW_DEFAULT = 2**16 - 1
_INITIAL_WINDOW_SIZE = 4  # a setting
_HEAD = 9  # bytes of a frame before its payload


class Frame(NamedTuple):
    """A frame as received: its time, its stream, and whether it is the stream's last."""

    came_s: float
    stream: int
    kind: int
    payload: bytes
    is_last: bool


class Connection(asyncio.Protocol):
    """A connection to a server that speaks gRPC without TLS."""

    def __init__(self) -> None:
        self._unread = b""
        self._frames: list[Frame] = []
        self._open: dict[int, asyncio.Future[None]] = {}
        self._next_stream = 1
        self._window = _WINDOW_DEFAULT  # bytes that may be sent
        self._waiting: deque[tuple[bytes, int]] = deque()  # frames, and the bytes of the window that each takes
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        settings = struct.pack("!HI", _INITIAL_WINDOW_SIZE, _WINDOW_MAX)
        wider = struct.pack("!I", _WINDOW_MAX - _WINDOW_DEFAULT)
        transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, settings) + _frame(_WINDOW_UPDATE, 0, 0, wider))

    def data_received(self, data: bytes) -> None:
        came_s = time.monotonic()
        data = self._unread + data
        at = 0
        while len(data) - at >= _HEAD:
            end = at + _HEAD + int.from_bytes(data[at : at + 3])
            if end > len(data):
                break
            kind, flags, stream = data[at + 3], data[at + 4], int.from_bytes(data[at + 5 : at + 9])
            self._came(came_s, kind, flags, stream, data[at + _HEAD : end])
            at = end
        self._unread = data[at:]

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or ConnectionError("the server closed the connection"))

    async def stream(self, path: str, message: bytes, authority: str) -> list[tuple[float, bytes]]:
        """Send a message and return those that answer it, each with its time. Raises RuntimeError if the call fails."""
        stream = self._next_stream
        self._next_stream += 2
        done = self._open[stream] = asyncio.get_running_loop().create_future()
        body = struct.pack("!BI", 0, len(message)) + message
        headers = _frame(_HEADERS, _END_HEADERS, stream, _header_block(path, authority))
        self._waiting.append((headers + _data(stream, body), len(body)))
        self._send()
        await done
        mine = [frame for frame in self._frames if frame.stream == stream]
        return _messages(mine)

    def forget(self) -> None:
        """Drop the frames of streams that have been read."""
        self._frames = []

    def _send(self) -> None:
        while self._waiting and self._waiting[0][1] <= self._window:
            frames, size = self._waiting.popleft()
            self._window -= size
            self._transport.write(frames)

    def _came(self, came_s: float, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind in (_DATA, _HEADERS):
            if flags & _PADDED:
                raise ConnectionError("padded frames are not read")
            is_last = bool(flags & _END_STREAM)
            self._frames.append(Frame(came_s, stream, kind, payload, is_last))
            if is_last:
                self._open.pop(stream).set_result(None)
        elif kind == _SETTINGS and not flags & _ACK:
            self._transport.write(_frame(_SETTINGS, _ACK, 0, b""))
        elif kind == _PING and not flags & _ACK:
            self._transport.write(_frame(_PING, _ACK, 0, payload))
        elif kind == _WINDOW_UPDATE and stream == 0:
            self._window += int.from_bytes(payload)
            self._send()
        elif kind == _RST_STREAM and stream in self._open:
            self._open.pop(stream).set_exception(RuntimeError(f"the server reset the call: {int.from_bytes(payload)}"))
        elif kind == _GOAWAY:
            self._fail(ConnectionError("the server ends the connection"))

    def _fail(self, error: Exception) -> None:
        for done in self._open.values():
            if not done.done():
                done.set_exception(error)


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


def _data(stream: int, body: bytes) -> bytes:
    """Return DATA frames of a size that every peer accepts, since the peer's settings may not have arrived yet."""
    starts = range(0, len(body), _FRAME_BYTES_MAX)
    return b"".join(
        _frame(
            _DATA,
            _END_STREAM if start + _FRAME_BYTES_MAX >= len(body) else 0,
            stream,
            body[start : start + _FRAME_BYTES_MAX],
        )
        for start in starts
    )


def _header_block(path: str, authority: str) -> bytes:
    """Return the headers of a gRPC call in HPACK (RFC 7541): indexes into its static table, and plain strings."""
    method_post, scheme_http = b"\x83", b"\x86"
    named = {b"\x04": path, b"\x01": authority, b"\x0f\x10": "application/grpc", b"\x00" + _text("te"): "trailers"}
    return method_post + scheme_http + b"".join(name + _text(value) for name, value in named.items())


def _text(value: str) -> bytes:
    data = value.encode()
    if len(data) > 126:
        raise ValueError(f"header: takes at most 126 bytes, given {len(data)}")
    return bytes([len(data)]) + data


def _messages(frames: list[Frame]) -> list[tuple[float, bytes]]:
    """Return a stream's messages, each timed by its last byte. Raises RuntimeError if there is no whole one."""
    found, rest = [], b""
    for frame in frames:
        if frame.kind != _DATA:
            continue
        rest += frame.payload
        while len(rest) >= 5 and len(rest) >= 5 + (size := int.from_bytes(rest[1:5])):
            found.append((frame.came_s, rest[5 : 5 + size]))
            rest = rest[5 + size :]
    if not found or rest:
        raise RuntimeError("the call failed; the server's log says why")
    return found
