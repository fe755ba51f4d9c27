"""Share out the query rows of a step among programs, from shapes alone, so that nothing waits for the device.

Everything here is device operations of fixed shape, once per step, so a CUDA graph captures it with the layers.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from weft.kernels.step import Paging

_TILE_ROWS = 128  # query rows times heads of a group, in a shared tile
_TILE_BYTES = 32 << 10  # and at most this many bytes of queries, which stay on chip
_SPLIT_MIN = 128  # keys
_PROGRAMS_MAX = 8192  # several for each place on the device, so that long ones are spread out


class Tiles(NamedTuple):
    """Runs of at most `num_queries` query rows, each of one request; some of the tiles may have none.

    split: logical keys per program; `num_splits` of them cover the widest block table.
    """

    first_rows: Tensor  # int32 [N]
    requests: Tensor  # int32 [N]; B if a tile has no rows
    num_queries: int
    split: int
    num_splits: int


class Plan(NamedTuple):
    """A step's paging, and the tiles of its query rows.

    lone: tiles of one row, which are split by keys.
    shared: tiles of requests with several rows in this step, which are not split; None if shapes rule them out.
    """

    paging: Paging
    lone: Tiles
    shared: Tiles | None

    @property
    def num_requests(self) -> int:
        """B."""
        return self.paging.context_lens.shape[0]

    @property
    def num_spans(self) -> int:
        """S."""
        return self.paging.virtual_lens.shape[1]


def plan(
    paging: Paging,
    *,
    num_rows: int,
    query_heads: int,
    kv_heads: int,
    head_bytes: int,
    block_size: int,
) -> Plan:
    """Share out a step of `num_rows` query rows, of which those from query_start[B] on belong to no request.

    If there are no more rows than requests, each row is a tile of its own, whichever request it belongs to. Otherwise
    only a request's single row is, and requests with several rows have tiles of 128 lanes, rows times heads of a group.

    head_bytes: of one head's query.
    """
    query_start, log_gates = paging.query_start, paging.log_gates
    num_requests, width = len(paging.context_lens), paging.block_tables.shape[1] * block_size
    device = query_start.device
    shared = None
    if num_rows <= num_requests:
        first_rows = torch.arange(num_rows, dtype=torch.int32, device=device)
        requests = torch.searchsorted(query_start[1:], first_rows, right=True, out_int32=True)
    else:
        first_rows = query_start[:-1]
        counts = query_start[1:] - first_rows
        everyone = torch.arange(num_requests, dtype=torch.int32, device=device)
        requests = torch.where(counts == 1, everyone, num_requests)
        group = query_heads // kv_heads
        num_queries = max(1, min(_TILE_ROWS, _TILE_BYTES // head_bytes) // group)
        shared = _shared(query_start, torch.where(counts > 1, counts, 0), num_rows, num_queries, width)
    split = split_of(len(requests) * kv_heads, width)
    virtual_lens = paging.virtual_lens.contiguous()
    log_gates = None if log_gates is None else log_gates.contiguous()
    return Plan(
        paging._replace(virtual_lens=virtual_lens, log_gates=log_gates),
        lone=Tiles(first_rows, requests, 1, split, max(1, -(-width // split))),
        shared=shared,
    )


def split_of(num_programs: int, width: int) -> int:
    """Return the keys of a split: the least power of two, at least 128, with few enough programs over `width` keys."""
    split = _SPLIT_MIN
    while split < width and num_programs * -(-width // split) > _PROGRAMS_MAX:
        split *= 2
    return split


def _shared(query_start: Tensor, counts: Tensor, num_rows: int, num_queries: int, width: int) -> Tiles:
    """Return tiles of `num_queries` rows for requests with `counts` int32 [B] rows, each 0, or 2 and more."""
    num_requests = len(counts)
    per_request = (counts + (num_queries - 1)) // num_queries
    ends = per_request.cumsum(0, dtype=torch.int32)
    # Each request here has two rows or more, and leaves at most one tile unfilled.
    num_tiles = (num_rows + min(num_requests, num_rows // 2) * (num_queries - 1)) // num_queries
    tiles = torch.arange(num_tiles, dtype=torch.int32, device=counts.device)
    requests = torch.searchsorted(ends, tiles, right=True, out_int32=True)
    own = requests.clamp(max=num_requests - 1)
    first_rows = query_start[own] + (tiles - (ends - per_request)[own]) * num_queries
    return Tiles(first_rows, requests, num_queries, max(width, 1), 1)
