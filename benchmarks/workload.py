"""The input of the backends: a trace of requests and registrations, as JSON lines, and seeded generators of them.

    {"arrival_s": 0.25, "adapters": ["lora-00"], "prompt": [17, 4, 2], "num_new_tokens": 64}
    {"arrival_s": 1.0, "register": "lora-99", "path": "/…/lora-99"}

Arrivals, adapters, prompts and output lengths are drawn from separate random numbers, so that two traces of one seed
differ only in what was meant to differ. Standard library alone: every backend's Python reads this file.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

Adapters = tuple[str, ...]
"""The adapters of a request: () is the base."""

Arrivals = Callable[[random.Random], Iterator[float]]
Popularity = Callable[[random.Random], Iterator[Adapters]]
Length = Callable[[random.Random], int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request, which arrives at `arrival_s` from the start: greedy, exactly `num_new_tokens` long."""

    arrival_s: float
    adapters: Adapters
    prompt: tuple[int, ...]
    num_new_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Registration:
    """An adapter that is registered while requests run: the directory `path`, as `adapter_id`, from `arrival_s` on."""

    arrival_s: float
    adapter_id: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """Requests in the order of their arrival, and the registrations beside them."""

    requests: tuple[Request, ...]
    registrations: tuple[Registration, ...] = ()

    @property
    def num_new_tokens(self) -> int:
        """Number of tokens to generate for all requests together."""
        return sum(request.num_new_tokens for request in self.requests)

    @property
    def num_tokens_max(self) -> int:
        """Number of tokens of the longest request, prompt and answer."""
        return max(len(request.prompt) + request.num_new_tokens for request in self.requests)


def write(trace: Trace, path: Path) -> Path:
    """Write one line per entry, by arrival."""
    lines = [(request.arrival_s, asdict(request)) for request in trace.requests]
    for one in trace.registrations:
        entry = {"arrival_s": one.arrival_s, "register": one.adapter_id, "path": one.path}
        lines.append((one.arrival_s, entry))
    lines.sort(key=lambda line: line[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for _, entry in lines))
    return path


def read(path: Path) -> Trace:
    """Read the trace in a file. Raises ValueError naming the first line that is not an entry."""
    requests, registrations = [], []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            entry = json.loads(line)
            if "register" in entry:
                registrations.append(
                    Registration(arrival_s=entry["arrival_s"], adapter_id=entry["register"], path=entry["path"])
                )
            else:
                requests.append(
                    Request(
                        arrival_s=entry["arrival_s"],
                        adapters=tuple(entry["adapters"]),
                        prompt=tuple(entry["prompt"]),
                        num_new_tokens=entry["num_new_tokens"],
                    )
                )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: is no request and no registration: {error!r}") from None
    return Trace(requests=tuple(requests), registrations=tuple(registrations))


def generate(
    count: int,
    *,
    arrivals: Arrivals,
    popularity: Popularity,
    prompt_tokens: Length,
    new_tokens: Length,
    vocab_size: int,
    registrations: Iterable[Registration] = (),
    seed: int = 0,
) -> Trace:
    """Draw `count` requests. Token 0 is in no prompt, because some backends pad with it."""
    times = arrivals(random.Random(f"arrivals {seed}"))
    adapters = popularity(random.Random(f"popularity {seed}"))
    prompt_dice, length_dice = random.Random(f"prompts {seed}"), random.Random(f"lengths {seed}")
    requests = [
        Request(
            arrival_s=arrival_s,
            adapters=chosen,
            prompt=tuple(prompt_dice.randrange(1, vocab_size) for _ in range(prompt_tokens(prompt_dice))),
            num_new_tokens=new_tokens(length_dice),
        )
        for arrival_s, chosen in itertools.islice(zip(times, adapters, strict=False), count)
    ]
    return Trace(requests=tuple(requests), registrations=tuple(registrations))


# -- when ------------------------------------------------------------------------------------------------------------


def at_once(dice: random.Random) -> Iterator[float]:
    """Yield a fixed batch: all at the start."""
    del dice
    return itertools.repeat(0.0)


def poisson(rate_per_s: float) -> Arrivals:
    """Draw arrivals that are independent of each other."""
    return gamma(rate_per_s, cv=1.0)


def gamma(rate_per_s: float, *, cv: float) -> Arrivals:
    """Draw gaps of a Gamma distribution with mean 1/rate and standard deviation cv/rate; cv above 1 comes in bursts."""
    shape, scale = 1 / cv**2, cv**2 / rate_per_s

    def draw(dice: random.Random) -> Iterator[float]:
        return itertools.accumulate(dice.gammavariate(shape, scale) for _ in itertools.count())

    return draw


# -- which adapter ---------------------------------------------------------------------------------------------------


def base_only(dice: random.Random) -> Iterator[Adapters]:
    """Yield no adapters."""
    del dice
    return itertools.repeat(())


def identical(adapter_ids: Sequence[str]) -> Popularity:
    """Choose the first one, always."""
    return lambda dice: itertools.repeat((adapter_ids[0],))


def distinct(adapter_ids: Sequence[str]) -> Popularity:
    """Choose one after the other, beginning again after the last."""
    return lambda dice: ((adapter_id,) for adapter_id in itertools.cycle(adapter_ids))


def uniform(adapter_ids: Sequence[str]) -> Popularity:
    """Choose each with the same probability."""
    return lambda dice: ((dice.choice(adapter_ids),) for _ in itertools.count())


def zipf(adapter_ids: Sequence[str], *, alpha: float) -> Popularity:
    """Choose the k-th with a probability in proportion to 1/k^alpha."""
    weights = list(itertools.accumulate(rank**-alpha for rank in range(1, len(adapter_ids) + 1)))
    return lambda dice: ((dice.choices(adapter_ids, cum_weights=weights)[0],) for _ in itertools.count())


# -- how long --------------------------------------------------------------------------------------------------------


def fixed(num_tokens: int) -> Length:
    """Return the same length every time."""
    return lambda dice: num_tokens


def between(num_tokens_min: int, num_tokens_max: int) -> Length:
    """Draw uniformly, both ends included."""
    return lambda dice: dice.randint(num_tokens_min, num_tokens_max)


def lognormal(median: int, *, sigma: float, num_tokens_max: int) -> Length:
    """Draw lengths whose logarithm is normal with standard deviation `sigma`, cut to 1 … `num_tokens_max`."""

    def draw(dice: random.Random) -> int:
        return max(1, min(num_tokens_max, round(median * dice.lognormvariate(0.0, sigma))))

    return draw


# -- churn -----------------------------------------------------------------------------------------------------------


def churn(adapters: Iterable[tuple[str, str]], *, every_s: float) -> tuple[Registration, ...]:
    """Return registrations of these (id, path), one each `every_s`, the first after one such time."""
    return tuple(
        Registration(arrival_s=every_s * turn, adapter_id=adapter_id, path=path)
        for turn, (adapter_id, path) in enumerate(adapters, start=1)
    )
