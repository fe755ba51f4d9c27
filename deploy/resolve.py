"""Run pip, but print the versions that it would install, and install nothing.

pip resolves from the metadata at the ends of wheels, and would then fetch what is left of them: gigabytes for CUDA. And
it hashes a thousand tags for each wheel that an index lists, which is most of its time.
"""

import os
import sys
from typing import Any

from pip._internal.cli.main import main
from pip._internal.models.wheel import Wheel
from pip._internal.operations.prepare import RequirementPreparer

_known: dict[int, frozenset[Any]] = {}


def _supported(wheel: Wheel, tags: list[Any]) -> bool:
    found = _known.get(id(tags)) or _known.setdefault(id(tags), frozenset(tags))
    return not found.isdisjoint(wheel.file_tags)


def _end(preparer: RequirementPreparer, requirements: Any, *rest: object, **options: object) -> None:
    print("Would install", *("-".join(one.link.filename.split("-")[:2]) for one in requirements if one.link))
    sys.stdout.flush()
    os._exit(0)  # an exception would be logged as a failure of pip


Wheel.supported = _supported
RequirementPreparer.prepare_linked_requirements_more = _end
main([sys.argv[1], "--dry-run", "--use-feature=fast-deps", *sys.argv[2:]])
