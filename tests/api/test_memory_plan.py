"""Memory is divided by numbers alone, and every cut is reported."""

from pathlib import Path

import pytest

from weft.api import memory_plan
from weft.api.memory_plan import MemoryPlan
from weft.config import GIB, MIB, EngineConfig, default_store

_KIB = 1024
_LLAMA_8B = {"token_bytes": 128 * _KIB, "model_len": 131072}  # keys and values of a token in bfloat16


def _plan(engine: EngineConfig | None = None, *, free: int = 20 * GIB, device: str = "cpu", **model: int) -> MemoryPlan:
    sizes = _LLAMA_8B | model
    return memory_plan.make(engine or EngineConfig(), device=device, free=free, adapters=1 * GIB, **sizes)


def test_a_small_model_keeps_its_own_limit() -> None:
    plan = _plan(token_bytes=1 * _KIB, model_len=2048)
    assert (plan.max_model_len, plan.fitted) == (2048, "")
    assert plan.num_kv_blocks == 2048 // 16 * 64  # every request of a full batch


def test_a_long_limit_is_fitted_and_the_plan_says_from_what_to_what_and_why() -> None:
    plan = _plan()
    assert plan.max_model_len == GIB // (128 * _KIB) == 8192
    assert "from the model's 131072 to 8192 tokens" in plan.fitted
    assert f"--kv-cache-bytes {16 * GIB} would hold all" in plan.fitted
    assert plan.kv == 1 * GIB
    assert plan.left == 20 * GIB - plan.adapters - plan.kv


def test_on_cuda_adapters_are_set_aside_first() -> None:
    plan = _plan(device="cuda", free=13 * GIB)  # what a card of 24 GB has beside an 8B base in NF4
    assert plan.adapters == 1 * GIB
    assert plan.kv <= 0.8 * 12 * GIB
    assert plan.max_model_len == plan.kv // (128 * _KIB)


def test_a_small_machine_gets_less() -> None:
    plan = _plan(free=2 * GIB)
    assert plan.adapters == 512 * MIB
    assert plan.kv == 768 * MIB
    assert plan.left == 2 * GIB - 512 * MIB - 768 * MIB


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"max_model_len": 131073}, "at most 131072, the model's own limit, given 131073"),
        ({"max_model_len": 9000}, "cannot hold one request of max_model_len 9000; raise kv_cache_bytes to"),
        ({"kv_cache_bytes": 1 * MIB}, "cannot hold one request of max_model_len 131072"),
        ({"num_kv_blocks": 2}, "2 blocks of 16 tokens (num_kv_blocks) cannot hold"),
    ],
)
def test_what_is_asked_for_and_does_not_fit_is_refused(knobs: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011  the text is compared as a whole, with its brackets
        _plan(EngineConfig(**knobs))
    assert said in str(refused.value)


def test_a_pool_that_is_given_decides_the_context() -> None:
    plan = _plan(EngineConfig(kv_cache_bytes=2 * GIB))
    assert (plan.max_model_len, plan.kv) == (16384, 2 * GIB)
    assert "kv_cache_bytes of 2.00 GiB holds" in plan.fitted


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    assert memory_plan._left_in_group(tmp_path) > 1 << 60  # no group, no limit
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("100\n")
    assert memory_plan._left_in_group(tmp_path) > 1 << 60
    (tmp_path / "memory.max").write_text("4096\n")
    assert memory_plan._left_in_group(tmp_path) == 3996


def test_the_store_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert default_store() == tmp_path / "weft" / "adapters_store"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")  # the specification: to be ignored
    assert default_store() == Path.home() / ".local/share/weft/adapters_store"
