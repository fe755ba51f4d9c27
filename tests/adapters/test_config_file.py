"""adapter_config.json as data: row 46 of the table of bad inputs."""

import json
import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.adapters.ingest import CONFIG_FILE, read_config
from weft.config import AdapterLimits
from weft.errors import Code, InvalidAdapter

LIMITS = AdapterLimits()
NESTED = b'{"a":' * 17 + b"1" + b"}" * 17

BAD = {
    "empty": (b"", "is not JSON"),
    "blank": (b"  ", "is not JSON"),
    "text": (b"lora", "is not JSON"),
    "truncated": (b'{"r": 8', "does not close"),
    "trailing comma": (b'{"r": 8,}', "is not JSON"),
    "single quotes": (b"{'r': 8}", "is not JSON"),
    "two objects": (b'{"r": 8}{"r": 9}', "is not JSON"),
    "comment": (b'{"r": 8 /* eight */}', "is not JSON"),
    "control character": (b'{"r": "\n"}', "is not JSON"),
    "zero": (b'{"r": 8}\0', "is not JSON"),
    "list": (b'[{"r": 8}]', "is not an object"),
    "number": (b"8", "is not an object"),
    "null": (b"null", "is not an object"),
    "string": (b'"{}"', "is not an object"),
    "nan": (b'{"lora_alpha": NaN}', "holds NaN"),
    "infinity": (b'{"lora_alpha": Infinity}', "holds Infinity"),
    "minus infinity": (b'{"lora_alpha": [-Infinity]}', "holds -Infinity"),
    "overflow": (b'{"lora_alpha": 1e999}', "too large for a double"),
    "negative overflow": (b'{"lora_alpha": -1e999}', "too large for a double"),
    "many digits": (b'{"r": ' + b"9" * 5000 + b"}", "400 digits"),
    "duplicate": (b'{"r": 8, "lora_alpha": 16, "r": 64}', "holds a key twice, given r"),
    "duplicate by escape": (b'{"r": 8, "\\u0072": 64}', "holds a key twice, given r"),
    "duplicate below": (b'{"rank_pattern": {"q_proj": 4, "q_proj": 8}}', "holds a key twice, given q_proj"),
    "duplicate in list": (b'{"a": [{"b": 1, "b": 1}]}', "holds a key twice, given b"),
    "mark of UTF-8": (b"\xef\xbb\xbf{}", "byte order mark"),
    "mark of UTF-16": ('\ufeff{"r": 8}'.encode("utf-16-le"), "byte order mark"),
    "UTF-16": ('{"r": 8}'.encode("utf-16-le"), "is not JSON"),
    "Latin-1": ('{"r": "é"}'.encode("latin-1"), "is not UTF-8"),
    "surrogate bytes": (b'{"r": "\xed\xa0\x80"}', "is not UTF-8"),
    "half a pair": (b'{"r": "\\ud800"}', "half a surrogate pair"),
    "half a pair as key": (b'{"\\udfff": 1}', "half a surrogate pair"),
    "depth 17": (NESTED, "nests deeper than 16"),
    "depth 10000": (b'{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}", "nests deeper than 16"),
    "depth in the open": (b'{"a":' + b"[" * 200_000, "nests deeper than 16"),
    "depth after a quote": (b'{"\\"":' + b"[" * 100_000, "nests deeper than 16"),
    "10 MiB": (b'{"a":"' + b"x" * (10 << 20) + b'"}', "too many bytes (limit 262144), given 10485768"),
    "pickle": (b"\x80\x04}\x94.", "is not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_config_is_refused_quickly(name: str) -> None:
    data, rule = BAD[name]
    started = time.thread_time()
    with pytest.raises(InvalidAdapter) as caught:
        read_config(data, LIMITS)
    assert time.thread_time() - started < 0.2, "50 ms on a quiet machine"
    error = caught.value
    assert (error.code, error.reason, error.field) == (Code.INVALID_ARGUMENT, "CONFIG_INVALID", CONFIG_FILE)
    assert error.message.startswith(f"{CONFIG_FILE}: ")
    assert rule in error.message
    assert len(error.message) < 250


def test_what_peft_writes_is_read_as_it_is() -> None:
    config = {
        "peft_type": "LORA",
        "r": 8,
        "lora_alpha": 16,
        "lora_dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
        "rank_pattern": {"layers.0.q_proj": 4},
        "auto_mapping": None,
        "fan_in_fan_out": False,
        "megatron_core": "megatron.core",
        "note": 'größer 😀 " \\ { [',
    }
    for ascii_only in (True, False):
        assert read_config(json.dumps(config, indent=2, ensure_ascii=ascii_only).encode(), LIMITS) == config
    assert read_config(b" {} \n", LIMITS) == {}


def test_the_size_limit_is_inclusive() -> None:
    limit = LIMITS.config_bytes_max
    assert read_config(b"{" + b" " * (limit - 2) + b"}", LIMITS) == {}
    with pytest.raises(InvalidAdapter, match=f"given {limit + 1}"):
        read_config(b"{" + b" " * (limit - 1) + b"}", LIMITS)


def outcome(data: bytes) -> dict[str, object] | InvalidAdapter:
    try:
        return read_config(data, LIMITS)
    except InvalidAdapter as error:
        return error


def finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(finite(item) for item in value.values())
    if isinstance(value, list):
        return all(finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: st.lists(inner)))
def test_every_json_object_survives_and_nothing_that_is_none(value: object) -> None:
    found = outcome(json.dumps({"key": value}).encode())
    if isinstance(found, InvalidAdapter):
        assert found.reason == "CONFIG_INVALID"
        assert not finite(value) or "deeper" in found.message
    else:
        assert found == {"key": value}
        assert finite(value)


ALMOST_JSON = st.text(alphabet='{}[]",:\\u0d8ae1N-+. \n', max_size=60)


@given(st.binary(max_size=200) | ALMOST_JSON.map(str.encode))
def test_any_bytes_are_an_object_or_refused(data: bytes) -> None:
    found = outcome(data)
    if isinstance(found, InvalidAdapter):
        assert found.reason == "CONFIG_INVALID"
    else:
        assert found == json.loads(data)
        assert finite(found)
