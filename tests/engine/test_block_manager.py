"""Blocks: keys that never collide, references that add up, a cache that evicts the oldest first."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.fakes import check_blocks
from weft.adapters.identifiers import AdapterDigest
from weft.engine.block_manager import BlockManager, block_key, cache_root
from weft.engine.request import AdapterUse, Request, RequestId, SamplingParams
from weft.engine.token_ranges import OPEN, TokenRange

SIZE = 4
_ids = itertools.count()


def request(prompt: Sequence[int], *, root: bytes = b"root", digests: Sequence[str] = ()) -> Request:
    return Request(
        request_id=RequestId(str(next(_ids))),
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(),
        adapters=tuple(AdapterUse(AdapterDigest(digest), 1.0, 0) for digest in digests),
        cache_root=root,
    )


def compute(blocks: BlockManager, request: Request) -> int:
    """Match, grow and commit a whole prompt, as its steps would; return the number of cached tokens."""
    cached = blocks.match(request)
    assert blocks.grow(request, request.num_tokens)
    request.num_computed_tokens = request.num_tokens
    blocks.commit(request)
    return cached


# -- keys ------------------------------------------------------------------------------------------------------------

_uses = st.lists(
    st.builds(
        AdapterUse,
        st.sampled_from(["", "a", "b", "ab", "aa", "a" * 64, "b" * 64]).map(AdapterDigest),
        st.sampled_from([0.0, 0.5, 1.0, -1.0, 1.0000000000000002]),
        st.just(0),
        st.just(()),
    ),
    max_size=3,
)
_roots = st.tuples(st.text(max_size=4), st.text(max_size=4), _uses)


@settings(max_examples=300, deadline=None)
@given(_roots, _roots)
def test_different_origins_have_different_roots(one: tuple, other: tuple) -> None:
    assert (cache_root(*one) == cache_root(*other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("ab", "c", []), ("a", "bc", [])),
        (("", "ab", []), ("ab", "", [])),
        (("a\0", "b", []), ("a", "\0b", [])),
        (("", "", [("ab", 1.0, 0), ("c", 1.0, 0)]), ("", "", [("a", 1.0, 0), ("bc", 1.0, 0)])),
        (("", "", [("a", 1.0, 0), ("b", 1.0, 0)]), ("", "", [("b", 1.0, 0), ("a", 1.0, 0)])),
        (("", "", [("a", 1.0, 0)]), ("", "", [("a", 0.5, 0)])),
        (("", "", [("a", 1.0, 0)]), ("", "", [("a", 1.0, 0), ("a", 1.0, 0)])),
        (("tenant", "d", [("a", 1.0, 0)]), ("", "d", [("a", 1.0, 0)])),
    ],
)
def test_parts_are_framed(one: tuple, other: tuple) -> None:
    def root(salt: str, digest: str, uses: list[tuple]) -> bytes:
        return cache_root(salt, digest, [AdapterUse(*use) for use in uses])

    assert root(*one) != root(*other)


def test_virtual_positions_need_no_place_in_the_key() -> None:
    """They are part of the digest's content; the count beside it adds nothing."""
    one, other = AdapterUse(AdapterDigest("g"), 1.0, 0), AdapterUse(AdapterDigest("g"), 1.0, 7)
    assert cache_root("", "", [one]) == cache_root("", "", [other])


_tokens = st.lists(st.integers(0, 2**31), min_size=SIZE, max_size=SIZE)


@settings(max_examples=200, deadline=None)
@given(st.tuples(st.binary(min_size=32, max_size=32), _tokens), st.tuples(st.binary(min_size=32, max_size=32), _tokens))
def test_different_blocks_have_different_keys(one: tuple, other: tuple) -> None:
    assert (block_key(*one) == block_key(*other)) == (one == other)


def test_a_key_tells_what_acts_on_its_tokens() -> None:
    """Adapter, gate and place within the block: a change of any one of them makes another key."""
    parent, tokens, a = b"p" * 32, [1, 2, 3, 4], AdapterUse(AdapterDigest("a"), 1.0, 0, (TokenRange(1, 3),))
    acting = [
        (),
        (a,),
        (a._replace(digest=AdapterDigest("b")),),
        (a._replace(gate=0.5),),
        (a._replace(ranges=(TokenRange(1, 4),)),),
        (a._replace(ranges=(TokenRange(1, 2), TokenRange(3, 4))),),
        (a, a._replace(digest=AdapterDigest("b"))),
        (a, a),
    ]
    keys = [block_key(parent, tokens, uses) for uses in acting]
    assert len(set(keys)) == len(keys)


# -- sharing ---------------------------------------------------------------------------------------------------------


def _ranged(prompt: Sequence[int], *uses: tuple[str, Sequence[tuple[int, int]]]) -> Request:
    """Return a request of the adapters by digest, each with its ranges."""
    adapters = tuple(
        AdapterUse(AdapterDigest(digest), 1.0, 0, tuple(TokenRange(*one) for one in ranges)) for digest, ranges in uses
    )
    return Request(
        request_id=RequestId(str(next(_ids))),
        prompt_token_ids=tuple(prompt),
        params=SamplingParams(),
        adapters=adapters,
        cache_root=cache_root("", "base", adapters),
    )


@pytest.mark.parametrize(
    ("first", "second", "num_shared"),
    [
        ([], [("a", [(9, OPEN)])], 8),  # the base's blocks before the first token that differs
        ([], [("a", [(8, OPEN)])], 8),
        ([], [("a", [(7, OPEN)])], 4),
        ([("a", [(9, OPEN)])], [], 8),  # and the other way round
        ([("a", [(9, OPEN)])], [("b", [(13, OPEN)])], 8),
        ([("a", [(9, OPEN)])], [("a", [(9, OPEN)])], 20),
        ([("a", [(9, OPEN)])], [("a", [(10, OPEN)])], 8),
        ([("a", [(0, OPEN)])], [("b", [(0, OPEN)])], 0),
        ([("a", [(2, 6)])], [("a", [(2, 6), (17, 18)])], 16),
        ([("a", [(2, 6)])], [], 0),
        ([("a", [(5, 6)])], [], 4),  # tokens after a range depend on it, though nothing acts on them
        ([("a", ()), ("b", [(9, OPEN)])], [("a", ())], 8),  # without b it is a's own request
        ([("a", ()), ("b", [(9, OPEN)])], [], 0),
        ([("a", [(9, OPEN)])], [("a", ())], 0),
        ([("a", [(4, 6)]), ("b", [(14, OPEN)])], [("a", [(4, 6)])], 12),
    ],
)
def test_blocks_are_shared_up_to_the_first_token_that_is_made_otherwise(
    first: list[tuple], second: list[tuple], num_shared: int
) -> None:
    blocks = BlockManager(16, SIZE)
    compute(blocks, _ranged(range(21), *first))
    assert compute(blocks, _ranged(range(21), *second)) == num_shared


def test_a_purge_takes_what_an_adapter_s_tokens_made_and_what_follows() -> None:
    blocks = BlockManager(16, SIZE)
    compute(blocks, one := _ranged(range(21), ("a", [(5, 6)])))
    blocks.release(one)
    assert blocks.purge(AdapterDigest("a")) == 4, "the block with token 5, and the three after it"
    check_blocks(blocks)
    assert compute(blocks, _ranged(range(21))) == 4, "the first block is the base's, and stays"


def test_a_second_request_shares_the_full_blocks_of_its_beginning() -> None:
    blocks = BlockManager(8, SIZE)
    first, second = request(range(10)), request([*range(9), 99])
    assert compute(blocks, first) == 0
    assert blocks.num_cached_blocks == 2, "the third block is not full"
    assert compute(blocks, second) == 8
    assert second.blocks[:2] == first.blocks[:2]
    assert second.blocks[2] != first.blocks[2]
    blocks.release(first)
    check_blocks(blocks)
    assert blocks.num_used_blocks == 3
    blocks.release(second)
    assert blocks.num_used_blocks == 0
    assert blocks.num_cached_blocks == 2


@pytest.mark.parametrize(("length", "cached"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (13, 12)])
def test_a_match_leaves_a_token_to_compute(length: int, cached: int) -> None:
    blocks = BlockManager(8, SIZE)
    compute(blocks, request(range(16)))
    again = request(range(length))
    assert blocks.match(again) == cached
    assert len(again.blocks) * SIZE == cached < length


def test_a_match_ends_at_the_first_other_token() -> None:
    blocks = BlockManager(8, SIZE)
    compute(blocks, request(range(16)))
    other = request([0, 1, 2, 3, 4, 5, 6, 77, 8, 9, 10, 11, 12])
    assert blocks.match(other) == 4, "the third block has the same tokens after another beginning"


def test_a_root_of_its_own_shares_nothing() -> None:
    blocks = BlockManager(8, SIZE)
    compute(blocks, request(range(9), root=b"one"))
    assert blocks.match(request(range(9), root=b"other")) == 0


def test_generated_tokens_are_shared_like_prompt_tokens() -> None:
    blocks = BlockManager(8, SIZE)
    first = request(range(6))
    compute(blocks, first)
    first.output += [6, 7, 8]
    assert blocks.grow(first, 8)
    first.num_computed_tokens = 8
    blocks.commit(first)
    assert blocks.match(request(range(12))) == 8


def test_twins_computed_in_one_step_keep_one_key() -> None:
    blocks = BlockManager(8, SIZE)
    twins = [request(range(8)), request(range(8))]
    for twin in twins:
        assert blocks.match(twin) == 0
        assert blocks.grow(twin, 8)
    for twin in twins:
        twin.num_computed_tokens = 8
        blocks.commit(twin)
    assert twins[0].block_hashes == twins[1].block_hashes
    assert blocks.num_cached_blocks == 2
    for twin in twins:
        blocks.release(twin)
    check_blocks(blocks)
    assert blocks.num_free_blocks == 8


def test_without_caching_nothing_is_shared() -> None:
    blocks = BlockManager(8, SIZE, enable_prefix_caching=False)
    compute(blocks, request(range(8)))
    assert blocks.match(request(range(9))) == 0
    assert blocks.num_cached_blocks == 0


def test_grow_changes_nothing_where_the_pool_is_short() -> None:
    blocks = BlockManager(2, SIZE)
    first, second = request(range(5)), request(range(5))
    assert blocks.grow(first, 5)
    assert blocks.grow(first, 3), "fewer tokens than it has room for"
    assert len(first.blocks) == 2
    assert not blocks.grow(second, 1)
    assert second.blocks == []
    check_blocks(blocks)


def test_the_oldest_idle_block_goes_first_and_a_chain_from_its_end() -> None:
    blocks = BlockManager(4, SIZE)
    old, new = request(range(8), root=b"old"), request(range(8), root=b"new")
    compute(blocks, old)
    compute(blocks, new)
    blocks.release(old)
    blocks.release(new)
    assert blocks.num_free_blocks == 4
    assert blocks.num_cached_blocks == 4
    taken = request(range(4), root=b"taken")
    assert blocks.grow(taken, 4)
    check_blocks(blocks)
    assert blocks.match(request(range(9), root=b"old")) == 4, "the end of the older chain went, its beginning stays"
    assert blocks.match(request(range(9), root=b"new")) == 8


def test_a_used_block_is_young_again() -> None:
    blocks = BlockManager(4, SIZE)
    a, b = request(range(4), root=b"a"), request(range(4), root=b"b")
    compute(blocks, a)
    compute(blocks, b)
    blocks.release(a)
    blocks.release(b)
    again = request(range(5), root=b"a")
    assert blocks.match(again) == 4
    blocks.release(again)
    for root in (b"x", b"y", b"z"):  # two free blocks, then the oldest idle one
        assert blocks.grow(request(range(4), root=root), 4)
    assert blocks.match(request(range(5), root=b"a")) == 4
    assert blocks.match(request(range(5), root=b"b")) == 0


# -- adapters --------------------------------------------------------------------------------------------------------


def test_purge_forgets_a_digest_in_every_composition() -> None:
    blocks = BlockManager(16, SIZE)
    uses = {"one": ["g"], "other": ["h"], "both": ["g", "h"], "base": []}
    for name, digests in uses.items():
        made = request(range(8), root=name.encode(), digests=digests)
        compute(blocks, made)
        blocks.release(made)
    assert blocks.purge(AdapterDigest("g")) == 4
    check_blocks(blocks)
    matched = {name: blocks.match(request(range(9), root=name.encode())) for name in uses}
    assert matched == {"one": 0, "other": 8, "both": 0, "base": 8}
    assert blocks.purge(AdapterDigest("g")) == 0
    assert blocks.num_free_blocks == 12


def test_purged_blocks_that_are_in_use_are_freed_by_their_last_user() -> None:
    blocks = BlockManager(4, SIZE)
    user = request(range(8), digests=["g"])
    compute(blocks, user)
    assert blocks.purge(AdapterDigest("g")) == 2
    assert blocks.num_used_blocks == 2
    blocks.release(user)
    check_blocks(blocks)
    assert blocks.num_free_blocks == 4
    assert blocks.num_cached_blocks == 0


def test_distrusted_blocks_are_not_shared_again() -> None:
    blocks = BlockManager(8, SIZE)
    bad, sharer = request(range(12)), request(range(9))
    compute(blocks, bad)
    assert compute(blocks, sharer) == 8
    blocks.invalidate(bad)
    check_blocks(blocks)
    assert blocks.match(request(range(9))) == 0
    blocks.release(bad)
    blocks.release(sharer)
    check_blocks(blocks)
    assert blocks.num_free_blocks == 8
    assert blocks.num_cached_blocks == 0


def test_virtual_blocks_live_until_owner_and_users_are_gone() -> None:
    blocks = BlockManager(4, SIZE)
    taken = blocks.take_virtual(5)
    assert taken is not None
    assert len(taken) == 2
    users = [request([1]), request([2])]
    for user in users:
        blocks.share_virtual(user, taken)
        assert user.virtual_blocks == taken
    blocks.drop_virtual(taken)  # the owner leaves
    assert blocks.num_used_blocks == 2
    for user in users:
        blocks.unshare_virtual(user)
        assert user.virtual_blocks == []
    assert blocks.num_free_blocks == 4
    check_blocks(blocks)


def test_virtual_blocks_of_several_adapters_stand_in_order_and_end_each_by_itself() -> None:
    blocks = BlockManager(8, SIZE)
    owned = [blocks.take_virtual(count) for count in (SIZE + 1, 1, SIZE)]
    both, last = request([1]), request([2])
    for taken in owned:
        blocks.share_virtual(both, taken or [])
    blocks.share_virtual(last, owned[1] or [])
    assert both.virtual_blocks == [block for taken in owned for block in taken or []]
    assert len(both.virtual_blocks) == 4, "each begins a block"
    for taken in owned:
        blocks.drop_virtual(taken or [])  # the owners leave
    assert blocks.num_used_blocks == 4
    blocks.unshare_virtual(both)
    check_blocks(blocks)
    assert blocks.num_used_blocks == 1, "the other request's"
    blocks.unshare_virtual(last)
    assert blocks.num_free_blocks == 8
    check_blocks(blocks)


def test_virtual_blocks_are_all_or_none() -> None:
    blocks = BlockManager(2, SIZE)
    assert blocks.take_virtual(9) is None
    assert blocks.num_free_blocks == 2
    assert blocks.take_virtual(0) == []
    assert len(blocks.take_virtual(8) or []) == 2


@pytest.mark.parametrize("broken", ["leak", "double free", "lost key"])
def test_check_sees_broken_books(broken: str) -> None:
    blocks = BlockManager(4, SIZE)
    compute(blocks, request(range(8)))
    check_blocks(blocks)
    if broken == "leak":
        blocks._free.pop()
    elif broken == "double free":
        blocks._free.append(blocks._free[0])
    else:
        blocks._block_of.popitem()
    with pytest.raises(AssertionError):
        check_blocks(blocks)


# -- any order -------------------------------------------------------------------------------------------------------

_operations = st.lists(
    st.tuples(
        st.sampled_from(["start", "start", "grow", "release", "release", "purge", "distrust", "take", "drop"]),
        st.integers(0, 7),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(_operations, st.booleans())
def test_blocks_come_back_after_any_sequence(operations: list[tuple[str, int]], caching: bool) -> None:
    """A block holds what its holders wrote into it, until the last of them lets go: checked by a dict of contents."""
    blocks = BlockManager(12, SIZE, enable_prefix_caching=caching)
    alive: list[Request] = []
    virtual: list[list[int]] = []
    written: dict[int, tuple] = {}

    def write(request: Request, start: int) -> None:
        for index in range(start // SIZE, len(request.blocks)):
            beginning = tuple(request.token_ids(0, min((index + 1) * SIZE, request.num_tokens)))
            written[request.blocks[index]] = (request.cache_root, beginning)

    for operation, number in operations:
        if operation == "start":
            digests = [] if number % 3 == 0 else [f"g{number % 3}"]
            new = request([*range(number + 1), *range(number % 2)], root=str(digests).encode(), digests=digests)
            cached = blocks.match(new)
            for index, block in enumerate(new.blocks):
                assert written[block] == (new.cache_root, new.prompt_token_ids[: (index + 1) * SIZE])
            if not blocks.grow(new, new.num_tokens):
                blocks.release(new)
                continue
            write(new, cached)
            new.num_computed_tokens = new.num_tokens
            blocks.commit(new)
            alive.append(new)
        elif operation == "take":
            taken = blocks.take_virtual(number)
            if taken is not None:
                virtual.append(taken)
                for block in taken:
                    written[block] = ("virtual", number)
        elif operation == "drop" and virtual:
            blocks.drop_virtual(virtual.pop(number % len(virtual)))
        elif operation == "purge":
            blocks.purge(AdapterDigest(f"g{number % 3}"))
        elif alive:
            one = alive[number % len(alive)]
            if operation == "grow":
                before = one.num_tokens
                one.output.append(number)
                if blocks.grow(one, one.num_tokens):
                    write(one, before)
                    one.num_computed_tokens = one.num_tokens
                    blocks.commit(one)
                else:
                    one.output.pop()
            elif operation == "distrust":
                blocks.invalidate(one)
            else:
                blocks.release(one)
                alive.remove(one)
        check_blocks(blocks)
        used = {block for one in alive for block in one.blocks} | {block for taken in virtual for block in taken}
        assert blocks.num_used_blocks == len(used)
    for one in alive:
        blocks.release(one)
    for taken in virtual:
        blocks.drop_virtual(taken)
    check_blocks(blocks)
    assert blocks.num_free_blocks == 12
