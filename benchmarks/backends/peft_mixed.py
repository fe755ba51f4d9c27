"""PEFT's mixed batch: `generate(adapter_names=[…, "__base__"])`, a static batch over LoRAs of one base."""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft

from benchmarks import workload
from benchmarks.backends import static_batch, worker
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome

_MIXABLE = ("LORA",)  # those of our methods that `adapter_names` accepts (peft/peft_model.py)
BASE = "__base__"


class PeftMixed:
    """PEFT with all adapters in one batch."""

    def load(self, spec: LoadSpec) -> Mapping[str, str]:
        for _, path in spec.adapters:
            peft_type = json.loads((Path(path) / "adapter_config.json").read_text())["peft_type"]
            if peft_type not in _MIXABLE:
                raise Cannot(f"adapter_names takes no {peft_type}")
        self._model = wrapped(static_batch.load(spec), spec.adapters)
        self._max_num_seqs = spec.max_num_seqs
        self._has_adapters = bool(spec.adapters)
        return {package: version(package) for package in ("peft", "torch", "transformers")}

    def run(self, trace: workload.Trace, salt: str) -> Outcome:
        del salt  # it caches nothing between calls
        return static_batch.run(trace, lambda arrived: arrived[: self._max_num_seqs], self._answer)

    def close(self) -> None:
        pass

    def _answer(self, batch: Sequence[workload.Request], keywords: dict[str, Any]) -> None:
        if any(len(request.adapters) > 1 for request in batch):
            raise Cannot("a request has one adapter at most")
        if self._has_adapters:
            keywords["adapter_names"] = [request.adapters[0] if request.adapters else BASE for request in batch]
        self._model.generate(**keywords)


def wrapped(model: Any, adapters: Sequence[tuple[str, str]]) -> Any:
    """Return `model` with PEFT's adapters around it, or unchanged if there are none."""
    if not adapters:
        return model
    (first, path), *others = adapters
    # By default PEFT holds adapters in float32, which is also faster on a CPU: 82 tokens/s against 63 in bfloat16.
    found = peft.PeftModel.from_pretrained(model, path, adapter_name=first)
    for adapter_id, other in others:
        found.load_adapter(other, adapter_name=adapter_id)
    return found.eval()


if __name__ == "__main__":
    worker.serve(PeftMixed())
