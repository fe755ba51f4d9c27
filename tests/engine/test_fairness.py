"""Shares of the server: of tenants, and within a tenant of adapters. Tables of events, as in test_scheduler.py."""

from collections import Counter

import pytest

from tests.engine.test_scheduler import Table
from weft.adapters.identifiers import AdapterDigest
from weft.config import TenantLimits
from weft.engine.fair_queue import FairQueue
from weft.engine.request import AdapterUse, Request, RequestId, SamplingParams

A, B = (AdapterUse(AdapterDigest(letter * 64), 1.0, 0) for letter in "ab")


def _request(name: str, **fields: object) -> Request:
    params = SamplingParams()
    return Request(request_id=RequestId(name), prompt_token_ids=(1,), params=params, **fields)  # pyright: ignore


def _served(table: Table, num_steps: int) -> Counter[str]:
    """Return the steps that each tenant's requests took part in."""
    return Counter(name.partition("-")[0] for _ in range(num_steps) for name in table.step())


class Crowd(Table):
    """A table whose requests end after some tokens, and are replaced by their tenant's next ones."""

    def __init__(self, num_tokens: int, **sizes: int) -> None:
        super().__init__(**sizes)
        self.requests: list[Request] = []
        self._num_tokens = num_tokens

    def crowd(self, tenant: str, count: int, **fields: object) -> None:
        for _ in range(count):
            name = f"{tenant}-{len(self.requests)}"
            self.requests.append(self.add(name, 2, tenant=tenant, **fields))

    def step(self) -> dict[str, int]:
        step = super().step()
        for request in list(self.scheduler.running):
            if len(request.output) >= self._num_tokens:
                self.end(request)
                self.crowd(request.tenant, 1, weight=request.weight, adapters=request.adapters)
        return step


def test_a_tenant_of_one_request_is_not_behind_one_of_many() -> None:
    """Every place of the batch is taken by a crowd, and 300 more wait; the other tenant starts with the next step."""
    table = Crowd(50, max_num_seqs=4)
    table.crowd("many", 300)
    table.step()
    one = table.add("one", 3, tenant="one")
    assert "one" in table.step()
    assert "one" in table.step(), "and goes on"
    assert len(one.output) == 2


def test_tenants_get_equal_parts_whatever_they_queue() -> None:
    table = Crowd(8, max_num_seqs=4)
    table.crowd("many", 100)
    table.crowd("few", 4)
    served = _served(table, 400)
    assert served["few"] / served.total() == pytest.approx(0.5, abs=0.05)


def test_parts_grow_with_weights() -> None:
    table = Crowd(8, max_num_seqs=8)
    table.crowd("heavy", 50, weight=3.0)
    table.crowd("light", 50)
    served = _served(table, 400)
    assert served["heavy"] / served.total() == pytest.approx(0.75, abs=0.06)


def test_adapters_of_a_tenant_share_its_part() -> None:
    table = Crowd(8, max_num_seqs=4)
    table.crowd("t", 100, adapters=(A,))
    table.crowd("t", 4, adapters=(B,))
    of = {}
    steps = Counter[str]()
    for _ in range(400):
        of |= {request.request_id: request.adapters[0].digest[0] for request in table.requests}
        steps.update(of[RequestId(name)] for name in table.step())
    assert steps["b"] / steps.total() == pytest.approx(0.5, abs=0.05)


def test_a_pause_earns_nothing() -> None:
    """A tenant that was away while another was served 1,000 tokens does not get the next 1,000 alone."""
    queue = FairQueue()
    busy, back = _request("busy", tenant="busy"), _request("back", tenant="back")
    queue.enter(busy)
    queue.charge(busy, 1000)
    queue.enter(back)
    queue.charge(back, 1)
    assert [queue.pop().request_id for _ in range(2)] == ["busy", "back"]


def test_what_is_idle_is_forgotten() -> None:
    queue = FairQueue()
    stays = _request("stays", tenant="stays")
    queue.enter(stays)
    for number in range(5000):
        one = _request(str(number), tenant=f"tenant-{number}")
        queue.enter(one)
        queue.leave(one, is_waiting=True)
    assert len(queue._tenants.served) < 1100
    queue.leave(stays, is_waiting=True)
    assert not queue._tenants.served
    assert not queue._shares.served
    assert not queue._number


def test_a_single_share_is_served_in_order_of_arrival_and_never_preempted_for_fairness() -> None:
    table = Table(max_num_seqs=2)
    for name in "abcd":
        table.add(name, 3)
    for _ in range(5):
        assert list(table.step()) == ["a", "b"]
    assert table.waiting == "c d"
    assert table.scheduler.num_preemptions == 0


def test_no_place_is_made_for_what_cannot_start() -> None:
    """A request whose adapter is on its way takes nobody's place."""
    table = Table(max_num_seqs=2)
    table.add("a", 3)
    table.add("b", 3)
    table.step()
    table.add("loads", 3, tenant="other")
    table.absent.add("loads")
    assert list(table.step()) == ["a", "b"]
    table.absent.clear()
    assert list(table.step()) == ["a", "loads"]
    assert table.waiting == "b"


def test_weights_are_those_of_the_configuration() -> None:
    limits = TenantLimits(weights=("heavy=3", "light=0.5"))
    assert [limits.weight_of(tenant) for tenant in ("heavy", "light", "", "other")] == [3.0, 0.5, 1.0, 1.0]
    for wrong in ("heavy", "heavy=0", "heavy=0.0", "=2", "a=-1", "a=1e9", "A=1"):
        with pytest.raises(ValueError, match="must be TENANT=WEIGHT"):
            TenantLimits(weights=(wrong,))
