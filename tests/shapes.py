"""The check of shape types, such as `Float[Tensor, "R I"]`, in every call into weft.methods that the suite makes.

In the product a shape type is a note that no program reads (weft/methods/shapes.py). Here jaxtyping takes the place of
that module before anything imports it, and its import hook passes each function and class to `checked`: in one call an
axis has one size.
"""

import sys
from typing import Any, get_args

import beartype
import jaxtyping
from jaxtyping import jaxtyped


def check() -> None:
    """Check every call from now on; nothing of weft.methods may have been imported before."""
    sys.modules["weft.methods.shapes"] = jaxtyping
    # The hook decorates with `jaxtyping.jaxtyped`, which leaves NamedTuples out, and takes a millisecond for a function
    # inside of another each time that the outer one is called.
    jaxtyping.jaxtyped = lambda *, typechecker: checked
    jaxtyping.install_import_hook("weft.methods", "beartype.beartype")


def checked(target: Any) -> Any:
    """Return a function or property with a check, and put one into a class that is made from fields; in place.

    Those without shape types stay as they are, and so do functions inside of others.
    """
    if isinstance(target, type):
        maker = "__new__" if issubclass(target, tuple) else "__init__"
        make = getattr(target, maker)
        if _has_shapes(make):
            check = jaxtyped(make, typechecker=_by_shape)
            setattr(target, maker, staticmethod(check) if maker == "__new__" else check)
        return target
    function = target.fget if isinstance(target, property) else target
    is_inside = "<locals>" in function.__qualname__
    return jaxtyped(target, typechecker=_by_shape) if _has_shapes(function) and not is_inside else target


def _by_shape(function: Any) -> Any:
    """Return `function` with a check of its shape types alone: pyright checks all others, and knows them better."""
    function.__annotations__ = {name: hint for name, hint in function.__annotations__.items() if _is_shape(hint)}
    return beartype.beartype(function)


def _has_shapes(function: Any) -> bool:
    return any(map(_is_shape, getattr(function, "__annotations__", {}).values()))


def _is_shape(hint: Any) -> bool:
    """Return whether a type is a shape type, or holds one."""
    is_one = isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray)
    return is_one or any(map(_is_shape, get_args(hint)))
