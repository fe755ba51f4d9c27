"""The check of shape types, such as `Float[Tensor, "R I"]`, in every call into weft.methods that the suite makes.

In the product a shape type is a note that no program reads (weft/methods/shapes.py). Here jaxtyping takes the place of
that module before anything imports it, and its import hook decorates every function and dataclass of weft.methods: in
one call an axis has one size. The hook leaves NamedTuples out, so that they are decorated after the import.
"""

import importlib
import pkgutil
import sys
from collections.abc import Callable
from typing import Any, get_args

import beartype
import jaxtyping

import weft.methods


def check() -> None:
    """Check every call from now on; nothing of weft.methods may have been imported before."""
    sys.modules["weft.methods.shapes"] = jaxtyping
    jaxtyping.install_import_hook("weft.methods", f"{__name__}.checked")
    for found in pkgutil.walk_packages(weft.methods.__path__, "weft.methods."):
        module = importlib.import_module(found.name)
        for record in vars(module).values():
            if isinstance(record, type) and issubclass(record, tuple) and record.__module__ == module.__name__:
                record.__new__ = staticmethod(jaxtyping.jaxtyped(record.__new__, typechecker=checked))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with a check of its shape types. pyright checks all others, and knows them better."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _has_shape(hint)}
    return beartype.beartype(function)


def _has_shape(hint: Any) -> bool:
    return (isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)) or any(
        map(_has_shape, get_args(hint))
    )
