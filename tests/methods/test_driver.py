"""The reference driver against the textbook: one row at a time, one adapter at a time, in float64."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from weft.methods import bitfit, ia3, lora
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.protocol import Method, Site

I, O = 6, 5  # noqa: E741  # the shape legend of methods/protocol.py
SITE = Site(0, "layers.0.proj", I, O)
OTHER = Site(1, "layers.0.other", I, O)


class Base(NamedTuple):
    """A linear layer with a bias, in place of the frozen base."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


BASE = Base(random(O, I, seed=1), random(O, seed=2))


def lora_params(seed: int, rank: int) -> lora.math.LoraParams:
    return lora.math.LoraParams(random(rank, I, seed=seed), random(O, rank, seed=seed + 50), 0.5 + seed % 3)


def ia3_params(seed: int, *, feedforward: bool) -> ia3.math.Ia3Params:
    return ia3.math.Ia3Params(1 + random(I if feedforward else O, seed=seed), feedforward)


ADAPTERS: dict[str, tuple[Method, Any]] = {
    "lora-bias": (lora.METHOD, lora_params(8, 2)._replace(bias=random(O, seed=60))),
    "bitfit": (bitfit.METHOD, bitfit.math.BitfitParams(random(O, seed=61))),
    "lora-r1": (lora.METHOD, lora_params(3, 1)),
    "lora-r4": (lora.METHOD, lora_params(4, 4)),
    "ia3-output": (ia3.METHOD, ia3_params(5, feedforward=False)),
    "ia3-input": (ia3.METHOD, ia3_params(6, feedforward=True)),
    "ia3-input-2": (ia3.METHOD, ia3_params(7, feedforward=True)),
}


def textbook_row(x: Tensor, uses: Sequence[tuple[str, float]]) -> Tensor:
    """x' = x + Σ gate · pre(x);  out = y + Σ gate · post(x, y),  y = W₀x' + b; written out per method."""
    x_prime = x.clone()
    for name, gate in uses:
        params = ADAPTERS[name][1]
        if isinstance(params, ia3.math.Ia3Params) and params.is_feedforward:
            x_prime = x_prime + gate * (params.scale * x - x)
    y = BASE.weight @ x_prime + BASE.bias
    out = y.clone()
    for name, gate in uses:
        params = ADAPTERS[name][1]
        if isinstance(params, lora.math.LoraParams):
            out = out + gate * params.scaling * (
                params.b @ (params.a @ x) + (0 if params.bias is None else params.bias)
            )
        elif isinstance(params, bitfit.math.BitfitParams):
            out = out + gate * params.bias
        elif not params.is_feedforward:
            out = out + gate * (params.scale * y - y)
    return out


def segment(name: str, rows: Sequence[int] | None, gates: Sequence[float] | None, site: str = SITE.name) -> Segment:
    method, params = ADAPTERS[name]
    return Segment(
        method,
        {site: params},
        None if rows is None else torch.tensor(rows, dtype=torch.int64),
        None if gates is None else torch.tensor(gates, dtype=torch.float32),
    )


_uses = st.lists(
    st.dictionaries(st.sampled_from(sorted(ADAPTERS)), st.sampled_from([1.0, 0.5, 0.0, -2.0, 0.25]), max_size=4),
    min_size=1,
    max_size=7,
)


@settings(max_examples=150, deadline=None)
@given(uses_of_row=_uses, order=st.permutations(sorted(ADAPTERS)))
def test_any_mix_of_methods_and_gates_is_the_textbook_loop(
    uses_of_row: list[dict[str, float]], order: list[str]
) -> None:
    x = random(len(uses_of_row), I, seed=9)
    segments = []
    for name in order:
        rows = [row for row, uses in enumerate(uses_of_row) if name in uses]
        if rows:
            segments.append(segment(name, rows, [uses_of_row[row][name] for row in rows]))
    before = x.clone()
    got = ReferenceDriver(segments).apply(SITE, BASE, x)
    wanted = torch.stack([textbook_row(x[row], list(uses.items())) for row, uses in enumerate(uses_of_row)])
    assert (got - wanted).abs().max() < 1e-12
    assert torch.equal(x, before), "the input is not written"


def test_rows_of_a_segment_may_come_in_any_order() -> None:
    x, rows, gates = random(5, I, seed=9), [3, 0, 4], [0.5, 1.0, 2.0]
    shuffled = ReferenceDriver([segment("lora-r4", rows, gates)]).apply(SITE, BASE, x)
    in_order = ReferenceDriver([segment("lora-r4", sorted(rows), [1.0, 0.5, 2.0])]).apply(SITE, BASE, x)
    torch.testing.assert_close(shuffled, in_order, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_no_rows_means_all_rows_and_no_gates_means_one(name: str) -> None:
    x = random(2, 3, I, seed=9)
    all_rows, ones = list(range(6)), [1.0] * 6
    wanted = torch.stack([textbook_row(row, [(name, 1.0)]) for row in x.reshape(-1, I)]).view(2, 3, O)
    for rows, gates in [(None, None), (all_rows, None), (None, ones), (all_rows, ones)]:
        got = ReferenceDriver([segment(name, rows, gates)]).apply(SITE, BASE, x)
        torch.testing.assert_close(got, wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_gate_zero_is_the_base_and_a_gate_scales_the_delta(name: str) -> None:
    x = random(4, I, seed=9)
    base = BASE(x)

    def delta(gate: float) -> Tensor:
        return ReferenceDriver([segment(name, None, [gate] * 4)]).apply(SITE, BASE, x) - base

    assert delta(0.0).abs().max() < 1e-12
    torch.testing.assert_close(delta(0.5) * 2, delta(1.0), atol=1e-12, rtol=0)
    assert delta(1.0).abs().max() > 0.1


def test_rows_without_an_adapter_are_the_base_to_the_bit() -> None:
    x = random(5, I, seed=9)
    got = ReferenceDriver([segment("lora-r4", [1], None), segment("ia3-input", [3], None)]).apply(SITE, BASE, x)
    others = [0, 2, 4]
    assert torch.equal(got[others], BASE(x)[others])


def test_a_site_that_no_segment_touches_is_the_base_itself() -> None:
    x = random(5, I, seed=9)
    y = BASE(x)
    driver = ReferenceDriver([segment("lora-r4", None, None, site=OTHER.name)])
    assert driver.apply(SITE, lambda _: y, x) is y
    assert ReferenceDriver([]).apply(SITE, lambda _: y, x) is y


def _spy(seen: list[tuple[Tensor, Tensor | None]]) -> Method:
    def pre(params: Tensor, x: Tensor) -> Tensor:
        seen.append((x.clone(), None))
        return params.expand_as(x)

    def post(params: Tensor, x: Tensor, y: Tensor) -> Tensor:
        seen.append((x.clone(), y.clone()))
        return params.sum().expand_as(y)

    return Method(name="spy", pre=pre, post=post)


def test_every_delta_sees_the_input_and_the_base_output_never_another_delta() -> None:
    """Also a last delta, on rows that several adapters share."""
    x = random(4, I, seed=9)
    seen: list[tuple[Tensor, Tensor | None]] = []
    method = _spy(seen)
    segments = [
        Segment(method, {SITE.name: random(I, seed=20)}, torch.tensor([0, 1, 2]), torch.tensor([1.0, 0.5, 2.0])),
        Segment(method, {SITE.name: random(I, seed=21)}, torch.tensor([2, 1]), None),
        Segment(method, {SITE.name: random(I, seed=22)}, None, None),
    ]
    calls: list[Tensor] = []

    def base(x_prime: Tensor) -> Tensor:
        calls.append(x_prime.clone())
        return BASE(x_prime)

    ReferenceDriver(segments).apply(SITE, base, x)
    assert len(calls) == 1, "one product with the base weight serves all"
    y = BASE(calls[0])
    assert len(seen) == 6
    for index, rows in enumerate([[0, 1, 2], [2, 1], [0, 1, 2, 3]]):
        assert torch.equal(seen[index][0], x[rows]), "before any pre"
        assert torch.equal(seen[3 + index][0], x[rows])
        seen_y = seen[3 + index][1]
        assert seen_y is not None
        assert torch.equal(seen_y, y[rows])
    total = x.clone()
    for one, (rows, gates) in zip(
        segments, [([0, 1, 2], [1, 0.5, 2]), ([2, 1], [1, 1]), (range(4), [1] * 4)], strict=True
    ):
        for row, gate in zip(rows, gates, strict=True):
            total[row] += gate * one.params[SITE.name]
    torch.testing.assert_close(calls[0], total, atol=1e-12, rtol=0)


def test_the_order_of_segments_does_not_matter() -> None:
    x = random(3, I, seed=9)
    segments = [segment(name, None, [0.5, 1.0, -1.0]) for name in sorted(ADAPTERS)]
    forward = ReferenceDriver(segments).apply(SITE, BASE, x)
    backward = ReferenceDriver(segments[::-1]).apply(SITE, BASE, x)
    torch.testing.assert_close(forward, backward, atol=1e-12, rtol=0)


# -- training goes through the same lines ----------------------------------------------------------------------------


def _through_driver(rows: Tensor | None, gates: Tensor | None) -> Callable[..., Tensor]:
    def out(x: Tensor, a: Tensor, b: Tensor, scale_in: Tensor, scale_out: Tensor) -> Tensor:
        segments = [
            Segment(lora.METHOD, {SITE.name: lora.math.LoraParams(a, b, 2.0)}, rows, gates),
            Segment(ia3.METHOD, {SITE.name: ia3.math.Ia3Params(scale_in, True)}, rows, gates),
            Segment(ia3.METHOD, {SITE.name: ia3.math.Ia3Params(scale_out, False)}, rows, gates),
        ]
        return ReferenceDriver(segments).apply(SITE, BASE, x)

    return out


@pytest.mark.parametrize(
    ("rows", "gates"),
    [
        (None, None),
        (torch.tensor([2, 0]), None),
        (torch.tensor([0, 1]), torch.tensor([0.5, -1.0], dtype=torch.float64)),
    ],
    ids=["all", "rows", "gated rows"],
)
def test_gradients_of_every_method_and_of_the_input(rows: Tensor | None, gates: Tensor | None) -> None:
    inputs = (
        random(3, I, seed=30),
        random(2, I, seed=31),
        random(O, 2, seed=32),
        random(I, seed=33),
        random(O, seed=34),
    )
    for tensor in inputs:
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(_through_driver(rows, gates), inputs)


def test_a_gate_has_a_gradient_where_a_router_learns_it() -> None:
    x = random(3, I, seed=30)
    method, params = ADAPTERS["lora-r4"]

    def out(gates: Tensor) -> Tensor:
        return ReferenceDriver([Segment(method, {SITE.name: params}, None, gates)]).apply(SITE, BASE, x)

    assert torch.autograd.gradcheck(out, (random(3, seed=35).requires_grad_(),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_keep_their_dtype_under_float32_adapters(dtype: torch.dtype) -> None:
    x, base = random(3, I, seed=9).to(dtype), Base(BASE.weight.to(dtype), BASE.bias.to(dtype))
    for name in sorted(ADAPTERS):
        method, params = ADAPTERS[name]
        as_float = type(params)(*[field.float() if isinstance(field, Tensor) else field for field in params])
        one = Segment(method, {SITE.name: as_float}, torch.tensor([0, 2]), torch.tensor([0.5, 1.0]))
        got = ReferenceDriver([one]).apply(SITE, base, x)
        assert got.dtype is dtype
        wanted = torch.stack(
            [textbook_row(x[r].double(), [(name, g)] if g else []) for r, g in [(0, 0.5), (1, 0), (2, 1.0)]]
        )
        torch.testing.assert_close(got.double(), wanted, atol=0.15, rtol=0.05)
