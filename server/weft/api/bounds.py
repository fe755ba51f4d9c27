"""Bounds on the repeated fields of requests, checked before anything becomes a Python object.

A message of 1 MiB may hold half a million empty entries, each of which would take a microsecond or more to convert.
Counting them takes none: the parsed message knows its own lengths.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from google.protobuf.message import Message

from weft.config import AdapterLimits, RequestLimits
from weft.errors import InvalidRequest
from weft.v1 import adapter_service_pb2, generation_pb2
from weft.v1.adapter_files import MIXTURE_FILES, PEFT_FILES


class Bound(NamedTuple):
    """Most entries of a repeated field, and the reason of the error for more."""

    most: int
    reason: str


class _Step(NamedTuple):
    """A field to look at: a repeated one with its bound, or a single message that contains such fields."""

    name: str
    bound: Bound | None
    descends: bool  # into its message, or into each of its messages


class Bounds:
    """The bounds by full name of the field. A repeated field without one is refused as a bug of ours: KeyError."""

    def __init__(self, bound_of: Mapping[str, Bound]) -> None:
        self._bound_of = bound_of
        self._steps_of: dict[str, list[_Step]] = {}

    def require(self, message: Message, path: str = "") -> None:
        """Raise InvalidRequest for the first repeated field with too many entries; `path` leads to `message`."""
        for name, bound, descends in self._steps(message.DESCRIPTOR):
            if bound is None:
                if message.HasField(name):
                    self.require(getattr(message, name), f"{path}{name}.")
                continue
            entries: Any = getattr(message, name)
            given = len(entries)
            if given > bound.most:
                rule = "has too many entries"
                raise InvalidRequest.rule(bound.reason, path + name, rule, limit=bound.most, given=given)
            if descends:
                for index, entry in enumerate(entries):
                    self.require(entry, f"{path}{name}[{index}].")

    def _steps(self, descriptor: Any) -> list[_Step]:
        """Return the fields of a message type that need a look, the same list each time."""
        steps = self._steps_of.get(descriptor.full_name)
        if steps is None:
            steps = []
            for field in descriptor.fields:
                descends = field.message_type is not None and bool(self._steps(field.message_type))
                if field.is_repeated:
                    steps.append(_Step(field.name, self._bound_of[field.full_name], descends))
                elif descends:
                    steps.append(_Step(field.name, None, descends))
            self._steps_of[descriptor.full_name] = steps
        return steps


def bounds_of(requests: RequestLimits, adapters: AdapterLimits, max_model_len: int) -> Bounds:
    """Return the bounds of one server's requests."""
    experts = Bound(adapters.num_experts_max, "STEERING_INVALID")
    stops = Bound(requests.stop_count_max, "STOP_INVALID")
    of_message = {
        generation_pb2.TokenIds: {"ids": Bound(max_model_len - 1, "PROMPT_TOO_LONG")},
        generation_pb2.Messages: {"messages": Bound(requests.messages_max, "PROMPT_TOO_LONG")},
        generation_pb2.Composition: {"adapters": Bound(requests.composition_parts_max, "COMPOSITION_INVALID")},
        generation_pb2.WeightedAdapter: {"token_ranges": Bound(requests.token_ranges_max, "COMPOSITION_INVALID")},
        generation_pb2.Stopping: {"stop": stops, "stop_token_ids": stops},
        generation_pb2.Steering: {"restrict": experts, "mask": experts, "bounds": experts},
        adapter_service_pb2.UploadHeader: {"files": Bound(len(PEFT_FILES + MIXTURE_FILES), "UPLOAD_PROTOCOL")},
    }
    return Bounds(
        {
            message.DESCRIPTOR.fields_by_name[name].full_name: bound
            for message, bounds in of_message.items()
            for name, bound in bounds.items()
        }
    )
