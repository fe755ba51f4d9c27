"""The sampler against the formulas in float64, one row at a time."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from weft.engine import sampler
from weft.engine.request import Request, RequestId, SamplingParams

V = 16


def request(prompt: Sequence[int] = (0,), output: Sequence[int] = (), **params: Any) -> Request:
    made = Request(request_id=RequestId("r"), prompt_token_ids=tuple(prompt), params=SamplingParams(**params))
    made.output += output
    return made


def rows(*logits: Sequence[float]) -> torch.Tensor:
    return torch.tensor(np.array(logits), dtype=torch.float32)


def sampled(logits: torch.Tensor, requests: Sequence[Request]) -> list[int]:
    tokens = sampler.sample(logits, requests)
    assert None not in tokens
    return [token.token_id for token in tokens if token is not None]


def reference(logits: Sequence[float], params: SamplingParams) -> np.ndarray:
    """Return the distribution that a row is drawn from: temperature, top-k, top-p of the rest, min-p. [V], float64."""
    scaled = np.asarray(logits, dtype=np.float64) / params.temperature
    full = np.exp(scaled - scaled.max())
    full /= full.sum()
    order = np.argsort(-full, kind="stable")
    kept = list(order[: params.top_k or len(order)])
    mass, nucleus = 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += full[token]
        if mass >= params.top_p * full[kept].sum():
            break
    kept = [token for token in nucleus if full[token] >= params.min_p * full.max()] or [order[0]]
    result = np.zeros(len(full))
    result[kept] = full[kept] / full[kept].sum()
    return result


# -- greedy ----------------------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_largest_and_the_first_of_equals() -> None:
    logits = rows([0, 3, 1, 3], [-5, -7, -4, -9])
    assert sampled(logits, [request(temperature=0.0), request(temperature=0.0)]) == [1, 2]


def test_greedy_and_drawing_rows_share_a_batch() -> None:
    logits = torch.randn(6, V, generator=torch.Generator().manual_seed(0))
    together = [request(temperature=float(row % 2), seed=row) for row in range(6)]
    alone = [request(temperature=float(row % 2), seed=row) for row in range(6)]
    assert sampled(logits, together) == [sampled(logits[[row]], [one])[0] for row, one in enumerate(alone)]


# -- the filters -----------------------------------------------------------------------------------------------------


class _Scripted:
    """A substitute for a request's random numbers."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


def on_an_edge(logits: Sequence[float], params: SamplingParams) -> bool:
    """Return whether a filter cuts so close to a token that float32 may fall on either side."""
    kept = [
        reference(logits, replace(params, top_p=params.top_p * factor, min_p=params.min_p * factor)) > 0
        for factor in (1 - 1e-5, 1, 1 + 1e-5)
    ]
    return any((one != kept[1]).any() for one in kept) and params.min_p < 1


_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.01, 0.3, 1.0, 1.7, 100.0]),
    top_k=st.sampled_from([0, 1, 2, 5, V, V + 9]),
    top_p=st.sampled_from([1e-9, 0.1, 0.5, 0.9, 0.999999, 1.0]),
    min_p=st.sampled_from([0.0, 1e-6, 0.1, 0.5, 1.0]),
)
_logits = st.one_of(
    st.lists(st.floats(-20, 20, width=32), min_size=V, max_size=V),
    st.lists(st.sampled_from([-3.0, 0.0, 1.0, 2.0]), min_size=V, max_size=V),  # ties
    st.just([0.0] * V),
    st.just([50.0] + [-50.0] * (V - 1)),
)


@settings(max_examples=300, deadline=None)
@example(logits=[0.0] * (V - 1) + [2**-24], params=SamplingParams(temperature=100.0, top_p=1e-9), uniform=0.0)
@given(logits=_logits, params=_params, uniform=st.floats(0, 1, exclude_max=True))
def test_a_draw_inverts_the_reference_distribution(logits: list[float], params: SamplingParams, uniform: float) -> None:
    probabilities = reference(logits, params)
    order = np.argsort(-probabilities, kind="stable")[: np.count_nonzero(probabilities)]
    ends = probabilities[order].cumsum()
    if on_an_edge(logits, params) or np.abs(ends[:-1] - uniform).min(initial=1) < 1e-5:
        return
    one = request(**{field: getattr(params, field) for field in ("temperature", "top_k", "top_p", "min_p")})
    one.random = _Scripted(uniform)  # type: ignore[assignment]  # a stand-in
    (token,) = sampled(rows(logits), [one])
    wanted = order[np.searchsorted(ends, uniform, side="right").clip(max=len(order) - 1)]
    if token != wanted:  # float32 may order near equals differently, and a filter may then keep another of them
        assert logits[token] / params.temperature == pytest.approx(logits[wanted] / params.temperature, abs=1e-5)


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, {2}),
        ({"top_k": 3}, {2, 1, 0}),
        ({"top_p": 1e-9}, {2}),
        ({"top_p": 0.6}, {2}),
        ({"top_p": 0.7}, {2, 1}),
        ({"top_p": 0.7, "top_k": 2}, {2}),
        ({"min_p": 1.0}, {2}),
        ({"min_p": 0.3}, {2, 1}),
        ({"min_p": 0.01}, {0, 1, 2, 3}),
        ({}, {0, 1, 2, 3}),
    ],
)
def test_what_each_filter_keeps(params: dict[str, Any], kept: set[int]) -> None:
    """Probabilities 0.09, 0.24, 0.63, 0.03 (e² : e : e³ … normalized)."""
    logits = rows([1.0, 2.0, 3.0, 0.0])
    uniforms = np.linspace(0, 1, 200, endpoint=False)
    requests = [request(**params) for _ in uniforms]
    for one, uniform in zip(requests, uniforms, strict=True):
        one.random = _Scripted(float(uniform))  # type: ignore[assignment]  # a stand-in
    assert set(sampled(logits.expand(len(uniforms), -1), requests)) == kept


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_give_kept_tokens(uniform: float) -> None:
    one = request(top_k=2)
    one.random = _Scripted(uniform)  # type: ignore[assignment]  # a stand-in
    assert sampled(rows([5.0, -90.0, 4.0, -90.0]), [one]) == [0 if uniform == 0 else 2]


def test_top_p_one_keeps_the_whole_tail_of_a_large_vocabulary() -> None:
    """In float32 the sum reaches 1 before the end, and the tokens after it would be cut."""
    logits = torch.full((1, 100_000), -25.0)
    logits[0, 0] = 0.0
    one = request(top_p=1.0)
    one.random = _Scripted(1 - 1e-11)  # type: ignore[assignment]  # a stand-in
    assert sampled(logits, [one]) == [99_999]


def test_small_temperature_and_huge_logits_do_not_overflow() -> None:
    logits = rows([2e38, 3e38, 0.0], [59000.0, 60000.0, -60000.0])
    assert sampled(logits, [request(temperature=0.01), request(temperature=0.01)]) == [1, 1]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 8, "top_p": 0.9, "min_p": 0.05},
    ],
)
def test_drawn_frequencies_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 8,000 draws of consecutive seeds; the bound is the 0.9999 quantile (Wilson-Hilferty)."""
    logits = torch.randn(V, generator=torch.Generator().manual_seed(3)) * 2
    count = 8000
    requests = [request(seed=seed, **params) for seed in range(count)]
    tokens = sampled(logits.expand(count, -1), requests)
    wanted = reference(logits.tolist(), SamplingParams(**params)) * count
    observed = np.bincount(tokens, minlength=V)
    assert not observed[wanted == 0].any()
    many = wanted >= 5  # rarer tokens count together
    pairs = [*zip(observed[many], wanted[many], strict=True), (observed[~many].sum(), wanted[~many].sum())]
    chi_square = sum((o - e) ** 2 / e for o, e in pairs if e > 0)
    freedom = sum(e > 0 for _, e in pairs) - 1
    assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3


# -- seeds -----------------------------------------------------------------------------------------------------------


def answer(seed: int, length: int, *, neighbours: int = 0, place: int = 0) -> list[int]:
    """Tokens of one request in a batch with others, over logits that depend on its own length only."""
    generator = torch.Generator().manual_seed(11)
    table = torch.randn(length, V, generator=generator)
    noise = torch.Generator().manual_seed(neighbours)
    one, others = request(seed=seed), [request(seed=100 + n, top_k=n % 3) for n in range(neighbours)]
    for step in range(length):
        batch = [*others[:place], one, *others[place:]]
        logits = torch.randn(len(batch), V, generator=noise)
        logits[place] = table[step]
        for member, token in zip(batch, sampled(logits, batch), strict=True):
            member.output.append(token)
    return one.output


@pytest.mark.parametrize(("neighbours", "place"), [(1, 0), (3, 2), (9, 9)])
def test_a_seed_gives_the_same_tokens_in_any_company(neighbours: int, place: int) -> None:
    assert answer(7, 20, neighbours=neighbours, place=place) == answer(7, 20)


def test_another_seed_gives_other_tokens() -> None:
    answers = {tuple(answer(seed, 20)) for seed in range(10)}
    assert len(answers) == 10


# -- penalties and stops ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
def test_repetition_penalty_is_ctrls_formula(penalty: float) -> None:
    logits = torch.randn(1, V, generator=torch.Generator().manual_seed(5))
    seen = {1, 2, 3, 9}
    one = request([1, 2, 2, 3], [9, 1], repetition_penalty=penalty)
    sampling = sampler._sampling_tensors([one], V)
    assert sampling is not None
    got = sampler._penalize_repetition(logits, sampling.seen, sampling.penalties)[0].tolist()
    for token, (before, after) in enumerate(zip(logits[0].tolist(), got, strict=True)):
        wanted = before if token not in seen else before / penalty if before > 0 else before * penalty
        assert after == pytest.approx(wanted, rel=1e-6)


def test_a_penalty_near_zero_makes_a_token_certain_not_a_number_that_is_none() -> None:
    logits = rows([0.0, 2.0, 1.0, -1.0]).expand(3, -1)
    requests = [request(seen, repetition_penalty=1e-300, seed=4) for seen in ([0], [1], [3])]
    tokens = sampled(logits, requests)
    assert tokens[1] == 1
    assert set(tokens) <= set(range(4))


def test_the_penalty_of_one_row_is_not_its_neighbours() -> None:
    logits = rows([2.0, 1.9], [2.0, 1.9])
    penalized, free = request([0], temperature=0.0, repetition_penalty=2.0), request([0], temperature=0.0)
    assert sampled(logits, [penalized, free]) == [1, 0]
    assert logits.tolist() == rows([2.0, 1.9], [2.0, 1.9]).tolist(), "the model's logits are not written"


def test_min_new_tokens_holds_back_stops_and_only_those() -> None:
    logits = rows([9.0, 8.0, 7.0, 1.0]).expand(3, -1)
    stops = frozenset({0, 1})
    early = request(temperature=0.0, stop_token_ids=stops, min_new_tokens=2, output=[3])
    late = request(temperature=0.0, stop_token_ids=stops, min_new_tokens=2, output=[3, 3])
    assert sampled(logits, [early, late, request(temperature=0.0)]) == [2, 0, 0]
    without = request(temperature=0.0, min_new_tokens=2)
    assert sampled(logits[:1], [without]) == [0]


# -- log-probabilities -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logprobs_are_the_models_before_any_filter(temperature: float) -> None:
    logits = torch.randn(3, V, generator=torch.Generator().manual_seed(2)) * 3
    requests = [
        request([4], temperature=temperature, top_k=3, repetition_penalty=1.5, logprobs=3, seed=1),
        request(temperature=temperature),
        request(temperature=temperature, logprobs=0),
    ]
    full = logits.double().log_softmax(-1)
    first, second, third = sampler.sample(logits, requests)
    assert first is not None
    assert second is not None
    assert third is not None
    assert first.logprob == pytest.approx(float(full[0, first.token_id]), abs=1e-5)
    order = full[0].argsort(descending=True)[:3]
    assert [top.token_id for top in first.top] == order.tolist()
    assert [top.logprob for top in first.top] == pytest.approx(full[0, order].tolist(), abs=1e-5)
    assert (second.logprob, second.top) == (None, ())
    assert third.logprob == pytest.approx(float(full[2, third.token_id]), abs=1e-5)
    assert third.top == ()


# -- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_gives_none_and_its_neighbours_do_not_notice(bad: float, temperature: float) -> None:
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(8))

    def requests() -> list[Request]:
        return [request([row], temperature=temperature, seed=row, top_p=0.9, logprobs=2) for row in range(5)]

    clean = sampler.sample(logits, requests())
    spoiled = logits.clone()
    spoiled[2, 7] = bad
    got = sampler.sample(spoiled, requests())
    assert got[2] is None
    assert [one for row, one in enumerate(got) if row != 2] == [one for row, one in enumerate(clean) if row != 2]
