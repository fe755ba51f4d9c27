"""Who calls: the tenant, the roles, and how they were established."""

from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

from weft.adapters.identifiers import Scope


class Role(StrEnum):
    """A kind of rights; `weft.api.access.requirements` lists the RPCs of each."""

    GENERATE = "generate"
    REGISTER = "register"
    ADMIN = "admin"


class Via(StrEnum):
    """How a caller was identified."""

    OPEN = "open"  # the server has no token file
    TOKEN = "token"  # noqa: S105  # the name of a way, not a secret


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """The caller of an RPC. `token_id` is the public part of the token, "" without one."""

    tenant: str
    roles: frozenset[Role]
    token_id: str
    via: Via


ANYBODY = Principal(tenant="", roles=frozenset(Role), token_id="", via=Via.OPEN)
"""Every caller of a server without a token file."""

CALLER: ContextVar[Principal] = ContextVar("weft_caller")
"""The caller of the RPC that the current task answers, set by `weft.api.access.gate` alone; public RPCs have none."""


def caller_scope() -> Scope:
    """Return the adapters that the caller of the current RPC can name and see; outside of one, those of no tenant."""
    caller = CALLER.get(ANYBODY)
    return Scope(caller.tenant, sees_all=caller.via is Via.TOKEN and Role.ADMIN in caller.roles)
