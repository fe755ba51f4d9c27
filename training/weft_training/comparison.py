"""Comparison of all methods on one base: parameters, storage and overhead (the owner's table, section 3.2).

Counts are by formula and by counting what `adapter.initial` makes; the ratio is d / k, the base's parameters over the
adapter's (owner's section 1.1). The cost of the forward pass is measured, because the table's O(ND + …) leaves out the
launch overhead of small operations.
"""

import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from weft.adapters import packed_adapter
from weft.adapters.slots import SlotTable
from weft.kernels.selection import select
from weft.kernels.step import Entries, Step, lone_request
from weft.methods.catalog import METHODS
from weft.methods.count import Count
from weft.methods.driver import ReferenceDriver, Segment
from weft.methods.prefix.math import PrefixParams
from weft.methods.protocol import Adapter
from weft.model.loader import Base
from weft_training import adapter as adapters
from weft_training.adapter import USUAL, AdaptedModel
from weft_training.base import num_parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A method with its usual config.

    count: by formula; None if the method has none. num_parameters: counted.
    slot_bytes: in a server's memory, virtual positions included.
    overhead: measured share of the base's forward time that the method adds; 0.1 is a tenth. None if not measured.
    """

    method: str
    config: str
    count: Count | None
    num_parameters: int
    ratio: float
    slot_bytes: int
    overhead: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """All methods on one base.

    num_parameters: the base's. forward_s: the base's own forward pass of a row of `num_tokens`, median.
    """

    num_parameters: int
    forward_s: float | None
    num_tokens: int
    methods: tuple[Compared, ...]


def compare(base: Base, methods: Sequence[str] = (), *, num_tokens: int = 32, repeats: int = 15) -> Comparison:
    """Compare all methods, or those given, on `base`. repeats: alternating forward passes that are timed; 0 for none.

    Raises ValueError for an unknown method, and for one that fits no module of the base.
    """
    for name in methods:
        if name not in USUAL:
            raise ValueError(f"method: must be one of {', '.join(USUAL)}, given {name!r}")
    total = num_parameters(base)
    made = {name: _initial(base, name) for name in methods or USUAL}
    forward_s, overheads = _forward_s(base, made, num_tokens, repeats) if repeats else (None, {})
    compared = []
    for name, adapter in made.items():
        sites = [base.shape.sites[site] for site in adapter.sites]
        count = None if adapter.method.count is None else adapter.method.count(adapter.config, sites, base.shape)
        compared.append(
            Compared(
                method=name,
                config=_described(adapter.config),
                count=count,
                num_parameters=adapter.num_parameters,
                ratio=total / adapter.num_parameters,
                slot_bytes=packed_adapter.build(adapter, base.shape, dtype=base.dtype).size_bytes,
                overhead=overheads.get(name),
            )
        )
    return Comparison(num_parameters=total, forward_s=forward_s, num_tokens=num_tokens, methods=tuple(compared))


def _initial(base: Base, method: str) -> Adapter:
    return adapters.initial(adapters.usual(method, base.shape), base.shape, torch.Generator().manual_seed(0))


def _described(config: object) -> str:
    """Format the config's numbers and modules, without empty values and switches that are off."""
    fields = {name: getattr(config, name) for name in config.__dataclass_fields__}  # pyright: ignore
    return ", ".join(
        f"{name} {' '.join(value) if isinstance(value, tuple) else value}" for name, value in fields.items() if value
    )


def _forward_s(
    base: Base, made: Mapping[str, Adapter], num_tokens: int, repeats: int
) -> tuple[float, dict[str, float]]:
    """Return the base's median forward time, and by method the median share that it adds in the same round.

    The adapter applies to all rows, through serving's kernels. The passes alternate, so that noise affects all of them
    alike; the first of each is a warm-up and is left out.
    """
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(base.vocab_size, (1, num_tokens), generator=generator).to(base.device)
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    passes: dict[str, Callable[[], Any]] = {"": lambda: base.model(**inputs, use_cache=False)}
    passes |= {name: _served(base, adapter, inputs) for name, adapter in made.items()}
    taken: dict[str, list[float]] = {name: [] for name in passes}
    with torch.inference_mode():
        for _ in range(repeats + 1):
            for name, run in passes.items():
                started = time.perf_counter()
                run()
                if base.device.type == "cuda":
                    torch.cuda.synchronize(base.device)
                taken[name].append(time.perf_counter() - started)
    timed = {name: seconds[1:] for name, seconds in taken.items()}
    by_round = {name: map(operator.truediv, seconds, timed[""]) for name, seconds in timed.items() if name}
    overheads = {name: statistics.median(ratios) - 1 for name, ratios in by_round.items()}
    return statistics.median(timed[""]), overheads


def _served(base: Base, adapter: Adapter, inputs: Mapping[str, Tensor]) -> Callable[[], Any]:
    if adapter.method.virtual is not None:
        # Only the cache gets longer: serving, too, computes soft rows once and not for each request.
        with torch.no_grad():
            virtual = AdaptedModel(base, adapter).virtual()
        assert virtual is not None
        computed = PrefixParams(torch.stack([part.transpose(0, 1) for part in virtual], dim=2))
        model = AdaptedModel(base, replace(adapter, method=METHODS["prefix"], prefix=computed))
        return lambda: model(**inputs)
    laid_out = packed_adapter.build(adapter, base.shape, dtype=base.dtype)
    slots = SlotTable(num_sites=len(base.shape.sites), capacity_bytes=laid_out.size_bytes, device=base.device)
    slot = slots.put(laid_out)
    assert slot is not None
    make_driver = select(base.device, base.dtype).driver
    table_rows = torch.tensor(slots.table_rows.get(slot, (slot,)), dtype=torch.int32)
    rows = inputs["input_ids"].reshape(-1)
    offsets = torch.arange(0, len(rows) * len(table_rows) + 1, len(table_rows), dtype=torch.int32)
    taken = table_rows.repeat(len(rows))
    entries = Entries(*(part.to(base.device) for part in (offsets, taken, torch.ones(len(taken)))))
    step = Step(rows, rows, rows, lone_request(rows, [0], len(rows)), entries)

    def run() -> None:
        driver = (
            ReferenceDriver((Segment(adapter.method, slots.params(slot)),))
            if make_driver is None
            else make_driver(slots, step)
        )
        with base.context.use(driver):
            base.model(**inputs, use_cache=False)

    return run
