"""Accounting of KV blocks: which requests hold which, and which full blocks can be shared. No tensors here.

A full block of real tokens is keyed by what made it, never by a name or a slot:

    root  = H(tenant salt, base digest, digest and gate of every adapter that acts everywhere, the mixture)
                                                                                                    (`cache_root`)
    key_i = H(key_{i-1}, tokens of block i, what acts in parts of it),   key_{-1} = root

An adapter with token ranges enters the keys of the blocks that hold such tokens, with its digest, gate and the
places within the block. So earlier blocks have the same keys as without it, and are shared with requests that never
name it; later blocks differ through the chain.

A block with references is never reused. A keyed block without references stays in the cache until its memory is needed,
oldest first. Virtual positions (prefix adapters) live in blocks of their own, which their owner and its requests hold.
"""

import hashlib
import struct
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

from weft.adapters.identifiers import AdapterDigest
from weft.engine import token_ranges
from weft.engine.request import AdapterUse, MixtureUse, Request
from weft.engine.token_ranges import TokenRange


def cache_root(
    salt: str,
    base_digest: str,
    adapters: Iterable[AdapterUse],
    mixture: MixtureUse | None = None,
    prompt: Sequence[int] = (),
    *,
    tenant: str = "",
) -> bytes:
    """Return the root of a request's block keys. Every part is length-framed, so that no two different inputs collide.

    Adapters with token ranges are left out: they enter block by block (`block_key`).
    prompt: counts only if a mixture's gates depend on all of it; prompts then share blocks only if they are equal.
    """
    digest = hashlib.sha256(b"weft-kv-1")
    for part in (tenant, salt, base_digest):
        digest.update(struct.pack("<Q", len(part.encode())) + part.encode())
    for use in adapters:
        if not use.ranges:
            digest.update(_identity(use))
    if mixture is not None:  # after a mark that cannot be the length of a digest
        digest.update(b"mixture " + mixture.digest.encode() + struct.pack("<Q", len(mixture.bounds)))
        for bound in mixture.bounds:
            digest.update(struct.pack("<?dd", *bound))
        if mixture.reads_prompt:
            digest.update(struct.pack(f"<{len(prompt)}q", *prompt))
    return digest.digest()


def block_key(parent: bytes, tokens: Sequence[int], acting: Iterable[AdapterUse] = ()) -> bytes:
    """Return the key of a full block that follows the block keyed `parent`.

    acting: the adapters that act on some of its tokens, with ranges that count from the block's first token.
    """
    digest = hashlib.sha256(parent + struct.pack(f"<{len(tokens)}q", *tokens))
    for use in acting:
        places = [edge for one in use.ranges for edge in one]
        digest.update(_identity(use) + struct.pack(f"<Q{len(places)}Q", len(places), *places))
    return digest.digest()


def _identity(use: AdapterUse) -> bytes:
    return struct.pack("<Q", len(use.digest)) + use.digest.encode() + struct.pack("<d", use.gate)


def _acting(uses: Iterable[AdapterUse], begin: int, end: int) -> Iterator[AdapterUse]:
    """Yield the adapters whose token ranges meet begin : end, with ranges that count from `begin`."""
    for use in uses:
        here = token_ranges.clip(use.ranges, begin, end)
        if here:
            yield use._replace(ranges=tuple(TokenRange(one.begin - begin, one.end - begin) for one in here))


class BlockManager:
    """Hands out the blocks of one KV pool. Only the engine thread calls it."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._caching = enable_prefix_caching
        self._references = [0] * num_blocks
        self._free: list[int] = list(reversed(range(num_blocks)))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # keyed blocks without references, oldest first
        self._digests_of: dict[int, tuple[AdapterDigest, ...]] = {}  # the adapters that shaped a keyed block

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that can be handed out now, cached ones included."""
        return len(self._free) + len(self._idle)

    @property
    def num_used_blocks(self) -> int:
        return self.num_blocks - self.num_free_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Number of blocks that a later request can share."""
        return len(self._key_of)

    def count(self, num_tokens: int) -> int:
        """Return how many blocks hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def match(self, request: Request) -> int:
        """Give a request without blocks the longest cached prefix of its tokens; return how many tokens that is.

        At least one token is left to compute, because the step needs a row to sample from.
        """
        assert not request.blocks
        assert request.num_computed_tokens == 0
        if not self._caching:
            return 0
        while len(request.blocks) < (request.num_tokens - 1) // self.block_size:
            key = self._next_key(request)
            block = self._block_of.get(key)
            if block is None:
                break
            self._reference(block)
            request.blocks.append(block)
            request.block_hashes.append(key)
        return len(request.blocks) * self.block_size

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give blocks for a request's first `num_tokens` real tokens; False, changing nothing, if the pool is short."""
        missing = self.count(num_tokens) - len(request.blocks)
        if missing > self.num_free_blocks:
            return False
        request.blocks.extend(self._take() for _ in range(missing))
        return True

    def commit(self, request: Request) -> None:
        """Key every full block whose tokens are computed, so that others can share it."""
        if not self._caching:
            return
        while len(request.block_hashes) < request.num_computed_tokens // self.block_size:
            block, key = request.blocks[len(request.block_hashes)], self._next_key(request)
            request.block_hashes.append(key)
            if key not in self._block_of:  # another request may have computed the same block in the same step
                self._block_of[key] = block
                self._key_of[block] = key
                end = len(request.block_hashes) * self.block_size
                later = {use.digest for use in request.adapters if use.ranges and use.ranges[0].begin >= end}
                self._digests_of[block] = tuple(digest for digest in request.digests if digest not in later)

    def invalidate(self, request: Request) -> None:
        """Unkey every block that the request uses, so that it is not shared from now on."""
        for block in request.blocks:
            if block in self._key_of:
                self._forget(block)

    def release(self, request: Request) -> None:
        """Take back the blocks of the request's own tokens, which are computed again if it runs again."""
        # Last block first: a chain is evicted from its end, so the rest stays reachable.
        for block in reversed(request.blocks):
            self._drop(block)
        request.blocks = []
        request.block_hashes = []
        request.num_computed_tokens = 0

    def take_virtual(self, num_tokens: int) -> list[int] | None:
        """Return blocks for `num_tokens` virtual positions, with their owner's reference; None if the pool is short."""
        count = self.count(num_tokens)
        if count > self.num_free_blocks:
            return None
        return [self._take() for _ in range(count)]

    def share_virtual(self, request: Request, blocks: Sequence[int]) -> None:
        """Let the request use virtual blocks along with their owner."""
        for block in blocks:
            self._reference(block)
        request.virtual_blocks.extend(blocks)

    def unshare_virtual(self, request: Request) -> None:
        """End the request's use of its virtual blocks."""
        self.drop_virtual(request.virtual_blocks)
        request.virtual_blocks = []

    def drop_virtual(self, blocks: Iterable[int]) -> None:
        """Drop one reference to each of these virtual blocks."""
        for block in blocks:
            self._drop(block)

    def purge(self, digest: AdapterDigest) -> int:
        """Forget every cached block that an adapter's content contributed to; return how many there were."""
        blocks = [block for block, digests in self._digests_of.items() if digest in digests]
        for block in blocks:
            self._forget(block)
            if self._references[block] == 0:
                self._idle.pop(block)
                self._free.append(block)
        return len(blocks)

    def _next_key(self, request: Request) -> bytes:
        """Return the key of the request's first block that is not keyed yet, and whose tokens fill it."""
        start = len(request.block_hashes) * self.block_size
        end = start + self.block_size
        parent = request.block_hashes[-1] if request.block_hashes else request.cache_root
        return block_key(parent, request.token_ids(start, end), _acting(request.adapters, start, end))

    def _take(self) -> int:
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._forget(block)
        self._references[block] = 1
        return block

    def _reference(self, block: int) -> None:
        if self._references[block] == 0:
            del self._idle[block]
        self._references[block] += 1

    def _drop(self, block: int) -> None:
        self._references[block] -= 1
        assert self._references[block] >= 0, block
        if self._references[block] == 0:
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._free.append(block)

    def _forget(self, block: int) -> None:
        del self._block_of[self._key_of.pop(block)], self._digests_of[block]
