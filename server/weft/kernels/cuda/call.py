"""Arguments that all kernels of one call at one site share."""

from typing import Any, NamedTuple

from torch import Tensor

from weft.kernels.step import Entries


class Call(NamedTuple):
    """Sizes as in kernels/cuda/deltas.py: T rows, N entries, G sites of a group, I in and O out.

    rows_of: int32 [N], the row of each of `entries`. table: int64 [G, S, 4].
    hidden: float32 [parts, G, N, R]: for every entry with a rank, the products A x over each part of the inputs; R is
        the largest rank in whole blocks of `RANKS`, and the last block of an entry's rank is filled up with zeros.
    z: float32 [N, O], each entry's whole row (kernels/cuda/networks.py); without elements if there are no networks.
    sizes_out: of each site of the group.
    weight: Triton's dtype of every A and B.
    """

    rows_of: Tensor
    entries: Entries
    table: Tensor
    hidden: Tensor
    z: Tensor
    sizes_out: tuple[int, ...]
    weight: Any

    @property
    def num_rows(self) -> int:
        """T."""
        return self.entries.offsets.shape[0] - 1

    @property
    def num_entries(self) -> int:
        """N."""
        return self.entries.slots.shape[0]

    @property
    def size_out(self) -> int:
        """O, of all sites side by side."""
        return sum(self.sizes_out)

    @property
    def group(self) -> int:
        """G."""
        return len(self.sizes_out)

    @property
    def three_sizes(self) -> tuple[int, int, int]:
        """`sizes_out` as kernels take them, padded with zeros."""
        first, second, third = (*self.sizes_out, 0, 0)[:GROUP_MAX]
        return first, second, third

    @property
    def num_parts(self) -> int:
        """Number of parts in which a shrink takes its inputs; a power of two."""
        return self.hidden.shape[0]

    @property
    def width(self) -> int:
        """R."""
        return self.hidden.shape[3]

    def num_output_blocks(self, block: int) -> int:
        """Return the number of blocks of outputs, none of which spans two sites."""
        return sum(-(-size // block) for size in self.sizes_out)


GROUP_MAX = 3  # query, key and value
RANKS = 16  # per program: the fewest that tensor cores take
_PART = 512  # inputs per program of a shrink: long enough to stream, short enough to fill the device for few entries
_PARTS_MAX = 8


def num_parts_of(size: int) -> int:
    """Return in how many parts `size` inputs are taken: the same in all batches, so that sums have one order."""
    parts = 1
    while parts < _PARTS_MAX and parts * _PART < size:
        parts *= 2
    return parts


def part_size_of(size: int, num_parts: int, block: int) -> int:
    """Return the inputs of a part, in whole blocks; the last parts may have none."""
    return -(-size // (num_parts * block)) * block
