"""The gates of a mixture equal the textbook's, number by number, and have the promised properties."""

import itertools

import pytest
import torch

from tests.mixing import textbook_mixture as textbook
from weft.methods import mixture
from weft.methods.mixture import Expert, Mixture, MixtureConfig, MixtureParams, Steering

HIDDEN = 12
ROWS = 7
BOUNDS = {
    "none": (),
    "restricted": ((True, 0.0, float("inf")), (False, 0.0, float("inf")), (True, 0.0, float("inf"))),
    "floors": ((True, 0.3, float("inf")), (True, 0.0, float("inf")), (True, 0.25, float("inf"))),
    "ceilings": ((True, 0.0, 0.35), (True, 0.0, 0.5), (True, 0.0, float("inf"))),
    "both": ((True, 0.4, 0.5), (True, 0.1, 0.2), (True, 0.0, 0.6)),
    "all masked but one": ((False, 0.5, 0.6), (True, 0.0, 0.4), (False, 0.0, 0.1)),
    "floors beyond the sum": ((True, 0.9, 1.0), (True, 0.8, 1.0), (True, 0.0, 1.0)),
    "ceilings below the sum": ((True, 0.0, 0.1), (True, 0.0, 0.2), (True, 0.0, 0.3)),
}


def steering_of(bounds: tuple[textbook.Bound, ...]) -> Steering:
    if not bounds:
        return Steering()
    allowed, floor, ceiling = zip(*bounds, strict=True)
    return Steering(torch.tensor(allowed), torch.tensor(floor), torch.tensor(ceiling))


def random(seed: int, choices: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(choices, HIDDEN, generator=generator, dtype=torch.float64)
    return weight, torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)
def test_gates_equal_the_textbook(bounds: tuple[textbook.Bound, ...]) -> None:
    flags = (False, True)
    for seed, (top_k, normalize, null, rms, absolute) in enumerate(
        itertools.product((1, 2, 3, 4), flags, flags, flags, flags)
    ):
        if top_k > 3 + null:
            continue
        config = MixtureConfig(
            num_experts=3,
            top_k=top_k,
            temperature=0.5 + seed % 3,
            normalize=normalize,
            null_expert=null,
            rms_norm=rms,
            absolute=absolute,
        )
        weight, hidden = random(seed, config.num_choices)
        got = mixture.gates(config, weight, hidden, steering_of(bounds))
        torch.testing.assert_close(got, textbook.gates(config, weight, hidden, bounds), rtol=1e-6, atol=1e-6)
        # Negative control: each flag, the temperature and the bounds have an effect.
        changed = MixtureConfig(num_experts=3, top_k=top_k, temperature=4.0, normalize=True, null_expert=null)
        if top_k > 1 and not bounds:
            assert not torch.allclose(got, textbook.gates(changed, weight, hidden), atol=1e-4)


@pytest.mark.parametrize("bounds", list(BOUNDS.values())[2:], ids=list(BOUNDS)[2:])
def test_bounds_hold_and_the_sum_stays_where_it_can(bounds: tuple[textbook.Bound, ...]) -> None:
    config = MixtureConfig(num_experts=3, top_k=3)
    weight, hidden = random(5, 3)
    got = mixture.gates(config, weight, hidden * 3, steering_of(bounds))
    allowed, floor, ceiling = (torch.tensor(column) for column in zip(*bounds, strict=True))
    assert (got >= floor * allowed - 1e-6).all()
    assert (got <= ceiling + 1e-6).all()
    assert (got[:, ~allowed] == 0).all()
    least, most = (floor * allowed).sum(), (ceiling * allowed).sum()
    wanted = torch.ones(ROWS, dtype=torch.float64).clamp(least, most)
    torch.testing.assert_close(got.sum(-1), wanted, rtol=0, atol=1e-6)


def test_what_hardly_anybody_was_given_is_shared_all_the_same() -> None:
    """The expert with the whole sum is bounded; the other float32 shares are so small that 1 over them is infinite."""
    bounds = ((True, 0.0, 0.375), (True, 0.0, float("inf")), (True, 0.0, float("inf")))
    weight = torch.tensor([[0.0], [-92.0], [-92.0]])
    got = mixture.gates(MixtureConfig(num_experts=3, top_k=3), weight, torch.ones(1, 1), steering_of(bounds))
    torch.testing.assert_close(got, torch.tensor([[0.375, 0.3125, 0.3125]]), rtol=0, atol=1e-4)


def test_equal_logits_go_to_the_first() -> None:
    config = MixtureConfig(num_experts=4, top_k=2)
    hidden = torch.randn(ROWS, HIDDEN)
    got = mixture.gates(config, torch.ones(4, HIDDEN), hidden)
    assert got.equal(torch.tensor([0.5, 0.5, 0, 0]).expand(ROWS, 4))
    # Negative control: a larger one comes before the first.
    alone = mixture.gates(MixtureConfig(num_experts=4, top_k=1), torch.diag(torch.arange(4.0)), torch.ones(1, 4))
    assert alone.tolist() == [[0, 0, 0, 1]]


def test_null_takes_gate_that_nobody_has() -> None:
    config = MixtureConfig(num_experts=2, top_k=1, null_expert=True)
    weight = torch.tensor([[1.0, 0], [0, 1], [2, 2]])
    got = mixture.gates(config, weight, torch.tensor([[1.0, 1.0], [-1.0, -1.0], [3.0, -2.0]]))
    assert got.tolist() == [[0, 0], [1, 0], [1, 0]]


def test_rows_do_not_depend_on_each_other() -> None:
    config = MixtureConfig(num_experts=3, top_k=2)
    weight, hidden = random(9, 3)
    got = mixture.gates(config, weight, hidden)
    for row in range(ROWS):
        other = torch.randn_like(hidden)
        other[row] = hidden[row]
        torch.testing.assert_close(mixture.gates(config, weight, other)[row], got[row], rtol=1e-12, atol=0)
        assert not torch.allclose(mixture.gates(config, weight, other), got), "negative control"


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_those_of_the_formula(top_k: int, normalize: bool) -> None:
    config = MixtureConfig(num_experts=3, top_k=top_k, normalize=normalize, null_expert=True, temperature=0.7)
    weight, hidden = random(11, 4)
    weight.requires_grad_()
    hidden.requires_grad_()

    def made(w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return mixture.gates(config, w, h)

    assert torch.autograd.gradcheck(made, (weight, hidden))
    # A single kept gate is normalized to 1 whatever the router says, so the router learns nothing.
    largest = torch.autograd.grad(made(weight, hidden).square().sum(), weight)[0].abs().max().item()
    assert (largest < 1e-12) is (top_k == 1 and normalize)


def test_experts_come_in_the_order_of_their_digests() -> None:
    weight = torch.arange(8.0).view(1, 4, 2)
    experts = tuple(Expert(digest * 64, digest) for digest in "cab")
    given = Mixture(MixtureConfig(num_experts=3, top_k=1, null_expert=True), MixtureParams(weight), experts)
    ordered = given.in_order()
    assert [expert.adapter_id for expert in ordered.experts] == ["a", "b", "c"]
    assert ordered.params.weight[0, :, 0].tolist() == [2, 4, 0, 6], "the null expert stays last"
    assert ordered.in_order().params.weight.equal(ordered.params.weight)


def test_balance_loss_is_one_where_experts_are_used_alike() -> None:
    even = torch.eye(4)
    assert mixture.balance_loss(torch.full((4, 4), 0.25), even).item() == pytest.approx(1.0)
    one = torch.zeros(4, 4)
    one[:, 0] = 1
    assert mixture.balance_loss(one * 0.97 + 0.01, one).item() > 3.5


@pytest.mark.parametrize(
    "wrong",
    [{"num_experts": 0}, {"top_k": 0}, {"top_k": 4}, {"temperature": 0.0}, {"temperature": float("nan")}],
    ids=str,
)
def test_configs_that_mean_nothing_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}: must be"):
        MixtureConfig(**{"num_experts": 3, "top_k": 2, **wrong})  # pyright: ignore[reportArgumentType]
