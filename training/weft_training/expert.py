"""Experts of a mixture as directories: the digest of each, and its adapter."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from weft.adapters.identifiers import AdapterDigest
from weft.adapters.versions import digest_at
from weft.methods.protocol import Adapter, BaseShape
from weft_training import adapter as adapters


class TrainedExpert(NamedTuple):
    """An expert and its name. digest: of the directory that it was read from, until it is trained further."""

    name: str
    adapter: Adapter
    digest: AdapterDigest

    def mapped(self, function: Callable[[Tensor], Tensor]) -> "TrainedExpert":
        """Return the same expert with `function` applied to every parameter tensor."""
        return self._replace(adapter=adapters.map_tensors(self.adapter, function))


def read(paths: Sequence[Path], shape: BaseShape) -> list[TrainedExpert]:
    """Read the experts in the order of their digests, which is the order of a router's rows.

    Raises ValueError for a duplicate adapter and for one that a router cannot gate, and what `adapters.read` raises for
    one that does not fit the base.
    """
    found: dict[AdapterDigest, Path] = {}
    experts = []
    for path in paths:
        digest = digest_at(path)
        if digest in found:
            raise ValueError(f"experts: must differ, given {found[digest]} and {path} with one content")
        found[digest] = path
        expert = TrainedExpert(path.resolve().name, adapters.read(path, shape), digest)
        require_gateable(expert)
        experts.append(expert)
    return sorted(experts, key=lambda expert: expert.digest)


def require_gateable(expert: TrainedExpert) -> None:
    """Refuse activated LoRAs, as servers do, and virtual positions, which attention gates and not the driver."""
    if expert.adapter.invocation_tokens:
        raise ValueError(f"experts: must act on all tokens, given {expert.name}, an activated LoRA")
    if expert.adapter.num_virtual_tokens:
        raise ValueError(
            f"experts: must act at modules while a router is trained, given {expert.name}, "
            f"a {expert.adapter.method.name} adapter with virtual positions"
        )
