"""PEFT with one adapter at a time: `set_adapter`, then a static batch of the requests that name it.

It is the only way for methods that PEFT cannot mix, such as IA³ and prefixes.
"""

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import workload
from benchmarks.backends import static_batch, worker
from benchmarks.backends.peft_mixed import wrapped
from benchmarks.backends.worker import Cannot, LoadSpec, Outcome

_SERVED = ("LORA", "IA3", "PREFIX_TUNING")


class PeftGrouped:
    """PEFT with a batch for each adapter."""

    def load(self, spec: LoadSpec) -> Mapping[str, str]:
        kinds = set()
        for _, path in spec.adapters:
            kinds.add(json.loads((Path(path) / "adapter_config.json").read_text())["peft_type"])
        for peft_type in kinds:
            if peft_type not in _SERVED:
                raise Cannot(f"PEFT has no {peft_type}")
        if len(kinds) > 1:
            raise Cannot("one PEFT model holds adapters of one kind here")
        self._model = wrapped(static_batch.load(spec), spec.adapters)
        self._max_num_seqs = spec.max_num_seqs
        self._has_adapters = bool(spec.adapters)
        return {package: version(package) for package in ("peft", "torch", "transformers")}

    def run(self, trace: workload.Trace, salt: str) -> Outcome:
        del salt  # it caches nothing between calls
        return static_batch.run(trace, self._take, self._answer)

    def close(self) -> None:
        pass

    def _take(self, arrived: Sequence[workload.Request]) -> Sequence[workload.Request]:
        alike = [request for request in arrived if request.adapters == arrived[0].adapters]
        return alike[: self._max_num_seqs]

    def _answer(self, batch: Sequence[workload.Request], keywords: dict[str, Any]) -> None:
        adapters = batch[0].adapters
        if len(adapters) > 1:
            raise Cannot("a request has one adapter at most")
        if adapters:
            self._model.set_adapter(adapters[0])
            self._model.generate(**keywords)
        elif self._has_adapters:
            with self._model.disable_adapter():
                self._model.generate(**keywords)
        else:
            self._model.generate(**keywords)


if __name__ == "__main__":
    worker.serve(PeftGrouped())
