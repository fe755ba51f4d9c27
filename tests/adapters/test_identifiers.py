"""Adapter ids: rows 1 to 8 of the table of bad inputs, and that nothing else gets through."""

import re
import string
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from weft.adapters.identifiers import (
    ADAPTER_ID_CHARACTERS_MAX,
    ADAPTER_ID_PATTERN,
    AdapterReference,
    check_adapter_id,
    check_digest,
    parse_reference,
)
from weft.errors import Code, InvalidRequest

GENERATION = "0123456789abcdef" * 4
EMPTY = ["", " ", "\t", "\n", "\v", " \r\n\t ", "\u00a0", "\u3000"]
FORBIDDEN = [
    *[".", "..", "../x", "a/../b", "a/b", "a/", "/", "a.b", "a..b"],
    *["/etc/passwd", "C:\\weights", "c:", "\\\\host\\share", "a\\b"],
    *["a\0b", "a\rb", "a\nb", "a\n", "\na", "\x1b[31mred", "a b", " a", "a "],
    *["%2e%2e%2f", "a%2fb", "%61"],
    *["аdapter", "é", unicodedata.normalize("NFD", "é"), "a\u202eb", "a\u200bb", "ﬁne", "a\ud800", "٣"],
    *["A", "Support", "BASE", "Default"],
    *["-a", "a-", "_a", "a_", "-", "_"],
    *["a@b", "a:b", "a*", "~", "$(x)", "{{x}}", "<b>"],
]


def refusal(value: str, base_model: str = "") -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check_adapter_id(value, base_model=base_model)
    error = caught.value
    assert error.code is Code.INVALID_ARGUMENT
    assert error.field == error.metadata["field"] == "adapter_id"
    assert error.message.startswith("adapter_id: ")
    assert error.message.isprintable(), "a control character would write its own log line"
    assert error.message.isascii() or "…" in error.message
    assert len(error.message) < 250
    return error


@pytest.mark.parametrize("value", EMPTY)
def test_an_empty_id_is_told_so(value: str) -> None:
    error = refusal(value)
    assert (error.reason, error.message) == ("ID_INVALID", "adapter_id: must not be empty")


@pytest.mark.parametrize("value", FORBIDDEN)
def test_a_forbidden_character_or_place_names_the_pattern(value: str) -> None:
    error = refusal(value)
    assert error.reason == "ID_INVALID"
    assert ADAPTER_ID_PATTERN in error.message
    assert "given" in error.metadata


@pytest.mark.parametrize("length", [64, 65, 1 << 20])
@pytest.mark.parametrize("character", ["a", "/", "é"])
def test_a_long_id_names_the_limit(length: int, character: str) -> None:
    error = refusal(character * length)
    assert error.reason == "ID_INVALID"
    assert f"(limit 63), given {length}" in error.message
    assert error.metadata == {"limit": "63", "given": str(length), "field": "adapter_id"}


@pytest.mark.parametrize(
    ("value", "base_model"),
    [
        ("base", ""),
        ("default", ""),
        ("weft-tiny", "weft-tiny"),
        ("weft-tiny", "Weft-Tiny"),
        ("llama-3", "meta/Llama-3"),
        ("meta/Llama-3", "meta/Llama-3"),
        ("Llama-3", "meta/Llama-3"),
    ],
)
def test_the_base_models_names_are_reserved(value: str, base_model: str) -> None:
    error = refusal(value, base_model)
    assert error.reason == "ID_RESERVED"
    assert value in error.message


@pytest.mark.parametrize("value", ["a", "0", "a-b", "a_b", "a--b", "support-bot-2", "base1", "x" * 63])
def test_good_ids_are_unchanged(value: str) -> None:
    assert check_adapter_id(value, base_model="weft-tiny") == value


@given(st.text(alphabet=st.one_of(st.characters(), st.sampled_from(string.printable)), max_size=80))
@example("a" * 63)
@example("a" * 64)
def test_only_the_alphabet_passes(value: str) -> None:
    try:
        checked = check_adapter_id(value)
    except InvalidRequest as error:
        checked = error
    if isinstance(checked, InvalidRequest):
        assert checked.reason in {"ID_INVALID", "ID_RESERVED"}
        assert checked.message.isprintable()
        return
    assert checked == value
    assert set(value) <= set(string.ascii_lowercase + string.digits + "_-")
    assert 1 <= len(value) <= ADAPTER_ID_CHARACTERS_MAX
    assert value[0] not in "_-"
    assert value[-1] not in "_-"
    assert value not in {"base", "default"}


@given(st.from_regex(re.compile(r"\A[a-z0-9]([a-z0-9_-]{0,61}[a-z0-9])?\Z"), fullmatch=True))
def test_every_id_of_the_pattern_passes_alone_and_with_a_digest(value: str) -> None:
    if value in {"base", "default"}:
        return
    assert check_adapter_id(value) == value
    assert parse_reference(value) == AdapterReference(check_adapter_id(value), None)
    reference = parse_reference(f"{value}@{GENERATION}")
    assert reference == (value, GENERATION)
    assert parse_reference(str(reference)) == reference


@pytest.mark.parametrize(
    "digest",
    [
        *["", GENERATION[:12], GENERATION + "0", GENERATION.upper(), "g" * 64, "sha256:" + GENERATION],
        *[GENERATION + "\n", "../" + GENERATION[3:], "@" + GENERATION, "x" * (1 << 20)],
    ],
)
def test_a_digest_is_64_lower_case_hex_digits(digest: str) -> None:
    for call in (lambda: check_digest(digest), lambda: parse_reference(f"a@{digest}")):
        with pytest.raises(InvalidRequest, match="64 lower-case hex digits") as caught:
            call()
        assert caught.value.reason == "ID_INVALID"
        assert len(caught.value.message) < 250


@pytest.mark.parametrize("value", ["@", f"@{GENERATION}", f"A@{GENERATION}", f"base@{GENERATION}", "a/b@"])
def test_both_parts_of_a_reference_are_checked(value: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_reference(value)
    assert caught.value.reason in {"ID_INVALID", "ID_RESERVED"}


def test_the_field_is_the_callers() -> None:
    with pytest.raises(InvalidRequest, match=r"^composition\[1\]: must match") as caught:
        check_adapter_id("A", field="composition[1]")
    assert caught.value.field == "composition[1]"
