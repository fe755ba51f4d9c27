"""A step as flat tensors, against a loop over its tokens."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.adapters.identifiers import AdapterDigest
from weft.adapters.slots import AdapterSlot
from weft.engine import batch as batches
from weft.engine import token_ranges
from weft.engine.request import AdapterUse, Request, RequestId, SamplingParams
from weft.engine.scheduler import Scheduled
from weft.engine.token_ranges import OPEN, Ranges, TokenRange
from weft.kernels.step import entries_at


def request(
    name: int,
    *,
    num_prompt: int,
    num_output: int,
    num_computed: int,
    uses: tuple[AdapterUse, ...] = (),
    block_size: int,
    first_block: int,
) -> Request:
    """Return a request with its own blocks, in falling order so that no order is right by accident."""
    made = Request(
        request_id=RequestId(str(name)),
        prompt_token_ids=tuple(100 * name + index for index in range(num_prompt)),
        params=SamplingParams(),
        adapters=uses,
    )
    made.output += [100 * name + num_prompt + index for index in range(num_output)]
    made.num_computed_tokens = num_computed
    count = sum(-(-use.num_virtual_tokens // block_size) for use in uses)
    made.virtual_blocks = [first_block + count - 1 - index for index in range(count)]
    count_real = -(-made.num_tokens // block_size)
    made.blocks = [first_block + count + count_real - 1 - index for index in range(count_real)]
    return made


@st.composite
def ranges(draw: Any) -> Ranges:
    """Draw None, which is everywhere, or ranges that may begin, end and lie beyond the tokens."""
    edges = sorted(draw(st.sets(st.integers(0, 20), min_size=0, max_size=6)))
    edges += [OPEN] * (len(edges) % 2)
    return token_ranges.normal(map(TokenRange, edges[::2], edges[1::2]))


@st.composite
def steps(draw: Any) -> tuple[list[Scheduled], dict[Request, tuple[AdapterSlot, ...]], int]:
    block_size = draw(st.sampled_from([1, 2, 3, 4, 16]))
    step, slots_of, first_block, next_slot = [], {}, 0, 0
    for name in range(draw(st.integers(1, 5))):
        uses = [
            AdapterUse(AdapterDigest(f"d{k}"), draw(st.sampled_from([1.0, 0.5, -2.0, 0.0])), 0, draw(ranges()))
            for k in range(draw(st.integers(0, 3)))
        ]
        for k in range(draw(st.integers(0, 3))):
            gate = draw(st.sampled_from([1.0, 1.0, 0.3, 2.5]))
            virtual = AdapterUse(AdapterDigest(f"v{k}"), gate, draw(st.integers(1, 9)))
            uses.insert(draw(st.integers(0, len(uses))), virtual)
        num_prompt, num_output = draw(st.integers(1, 12)), draw(st.integers(0, 6))
        num_computed = draw(st.integers(0, num_prompt + num_output - 1))
        made = request(
            name,
            num_prompt=num_prompt,
            num_output=num_output,
            num_computed=num_computed,
            uses=tuple(uses),
            block_size=block_size,
            first_block=first_block,
        )
        first_block += len(made.virtual_blocks) + len(made.blocks)
        step.append(Scheduled(made, draw(st.integers(1, made.num_tokens - num_computed))))
        if uses or draw(st.booleans()):
            slots_of[made] = tuple(AdapterSlot(next_slot + k) for k in range(len(uses)))
        next_slot += len(uses)
    return step, slots_of, block_size


def _acts(use: AdapterUse, index: int) -> bool:
    return not use.num_virtual_tokens and (not use.ranges or any(begin <= index < end for begin, end in use.ranges))


@settings(max_examples=400, deadline=None)
@given(steps())
def test_every_row_is_what_a_loop_over_tokens_says(
    drawn: tuple[list[Scheduled], dict[Request, tuple[AdapterSlot, ...]], int],
) -> None:
    step, slots_of, size = drawn
    input_ids, positions, kv_slots, entries, log_gates, sample_rows = [], [], [], [], [], []
    most = max(len(one.spans) for one, _ in step)
    for scheduled in step:
        one, num_tokens = scheduled
        all_tokens = [*one.prompt_token_ids, *one.output]
        for index in range(one.num_computed_tokens, one.num_computed_tokens + num_tokens):
            input_ids.append(all_tokens[index])
            positions.append(one.num_virtual_tokens + index)
            kv_slots.append(one.blocks[index // size] * size + index % size)
            slots = zip(slots_of.get(one, ()), one.adapters, strict=True)
            entries.append([(slot, use.gate) for slot, use in slots if _acts(use, index)])
            log_gates.append([math.log(use.gate) for use in one.spans] + [0.0] * (most - len(one.spans)))
            if index == one.num_tokens - 1:
                sample_rows.append(len(input_ids) - 1)

    batch = batches.build(step, slots_of, size)

    assert batch.input_ids.tolist() == input_ids
    assert batch.positions.tolist() == positions
    assert batch.paging.kv_slots.tolist() == kv_slots
    assert batch.sample_rows.tolist() == sample_rows
    starts = batch.paging.query_start.tolist()
    assert [end - begin for begin, end in itertools.pairwise(starts)] == [n for _, n in step]
    assert batch.paging.context_lens.tolist() == [one.num_computed_tokens + n for one, n in step]
    lengths = [[use.num_virtual_tokens for use in one.spans] for one, _ in step]
    assert batch.paging.virtual_lens.tolist() == [own + [0] * (most - len(own)) for own in lengths]
    if all(use.gate == 1.0 for one, _ in step for use in one.spans):
        assert batch.paging.log_gates is None
    else:
        assert batch.paging.log_gates is not None
        assert batch.paging.log_gates.equal(torch.tensor(log_gates, dtype=torch.float32))
    for table, (one, _) in zip(batch.paging.block_tables.tolist(), step, strict=True):
        blocks = one.virtual_blocks + one.blocks
        assert table[: len(blocks)] == blocks
    rows = batch.entries
    if not any(entries):
        assert rows is None
        return
    assert rows is not None
    offsets, slots, gates = rows.offsets.tolist(), rows.slots.tolist(), rows.gates.tolist()
    flat = list(zip(slots, gates, strict=True))
    assert [flat[begin:end] for begin, end in itertools.pairwise(offsets)] == entries


@settings(max_examples=200, deadline=None)
@given(steps(), st.data())
def test_some_rows_alone_keep_their_entries(
    drawn: tuple[list[Scheduled], dict[Request, tuple[AdapterSlot, ...]], int], data: st.DataObject
) -> None:
    """The output head gets the entries of its sample rows; any rows are drawn here."""
    batch = batches.build(*drawn)
    if batch.entries is None:
        return
    whole = batch.entries
    chosen = data.draw(st.lists(st.integers(0, len(batch.input_ids) - 1), unique=True).map(sorted))
    for rows in (chosen, batch.sample_rows.tolist()):
        part, places = entries_at(whole, torch.tensor(rows, dtype=torch.int64))
        assert whole.slots[places].equal(part.slots)
        flat = list(zip(part.slots.tolist(), part.gates.tolist(), strict=True))
        wanted = [
            list(zip(whole.slots[begin:end].tolist(), whole.gates[begin:end].tolist(), strict=True))
            for begin, end in [(int(whole.offsets[row]), int(whole.offsets[row + 1])) for row in rows]
        ]
        assert [flat[begin:end] for begin, end in itertools.pairwise(part.offsets.tolist())] == wanted
        assert [t.dtype for t in part] == [torch.int32, torch.int32, torch.float32]


@settings(max_examples=50, deadline=None)
@given(steps())
def test_types_are_those_the_kernels_read(
    drawn: tuple[list[Scheduled], dict[Request, tuple[AdapterSlot, ...]], int],
) -> None:
    batch = batches.build(*drawn)
    wide, floats = {"input_ids", "positions", "kv_slots", "sample_rows"}, {"log_gates", "gates"}
    records = [batch, batch.paging, *([] if batch.entries is None else [batch.entries])]
    for name, tensor in (pair for record in records for pair in record._asdict().items()):
        if isinstance(tensor, Tensor):
            wanted = torch.int64 if name in wide else torch.float32 if name in floats else torch.int32
            assert tensor.dtype == wanted, name
            assert tensor.is_contiguous(), name


def test_an_adapter_that_is_not_on_the_device_is_a_bug_not_a_base_answer() -> None:
    one = request(
        1,
        num_prompt=3,
        num_output=0,
        num_computed=0,
        uses=(AdapterUse(AdapterDigest("g"), 1.0, 0),),
        block_size=4,
        first_block=0,
    )
    with pytest.raises(ValueError, match="zip"):
        batches.build([Scheduled(one, 3)], {}, 4)


def test_each_adapters_virtual_positions_begin_a_block() -> None:
    """Spans of 3 and 5 in blocks of 4: three blocks with two holes, then the tokens, whose positions count no hole."""
    uses = (
        AdapterUse(AdapterDigest("v"), 0.5, 3),
        AdapterUse(AdapterDigest("d"), 2.0, 0),
        AdapterUse(AdapterDigest("w"), 1, 5),
    )
    one = request(1, num_prompt=2, num_output=0, num_computed=0, uses=uses, block_size=4, first_block=10)
    plain = request(2, num_prompt=1, num_output=0, num_computed=0, block_size=4, first_block=20)
    slots = tuple(map(AdapterSlot, range(3)))
    batch = batches.build([Scheduled(one, 2), Scheduled(plain, 1)], {one: slots}, 4)
    assert batch.paging.block_tables.tolist() == [[12, 11, 10, 13], [20, 0, 0, 0]]
    assert batch.paging.virtual_lens.tolist() == [[3, 5], [0, 0]]
    assert batch.positions.tolist() == [8, 9, 0]
    assert batch.paging.kv_slots.tolist() == [52, 53, 80]
    assert batch.paging.log_gates is not None
    half = math.log(0.5)
    assert batch.paging.log_gates.tolist() == [pytest.approx([half, 0.0]), pytest.approx([half, 0.0]), [0.0, 0.0]]


@pytest.mark.parametrize("gate", [0.0, -0.5, float("nan")])
def test_a_gate_without_a_logarithm_is_refused(gate: float) -> None:
    """A part of weight 0 takes no part in a request."""
    with pytest.raises(AssertionError):
        Request(
            request_id=RequestId("r"),
            prompt_token_ids=(1,),
            params=SamplingParams(),
            adapters=(AdapterUse(AdapterDigest("g"), gate, 3),),
        )
