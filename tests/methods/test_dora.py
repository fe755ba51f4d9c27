"""DoRA against its formula, in float64, and the part of it that is constant to the gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from weft.methods import base_weight, dora
from weft.methods.base_weight import ReadModule
from weft.methods.dora.math import DoraConfig, DoraParams
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.protocol import BaseShape, BaseWeight, DeltaKind, Site

I, O, R = 6, 5, 2  # noqa: E741  # the shape legend of methods/protocol.py


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def module(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> nn.Linear:
    made = nn.Linear(I, O, bias=bias, dtype=dtype)
    made.weight.data = random(O, I, seed=1).to(dtype)
    if bias:
        made.bias.data = random(O, seed=2).to(dtype)
    return made.requires_grad_(False)


def params_at(base: nn.Linear, *, scaling: float = 1.5) -> DoraParams:
    return DoraParams(random(R, I, seed=3), random(O, R, seed=4), random(O, seed=5), scaling, ReadModule(base))


def textbook(params: DoraParams, base: nn.Linear, x: Tensor) -> Tensor:
    """m ⊙ (W₀ + s·B A) x / ‖W₀ + s·B A‖ + bias, written out."""
    merged = base.weight + params.scaling * params.b @ params.a
    direction = merged / merged.norm(dim=1, keepdim=True)
    out = x @ (params.magnitude[:, None] * direction).mT
    return out if base.bias is None else out + base.bias


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_delta_is_the_formula(has_bias: bool) -> None:
    base = module(bias=has_bias)
    params, x = params_at(base), random(2, 3, I, seed=6)
    out = base(x) + dora.math.delta(params, x, base(x))
    torch.testing.assert_close(out, textbook(params, base, x), atol=1e-12, rtol=0)
    assert (out - base(x)).abs().max() > 0.1


@pytest.mark.parametrize("has_bias", [True, False])
def test_what_is_packed_is_what_is_trained(has_bias: bool) -> None:
    base = module(bias=has_bias)
    params, x = params_at(base), random(4, I, seed=6)
    packed = dora.math.pack(params, torch.float32)
    kinds = [DeltaKind.LORA, DeltaKind.SCALE_OUTPUT, *([DeltaKind.BIAS] if has_bias else [])]
    assert [table_row.kind for table_row in packed] == kinds
    y = base(x).float()
    served = dora.math.delta(dora.math.unpack(packed), x.float(), y)
    torch.testing.assert_close(served, dora.math.delta(params, x.float(), y), atol=1e-5, rtol=0)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_it_starts_at_zero(use_rslora: bool) -> None:
    base = module(dtype=torch.float32)
    site = Site(0, "layers.0.proj", I, O, read_base=ReadModule(base))
    config = DoraConfig(rank=3, alpha=12.0, use_rslora=use_rslora)
    params = dora.math.init(config, site, torch.Generator().manual_seed(1))
    x = random(4, I, seed=6).float()
    assert not dora.math.delta(params, x, base(x)).any()
    assert dora.math.is_identity(params)
    assert not dora.math.is_identity(params._replace(magnitude=params.magnitude * 1.02))
    moved = params._replace(b=torch.ones_like(params.b))
    assert dora.math.delta(moved, x, base(x)).abs().max() > 0.1


def test_a_site_that_is_only_described_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layers.0.proj: DoRA needs the base's weight"):
        dora.math.init(DoraConfig(), Site(0, "layers.0.proj", I, O))


def test_the_lengths_are_a_constant_to_the_gradient() -> None:
    """As the paper's section 4.3 has it: the derivative of the formula with its divisor held still."""
    base, x = module(), random(3, I, seed=6)
    held = params_at(base)
    lengths = (base.weight + held.scaling * held.b @ held.a).norm(dim=1)

    def with_constant(a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        merged = base.weight + held.scaling * b @ a
        return x @ (magnitude[:, None] * merged / lengths[:, None]).mT + base.bias

    def ours(a: Tensor, b: Tensor, magnitude: Tensor) -> Tensor:
        segment = Segment(dora.METHOD, {"s": held._replace(a=a, b=b, magnitude=magnitude)})
        return ReferenceDriver([segment]).apply(Site(0, "s", I, O), base, x)

    inputs = [tensor.clone().requires_grad_() for tensor in held[:3]]
    weights = random(3, O, seed=7)
    got = torch.autograd.grad((ours(*inputs) * weights).sum(), inputs)
    wanted = torch.autograd.grad((with_constant(*inputs) * weights).sum(), inputs)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    # The control: with a variable divisor, the gradient differs.
    full = torch.autograd.grad((textbook(DoraParams(*inputs, *held[3:]), base, x) * weights).sum(), inputs)
    assert (full[0] - got[0]).abs().max() > 1e-3


def test_a_row_of_zeros_stays_and_has_a_finite_gradient() -> None:
    base = module()
    base.weight.data[1] = 0
    held = params_at(base)
    held.b[1] = 0
    a = held.a.clone().requires_grad_()
    magnitude = held.magnitude.clone().requires_grad_()
    x = random(4, I, seed=6)
    out = dora.math.delta(held._replace(a=a, magnitude=magnitude), x, base(x))
    assert not out[:, 1].any()
    grads = torch.autograd.grad(out.square().sum(), (a, magnitude))
    assert all(grad.isfinite().all() for grad in grads)


def test_lengths_do_not_depend_on_the_blocks_they_are_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    base = nn.Linear(32, 640, bias=False, dtype=torch.float32).requires_grad_(False)
    site = Site(0, "s", 32, 640, read_base=ReadModule(base))
    whole = dora.math.init(DoraConfig(rank=2), site).magnitude
    monkeypatch.setattr(base_weight, "_BLOCK_ELEMENTS", 1)
    sizes: list[int] = []

    def count(held: BaseWeight) -> None:
        sizes.extend(len(block) for block in held.blocks(torch.float32))

    assert site.read_base is not None
    site.read_base(count)
    assert sizes == [64] * 10
    torch.testing.assert_close(dora.math.init(DoraConfig(rank=2), site).magnitude, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(whole, base.weight.norm(dim=1), atol=1e-6, rtol=0)


def test_the_base_is_read_where_the_shape_says() -> None:
    """BaseShape.read_through: every function of the base's weight runs inside the given one."""
    site = Site(0, "s", I, O, read_base=ReadModule(module()))
    shape = BaseShape(
        sites={"s": site, "t": Site(1, "t", I, O)},
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        embedding_size=1,
        digest="",
        name="",
    )
    ran: list[str] = []

    def run(function: Callable[[], Any]) -> Any:  # as Inbox.run
        ran.append("run")
        return function()

    routed = shape.read_through(run)
    assert routed.sites == shape.sites, "the way to a weight is no part of what a site is"
    config = DoraConfig(rank=2)
    direct = dora.math.init(config, site, torch.Generator().manual_seed(1))
    assert not ran
    through = dora.math.init(config, routed.sites["s"], torch.Generator().manual_seed(1))
    assert ran == ["run"]
    assert torch.equal(direct.magnitude, through.magnitude)
    dora.math.fold(through)
    assert ran == ["run", "run"]
    assert routed.sites["t"].read_base is None
