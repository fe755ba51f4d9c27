"""Check compositions before any of them is computed: what may be a part, and with what."""

import pytest

from weft.adapters.identifiers import AdapterDigest, AdapterId, AdapterReference
from weft.adapters.registry import AdapterInfo, Version
from weft.api import composition
from weft.api.composition import Part
from weft.errors import InvalidRequest


def test_row_84_a_mixture_is_no_part() -> None:
    def version(name: str, method: str, experts: tuple[AdapterReference, ...] = ()) -> Version:
        info = AdapterInfo(method=method, experts=experts)
        return Version(adapter_id=AdapterId(name), digest=AdapterDigest(name * 64), info=info, create_time_s=0)

    parts = [Part(AdapterReference(AdapterId(name), None), 1.0, 1.0, "") for name in "ab"]
    expert = AdapterReference(AdapterId("a"), AdapterDigest("a" * 64))
    composition.check_versions(parts, [version("a", "lora"), version("b", "ia3")])
    with pytest.raises(InvalidRequest, match=r"adapters\[1\].adapter_id: is a mixture.*given b") as caught:
        composition.check_versions(parts, [version("a", "lora"), version("b", "mixture", (expert,))])
    assert caught.value.metadata["index"] == "1"
