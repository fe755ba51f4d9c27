"""Gradients by hand against autograd, in float64: the identities of each method, and of a whole adapted model.

Rows are stacked: x [T, I], y [T, O], and G = ∂L/∂y has the shape of y, so that ∂L/∂W = Gᵀ x has the shape of W [O, I].
The owner's document (section 3.3) gives the identities of LoRA and of the bottleneck for one column vector. Where its
factors do not fit each other, the docstring of the test says what is meant.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests import tiny
from tests.bases import Bases
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError
from torch.nn import functional as F

from weft.methods import bottleneck, ia3, lora, prefix
from weft.methods.catalog import METHODS
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.protocol import BaseShape, Method, Site
from weft_training import adapter
from weft_training.adapter import USUAL, AdaptedModel
from weft_training.data import Row, collate

T, I, O, R = 7, 6, 5, 3  # noqa: E741  the shape legend
SITE = Site(0, "layers.0.down_proj", I, O)


@pytest.fixture(autouse=True)
def the_same_numbers() -> None:
    torch.manual_seed(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def loss_of(y: Tensor) -> Tensor:
    """A scalar whose gradient is another in every element."""
    return (y.sin() * torch.arange(1, y.numel() + 1, dtype=y.dtype).view_as(y)).sum()


def gradients(loss: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, of, retain_graph=True)


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


def differ(found: Tensor, other: Tensor) -> bool:
    """Return whether a comparison of these would have failed, for controls."""
    return bool((found - other).norm() > 0.1 * found.norm())


def adapted(method: Method, params: Any, weight: Tensor, x: Tensor) -> Tensor:
    """A linear module with one adapter, by the driver that trains."""
    driver = ReferenceDriver((Segment(method, {SITE.name: params}),))
    return driver.apply(SITE, lambda rows: rows @ weight.mT, x)


# --- LoRA -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_rslora", [False, True])
def test_lora(use_rslora: bool) -> None:
    """∂L/∂A = s Bᵀ ∂L/∂W and ∂L/∂B = s ∂L/∂W Aᵀ, with s = α/r (rsLoRA: α/√r).

    The document writes ∂L/∂A = ∂L/∂W · Bᵀ · α/r. With its own shapes, W [d, k] and B [d, r], that product of [d, k] and
    [r, d] exists only where k = r; the transpose of B stands on the left.
    """
    x, weight = draw(T, I), draw(O, I)
    s = lora.math.scaling_at(lora.math.LoraConfig(rank=R, alpha=6.0, use_rslora=use_rslora), "")
    params = lora.math.LoraParams(draw(R, I), draw(O, R), s)
    loss = loss_of(adapted(lora.METHOD, params, weight, x))
    of_a, of_b, of_weight = gradients(loss, params.a, params.b, weight)
    assert_equal(of_a, s * params.b.mT @ of_weight)
    assert_equal(of_b, s * of_weight @ params.a.mT)
    assert differ(of_a, params.b.mT @ of_weight)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        of_weight @ params.b.mT  # as the document has it

    (of_merged,) = gradients(loss_of(x @ (weight + s * params.b @ params.a).mT), weight)
    assert_equal(of_weight, of_merged)  # "the same gradient path as original parameters"


def test_lora_in_a_whole_model(bases: Bases) -> None:
    """The same identities at every site of a base, with ∂L/∂W from the base's own weights."""
    ours = bases.fresh(attention="sdpa")
    ours.model.double()
    ours = replace(ours, dtype=torch.float64)
    model = AdaptedModel(ours, tiny.random_lora(ours.shape, rank=3, seed=1)).double()
    weights = {name: ours.model.get_submodule(name).weight for name in model.adapter.sites}
    for weight in weights.values():
        weight.requires_grad_()
    batch = collate([Row(list(range(40, 60)), 5), Row([7, 9, 100], 1)], pad_token_id=0)
    model(**batch).loss.backward()
    assert len(weights) == 2 * 7  # seven linear modules in each of two layers
    for name, params in model.adapter.sites.items():
        s, of_weight = params.scaling, weights[name].grad
        # The model takes norms, softmax and loss through float32, which rounds both sides alike but not the products.
        torch.testing.assert_close(params.a.grad, s * params.b.mT @ of_weight, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(params.b.grad, s * of_weight @ params.a.mT, atol=1e-9, rtol=1e-9)
        assert of_weight.norm() > 1e-6


# --- the bottleneck -------------------------------------------------------------------------------------------------

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_bottleneck(activation: str) -> None:
    """h' = h + f(h), f(h) = W_up σ(W_down h + b_down) + b_up, with W_down [R, D] and W_up [D, R].

    ∂L/∂W_up = Gᵀ σ(z) and ∂L/∂W_down = (G W_up ⊙ σ'(z))ᵀ h, with z = h W_downᵀ + b_down and G = ∂L/∂h' [T, D].
    The document gives W_down as [d, r] and W_up as [r, d], the transposes of what its W_down · h needs; and it writes
    the product with σ'(z) as one of matrices, where it is one of elements.
    """
    sigma = ACTIVATIONS[activation]
    h, down, down_bias, up, up_bias = draw(T, I), draw(R, I), draw(R), draw(I, R), draw(I)
    z = h @ down.mT + down_bias  # [T, R]
    params = bottleneck.math.BottleneckParams(
        down,
        down_bias,
        up,
        up_bias,
        None,
        None,
        bottleneck.math.Form.SERIAL,
        bottleneck.math.Activation(activation),
        1.0,
        1e-5,
    )
    total = h + bottleneck.math.delta(params, h, None)
    loss = loss_of(total)
    g, of_up, of_down, of_up_bias, of_down_bias = gradients(loss, total, up, down, up_bias, down_bias)
    (slope,) = gradients(sigma(z).sum(), z)  # σ'(z)
    assert_equal(of_up, g.mT @ sigma(z))
    assert_equal(of_down, (g @ up * slope).mT @ h)
    assert_equal(of_up_bias, g.sum(0))
    assert_equal(of_down_bias, (g @ up * slope).sum(0))
    assert differ(of_down, (g @ up).mT @ h)


# --- IA³ ------------------------------------------------------------------------------------------------------------


def test_ia3_on_outputs() -> None:
    """y = l ⊙ W₀x:  ∂L/∂l = Σ_t G ⊙ W₀x."""
    x, weight, scale = draw(T, I), draw(O, I), draw(O)
    y = adapted(ia3.METHOD, ia3.math.Ia3Params(scale, is_feedforward=False), weight, x)
    g, of_scale = gradients(loss_of(y), y, scale)
    assert_equal(of_scale, (g * (x @ weight.mT)).sum(0))
    assert differ(of_scale, (g * y).sum(0))


def test_ia3_on_inputs() -> None:
    """y = W₀(l ⊙ x):  ∂L/∂l = Σ_t (G W₀) ⊙ x."""
    x, weight, scale = draw(T, I), draw(O, I), draw(I)
    y = adapted(ia3.METHOD, ia3.math.Ia3Params(scale, is_feedforward=True), weight, x)
    g, of_scale = gradients(loss_of(y), y, scale)
    assert_equal(of_scale, (g @ weight * x).sum(0))
    assert differ(of_scale, (g @ weight * scale * x).sum(0))


# --- prefix ---------------------------------------------------------------------------------------------------------


def test_prefix() -> None:
    """o = softmax(Q [P_K; K]ᵀ/√D) [P_V; V], of one head, with a the share of attention on the prefix [T, P]:

    ∂L/∂P_V = aᵀ G,    ∂L/∂P_K = (a ⊙ (G P_Vᵀ - Σ_d G ⊙ o))ᵀ Q / √D.
    """
    P, L, H, D = 3, 2, 2, 4
    embeddings = draw(P, L, 2, H, D)
    query, own_keys, own_values = draw(L, H, T, D), draw(L, H, T, D), draw(L, H, T, D)
    virtual = prefix.math.virtual(prefix.math.PrefixParams(embeddings))
    keys, values = (t.transpose(1, 2) for t in virtual)  # [L, H, P, D]
    causal = torch.ones(T, P + T, dtype=torch.bool).tril(P)
    out = F.scaled_dot_product_attention(
        query, torch.cat([keys, own_keys], 2), torch.cat([values, own_values], 2), attn_mask=causal
    )
    g, of_embeddings = gradients(loss_of(out), out, embeddings)
    logits = query @ torch.cat([keys, own_keys], 2).mT / D**0.5
    share = logits.masked_fill(~causal, -torch.inf).softmax(-1)[..., :P]  # a
    of_values = share.mT @ g
    of_keys = (share * (g @ values.mT - (g * out).sum(-1, keepdim=True))).mT @ query / D**0.5
    of_keys_found, of_values_found = of_embeddings.permute(2, 1, 3, 0, 4)  # each [L, H, P, D]
    assert_equal(of_values_found, of_values)
    assert_equal(of_keys_found, of_keys)
    assert differ(of_keys, (share * (g @ values.mT)).mT @ query / D**0.5)


# --- every method ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shape(shape: BaseShape) -> BaseShape:
    """A base with one site of every name."""
    sites = {site.name: site for site in shape.sites.values() if ".1." not in site.name}
    assert len(sites) < len(shape.sites)
    return replace(shape, sites=sites, num_layers=1)


def drawn(method: Method, shape: BaseShape) -> adapter.Adapter:
    """The method's usual adapter with random numbers in float64."""
    made = adapter.initial(USUAL[method.name], shape, torch.Generator().manual_seed(0))
    return adapter.map_tensors(made, lambda t: torch.randn(t.shape, dtype=torch.float64, requires_grad=True))


def functions(method: Method, shape: BaseShape) -> list[tuple[str, Callable[..., Any], tuple[Tensor, ...]]]:
    """Each function of a method that makes numbers of parameters, and what it is differentiable in."""
    made = drawn(method, shape)
    found = []

    def add(name: str, bundle: Any, call: Callable[..., Any], *rest: Tensor) -> None:
        fields = [field for field, value in bundle._asdict().items() if isinstance(value, Tensor)]
        count = len(fields)

        def function(*tensors: Tensor) -> Any:
            return call(bundle._replace(**dict(zip(fields, tensors[:count], strict=True))), *tensors[count:])

        inputs = (*(getattr(bundle, field) for field in fields), *rest)
        if function(*inputs) is not None:  # IA³ has nothing to add to the one end or to the other
            found.append((name, function, inputs))

    for name, params in made.sites.items():
        x, y = draw(2, shape.sites[name].in_features), draw(2, shape.sites[name].out_features)
        if method.pre is not None:
            add(f"pre at {name}", params, method.pre, x)
        if method.post is not None:
            add(f"post at {name}", params, method.post, x, y)
        if method.after is not None:
            add(f"after at {name}", params, method.after, y, draw(2, shape.sites[name].out_features))
    if method.virtual is not None:
        add("virtual", made.prefix, method.virtual)
    return found


# DoRA's gradient is no derivative, on purpose: it holds the divisor constant (arXiv:2402.09353, section 4.3).
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"dora"}))
def test_functions_are_differentiable_in_all_they_take(name: str, shape: BaseShape) -> None:
    checked = functions(METHODS[name], shape)
    assert checked
    for what, function, inputs in checked:
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True), what


def test_gradcheck_sees_a_missing_path() -> None:
    """The control: LoRA with a B that no gradient reaches."""
    params = lora.math.LoraParams(draw(R, I), draw(O, R), 2.0)

    def wrong(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        return lora.math.delta(
            lora.math.LoraParams(a, b.detach() + 0 * b, 2.0), x, torch.zeros(T, O, dtype=torch.float64)
        )

    with pytest.raises(GradcheckError):
        torch.autograd.gradcheck(wrong, (params.a, params.b, draw(T, I)), fast_mode=True)
