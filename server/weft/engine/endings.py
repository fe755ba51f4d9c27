"""The errors with which the engine ends requests."""

from weft.engine.computation import Failed
from weft.engine.request import Request
from weft.errors import AdapterUnusable, Overloaded, Unavailable, WeftError

ENGINE_DOWN = "ENGINE_DOWN"
NON_FINITE = frozenset({"ADAPTER_NON_FINITE", "NON_FINITE"})


def engine_down(why: str) -> Unavailable:
    """Return the error of every request and call, once the engine computes nothing any more."""
    text = f"the engine computes nothing any more: {why}; another replica can answer"
    return Unavailable(ENGINE_DOWN, text, retry_after_s=5.0)


def step_failed(failed: Failed) -> WeftError:
    """Return the error of a request whose step raises, also alone."""
    if failed.is_short_of_memory:
        return _without_room("the device's memory has", "device_memory")
    return WeftError("STEP_FAILED", "the model step failed")


def without_room() -> Overloaded:
    """Return the error of a request that the pools cannot hold beside what they have to keep."""
    return _without_room("the adapter and KV pools have", "adapter_and_kv_pools")


def non_finite(request: Request) -> WeftError:
    """Return the error of a request with logits that are not finite."""
    if request.adapters:
        made_by = "the adapter" if len(request.adapters) == 1 else "the adapters together"
        return AdapterUnusable("ADAPTER_NON_FINITE", f"{made_by} made numbers that are not finite for this request")
    return WeftError("NON_FINITE", "the base made numbers that are not finite for this request")


def _without_room(pools: str, quota: str) -> Overloaded:
    text = f"{pools} no room for this request now"
    return Overloaded("POOL_EXHAUSTED", text, metadata={"quota": quota}, retry_after_s=1.0)
