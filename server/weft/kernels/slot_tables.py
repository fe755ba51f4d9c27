"""The adapter slots as kernels read them: tables of addresses, and everything that launches may depend on."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class CaptureKey(NamedTuple):
    """Everything a driver may base decisions on without reading a row. While it is equal, so are a step's launches.

    table_at: address of `SlotTables.device_table`.
    rank: at least the rank of every table row; a multiple of 16, so that one adapter more or less seldom changes it.
    kinds: by site, the set of kinds of its table rows, uint16 with bit `kind`.
    choices: at least the choices of every router; a power of two, at least 128.
    """

    table_at: int
    rank: int
    kinds: bytes
    choices: int


@dataclass(slots=True, kw_only=True)
class SlotTables:
    """The slots of one base as kernels see them. `adapters/slots.py` writes them, between steps.

    table: int64 [num_sites, S, 4]: (kind, rank, address, address) of every table row at every site.
    device_table: the same in the device's memory; it moves only when S grows.
    routers: int64 [S, 8], one row for each mixture: address of W float32 [M, C, hidden], elements from one layer's W to
        the next (0 if all share one), hidden, experts, choices C, top_k, flags (1 normalize, 2 absolute, 4 rms_norm),
        and τ as the bits of a float32; zeros for a slot without a router.
    device_routers: the same in the device's memory; it moves with `device_table`.
    outputs_at, inputs_at: by table row, the sites where it adds to the output, or scales the input: bit `site.index`.
    num_residual_readers: how many table rows, summed over the sites, read the residual stream.
    capture_key: replaced by another object whenever launches may change.
    """

    table: Tensor
    device_table: Tensor
    routers: Tensor
    device_routers: Tensor
    outputs_at: dict[int, int]
    inputs_at: dict[int, int]
    num_residual_readers: int
    capture_key: CaptureKey
