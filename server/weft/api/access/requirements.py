"""Roles that each RPC requires. An RPC that is not listed is refused to every caller."""

from collections.abc import Mapping
from types import MappingProxyType

from weft.api.access.principal import Principal, Role
from weft.errors import PermissionDenied

PUBLIC = frozenset({"/grpc.health.v1.Health/Check"})
"""RPCs that need no token: load balancers and kubelets send none, and the answer is the status alone."""

_GENERATION, _ADAPTERS = "/weft.v1.GenerationService", "/weft.v1.AdapterService"
_GENERATE, _REGISTER = frozenset({Role.GENERATE}), frozenset({Role.REGISTER})
_ADMIN = frozenset({Role.ADMIN})
_EITHER = _GENERATE | _REGISTER  # whoever registers looks at the result

SUFFICIENT: Mapping[str, frozenset[Role]] = MappingProxyType(
    {
        f"{_GENERATION}/Generate": _GENERATE,
        f"{_GENERATION}/StreamGenerate": _GENERATE,
        f"{_GENERATION}/Tokenize": _GENERATE,
        f"{_GENERATION}/GetModelInfo": _EITHER,
        f"{_ADAPTERS}/GetAdapter": _EITHER,
        f"{_ADAPTERS}/ListAdapters": _EITHER,
        f"{_ADAPTERS}/WatchAdapters": _EITHER,
        f"{_ADAPTERS}/RegisterAdapter": _REGISTER,
        f"{_ADAPTERS}/UploadAdapter": _REGISTER,
        f"{_ADAPTERS}/UnregisterAdapter": _REGISTER,
        f"{_ADAPTERS}/LoadAdapter": _REGISTER,
        f"{_ADAPTERS}/UnloadAdapter": _REGISTER,
        f"{_ADAPTERS}/LiftQuarantine": _ADMIN,
        "/grpc.health.v1.Health/Watch": _EITHER,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": _EITHER,
    }
)
"""Roles of which one is enough, by full name of the RPC. Admin is enough for every listed one."""

MUTATIONS = frozenset(rpc for rpc, roles in SUFFICIENT.items() if roles in (_REGISTER, _ADMIN))
"""RPCs that change adapters or their place in memory."""


def require(principal: Principal, rpc: str) -> None:
    """Raise PermissionDenied if no role of the caller is enough for an RPC."""
    sufficient = SUFFICIENT.get(rpc)
    if sufficient is None:
        text = "no role may call this RPC: this server does not list it"
        raise PermissionDenied("ROLE_REQUIRED", text, metadata={"required": "none"})
    if principal.roles.isdisjoint(sufficient | {Role.ADMIN}):
        needed, held = (", ".join(sorted(roles)) for roles in (sufficient, principal.roles))
        text = f"the token must have one of the roles {needed}, or admin; it has {held}"
        raise PermissionDenied("ROLE_REQUIRED", text, metadata={"required": needed, "given": held})
