"""Text from tokens: never half a character, never a retracted one, stop strings wherever they begin."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from weft.engine.detokenizer import Detokenizer, Piece


def byte_level() -> Tokenizer:
    """Return a tokenizer of one token per byte, as GPT-2, Llama 3 and Qwen write bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """Return a tokenizer with ▁ for a space and bytes for unknown text, as in Llama 2, Mistral and Gemma."""
    words = ["▁", "a", "b", "▁a", "▁b", "ab", "é", "▁▁"]
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


BYTES, FALLBACK = byte_level(), byte_fallback()
SPECIAL = BYTES.get_vocab()["</s>"]


def ids(text: str) -> list[int]:
    return BYTES.encode(text).ids


def fallback_ids(words: Sequence[str]) -> list[int]:
    return [FALLBACK.get_vocab()[word] for word in words]


def pieces(detokenizer: Detokenizer, tokens: Sequence[int]) -> list[Piece]:
    """Return the pieces up to the one with a stop, or with the flushed rest at the end."""
    given = []
    for token in tokens:
        given.append(detokenizer.add([token]))
        assert given[-1].num_tokens == 1
        if given[-1].stop is not None:
            return given
    return [*given, Piece(detokenizer.flush())]


def text(given: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in given)


# -- characters ------------------------------------------------------------------------------------------------------


def test_a_character_comes_when_its_last_byte_has_come() -> None:
    given = pieces(Detokenizer(BYTES, ()), ids("a€😀"))
    assert [piece.text for piece in given] == ["a", "", "", "€", "", "", "", "😀", ""]


def test_half_a_character_at_the_end_is_told_by_flush() -> None:
    given = pieces(Detokenizer(BYTES, ()), ids("x€")[:-1])
    assert [piece.text for piece in given] == ["x", "", "", "�"]


def test_special_tokens_have_no_text() -> None:
    assert text(pieces(Detokenizer(BYTES, ()), [SPECIAL, *ids("a"), SPECIAL, *ids("€"), SPECIAL])) == "a€"


def test_spaces_between_words_are_kept_and_the_first_is_the_tokenizers_affair() -> None:
    tokens = fallback_ids(["▁a", "▁b", "▁▁", "ab", "é"])
    assert text(pieces(Detokenizer(FALLBACK, ()), tokens)) == FALLBACK.decode(tokens) == "a b  abé"


_tokens = st.one_of(
    st.lists(st.integers(0, SPECIAL), max_size=24),
    st.text("ab é€😀\n", max_size=8).map(ids),
    st.tuples(st.text("aé€😀", min_size=1, max_size=6).map(ids), st.integers(0, 12)).map(
        lambda pair: pair[0][pair[1] :]
    ),
)


@settings(max_examples=300, deadline=None)
@given(_tokens)
def test_the_pieces_are_what_the_tokenizer_decodes_from_all_tokens(tokens: list[int]) -> None:
    assert text(pieces(Detokenizer(BYTES, ()), tokens)) == BYTES.decode(tokens)


@settings(max_examples=200, deadline=None)
@given(st.text("ab é€😀", max_size=10))
def test_so_are_those_of_a_byte_fallback_tokenizer_for_real_text(written: str) -> None:
    known = {"a": ["a"], "b": ["b"], "é": ["é"], " ": ["▁"]}
    bytes_of = {character: [f"<0x{byte:02X}>" for byte in character.encode()] for character in written}
    tokens = fallback_ids([word for character in written for word in known.get(character, bytes_of[character])])
    assert text(pieces(Detokenizer(FALLBACK, ()), tokens)) == FALLBACK.decode(tokens)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, FALLBACK.get_vocab_size() - 1), max_size=16))
def test_bytes_that_are_no_text_fail_nowhere(tokens: list[int]) -> None:
    """A byte-fallback decoder reads a run of bytes again with every byte; tokenizers' DecodeStream raises on this."""
    given = pieces(Detokenizer(FALLBACK, ()), tokens)
    assert len(text(given)) <= 4 * len(tokens)


def test_a_continuation_keeps_the_space_before_its_first_word() -> None:
    prompt, answer = fallback_ids(["▁a", "▁b"]), fallback_ids(["▁a", "b"])
    whole = FALLBACK.decode([*prompt, *answer])
    assert whole == "a b ab"
    assert text(pieces(Detokenizer(FALLBACK, (), continued=prompt), answer)) == " ab"
    assert text(pieces(Detokenizer(FALLBACK, ()), answer)) == "ab"  # a message of a conversation begins a text


@settings(max_examples=200, deadline=None)
@given(st.text("ab é€😀", max_size=12), st.text("ab é€😀", max_size=12))
def test_a_continuation_is_the_whole_without_its_prompt(before: str, after: str) -> None:
    prompt, answer = ids(before), ids(after)
    assert text(pieces(Detokenizer(BYTES, (), continued=prompt), answer)) == after


def test_half_a_character_of_the_prompt_is_left_out() -> None:
    assert text(pieces(Detokenizer(BYTES, (), continued=ids("x€")[:-1]), ids("ab"))) == "ab"


class Counted:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.num_decoded = 0

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool) -> str:
        self.num_decoded += len(tokens)
        return self._tokenizer.decode(list(tokens), skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte level", "byte fallback"])
def test_bytes_that_are_no_text_come_after_a_few_tokens_and_cost_linear_work(tokenizer: Tokenizer) -> None:
    lone = tokenizer.get_vocab()["<0x80>"] if tokenizer is FALLBACK else BYTES.get_vocab()["Ģ"]  # a byte 0x80
    decoded = []
    for count in (500, 4000):
        counted: Any = Counted(tokenizer)
        detokenizer = Detokenizer(counted, ())
        given = [detokenizer.add([lone]).text for _ in range(count)]
        assert set("".join(given)) == {"�"}
        assert "".join(given[:12])  # not only at the end
        assert len("".join(given) + detokenizer.flush()) == count
        decoded.append(counted.num_decoded)
    assert decoded[1] < 9 * decoded[0]


def test_a_character_after_bytes_that_are_no_text_is_whole() -> None:
    lone = BYTES.get_vocab()["Ģ"]
    for count in range(30):
        tokens = [lone] * count + ids("€é😀")
        assert text(pieces(Detokenizer(BYTES, ()), tokens)) == "�" * count + "€é😀"


def test_special_tokens_without_text_do_not_pile_up() -> None:
    counted: Any = Counted(BYTES)
    detokenizer = Detokenizer(counted, ())
    for _ in range(2000):
        assert detokenizer.add([SPECIAL]).text == ""
    assert detokenizer.add(ids("a")).text == "a"
    assert counted.num_decoded < 2000 * 40


# -- stop strings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stops", "answer", "wanted", "stop"),
    [
        (["END"], "some text END more", "some text ", "END"),
        (["END"], "no stop here EN", "no stop here EN", None),
        (["END"], "EENDX", "E", "END"),
        (["aab"], "aaaab", "aa", "aab"),
        (["\n\n"], "a\nb\n\nc", "a\nb", "\n\n"),
        (["b", "abc"], "xabc", "xa", "b"),
        (["bc", "abc"], "xabc", "x", "abc"),
        (["abc", "ab"], "xabc", "x", "ab"),
        (["€"], "ab€c", "ab", "€"),
        (["x"], "", "", None),
        ([], "anything", "anything", None),
    ],
)
def test_the_text_before_the_first_stop(stops: list[str], answer: str, wanted: str, stop: str | None) -> None:
    given = pieces(Detokenizer(BYTES, stops), ids(answer))
    assert (text(given), given[-1].stop) == (wanted, stop)
    including = pieces(Detokenizer(BYTES, stops, include_stop=True), ids(answer))
    assert (text(including), including[-1].stop) == (wanted + (stop or ""), stop)


def test_what_may_become_a_stop_is_held_and_let_go() -> None:
    detokenizer = Detokenizer(BYTES, ["abc"])
    given = [detokenizer.add([token]).text for token in ids("xababd")]
    assert given == ["x", "", "", "ab", "", "abd"]


def test_stops_do_not_count_in_the_first_tokens() -> None:
    detokenizer = Detokenizer(BYTES, ["b"], min_new_tokens=3)
    given = pieces(detokenizer, ids("abcbd"))
    assert (text(given), given[-1].stop) == ("abc", "b")


def test_a_stop_that_begins_in_the_first_tokens_does_not_count_either() -> None:
    given = pieces(Detokenizer(BYTES, ["bc"], min_new_tokens=2), ids("abcbc"))
    assert (text(given), given[-1].stop) == ("abc", "bc")


_stops = st.lists(st.text("ab€", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(max_examples=400, deadline=None)
@given(_stops, st.text("ab€", max_size=16), st.integers(0, 6), st.booleans())
def test_stops_against_a_search_in_the_whole_text(
    stops: list[str], answer: str, min_new_tokens: int, include_stop: bool
) -> None:
    """Whenever a character is complete, look for any stop in all text since the first tokens."""
    tokens = ids(answer)
    wanted, stop = answer, None
    uncounted = len(BYTES.decode(tokens[:min_new_tokens]).rstrip("�"))
    for length in range(uncounted, len(answer) + 1):
        found = [(answer.find(s, uncounted, length), len(s), s) for s in stops if s in answer[uncounted:length]]
        if found:
            start, size, stop = min(found)
            wanted = answer[: start + size] if include_stop else answer[:start]
            break
    detokenizer = Detokenizer(BYTES, stops, include_stop=include_stop, min_new_tokens=min_new_tokens)
    given = pieces(detokenizer, tokens)
    assert (text(given), given[-1].stop) == (wanted, stop)
    for index in range(len(given)):
        assert wanted.startswith(text(given[:index])), "what was given is never taken back"


# -- several tokens at once --------------------------------------------------------------------------------------------


_cuts = st.lists(st.integers(1, 5), max_size=20)


@settings(max_examples=400, deadline=None)
@given(_stops | st.just([]), st.text("ab€", max_size=16), _cuts, st.integers(0, 6))
def test_tokens_that_come_together_make_the_text_of_tokens_that_come_alone(
    stops: list[str], answer: str, cuts: list[int], min_new_tokens: int
) -> None:
    """The text after every part, the stop, and the number of tokens up to it are the same."""
    tokens = ids(answer)
    alone = Detokenizer(BYTES, stops, min_new_tokens=min_new_tokens)
    together = Detokenizer(BYTES, stops, min_new_tokens=min_new_tokens)
    begin, wanted, got = 0, "", ""
    for size in [*cuts, len(tokens)]:
        part = tokens[begin : begin + size]
        begin += size
        piece = together.add(part)
        got += piece.text
        for number, token in enumerate(part, start=1):
            one = alone.add([token])
            wanted += one.text
            if one.stop is not None:
                assert (piece.stop, piece.num_tokens) == (one.stop, number)
                assert got == wanted
                return
        assert got == wanted
        assert (piece.stop, piece.num_tokens) == (None, len(part))
    assert got + together.flush() == wanted + alone.flush()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, SPECIAL), max_size=24), _cuts)
def test_so_do_bytes_that_are_no_text(tokens: list[int], cuts: list[int]) -> None:
    detokenizer, begin, given = Detokenizer(BYTES, ()), 0, ""
    for size in [*cuts, len(tokens)]:
        given += detokenizer.add(tokens[begin : begin + size]).text
        begin += size
    assert given + detokenizer.flush() == BYTES.decode(tokens)
