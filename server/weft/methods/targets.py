"""The sites that a config means: names as path suffixes, layers by index, and values by pattern, all as in PEFT.

This module is the one definition for initial parameters, counts, training and files.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, TypeVar

from pydantic import Field

from weft.methods.protocol import BaseShape, Site, SiteKind

C = TypeVar("C")
V = TypeVar("V")

Layers = Annotated[
    tuple[int, ...],
    Field(description="Indices of the layers that take part; empty for all, and for what is outside of them."),
]
Exclude = Annotated[tuple[str, ...], Field(description="Ends of the paths of modules that are left out.")]


def names(target: str, module: str) -> bool:
    """Return whether `target` is the module's path, or a suffix that begins at a whole name (PEFT's target_modules)."""
    return module == target or module.endswith("." + target)


def any_names(targets: Iterable[str], module: str) -> bool:
    """Return whether one of `targets` names the module."""
    return any(names(target, module) for target in targets)


def decisive(patterns: Iterable[str], module: str) -> str | None:
    """Return the first of `patterns` that fits the module, as PEFT's rank_pattern and alpha_pattern do; else None.

    PEFT's rule is the regular expression `(.*\\.)?(pattern)$`. Patterns are plain paths here, so this means a suffix
    that begins at a whole name, in which a dot stands for any one character.
    """
    return next((pattern for pattern in patterns if _fits(pattern, module)), None)


def value_at(patterns: Mapping[str, V], module: str, default: V) -> V:
    """Return the value that `patterns` give the module; `default` if none fits."""
    pattern = decisive(patterns, module)
    return default if pattern is None else patterns[pattern]


def patterns_of(values: Mapping[str, V]) -> dict[str, V]:
    """Return patterns that give each module path its own value: a path that ends in another comes before that one."""
    return dict(sorted(values.items(), key=lambda entry: -len(entry[0])))


def layer_of(module: str) -> int | None:
    """Return the index of the module's decoder layer: the first number in its path; None outside of all layers."""
    return next((int(part) for part in module.split(".") if part.isdecimal()), None)


def describe(modules: Collection[str], base: BaseShape) -> tuple[str, ...]:
    """Return the shortest `target_modules` that mean exactly these modules of the base, sorted.

    An entry is a last name if every module of that name is among them, else a full path.
    """
    partial = {site.suffix for site in base.sites.values() if site.name not in modules}
    suffixes = {base.sites[module].suffix: module for module in modules}
    whole = {suffix for suffix in suffixes if suffix not in partial}
    return tuple(sorted(whole | {module for module in modules if base.sites[module].suffix in partial}))


def place(
    config: C, base: BaseShape, takes: Collection[SiteKind], usual: Collection[SiteKind] = (SiteKind.LINEAR,)
) -> tuple[C, list[Site]]:
    """Spell `target_modules` out, and return the sites: those of `takes` that the config names, else all of `usual`.

    `layers` and `exclude` take sites away. Raises ValueError naming the entry that names nothing, or the index that is
    no layer's.
    """
    given: Any = config
    sites = base.of_kind(*takes)
    named = given.target_modules or sorted({site.suffix for site in base.of_kind(*usual)})
    for target in named:
        if not any(names(target, site.name) for site in sites):
            known = ", ".join(sorted({site.suffix for site in sites}))
            raise ValueError(
                f"target_modules: must name modules of the base by the end of their paths ({known}), given {target!r}"
            )
    found = [site for site in sites if any_names(named, site.name)]
    if given.layers:
        require_layers(given.layers, base)
        found = [site for site in found if layer_of(site.name) in given.layers]
    for one in given.exclude:
        if not any(names(one, site.name) for site in found):
            raise ValueError(f"exclude: must name modules that would be adapted otherwise, given {one!r}")
    found = [site for site in found if not any_names(given.exclude, site.name)]
    if not found:
        field = "exclude" if given.exclude else "layers"
        raise ValueError(f"{field}: must leave a module to adapt; none of target_modules is left")
    modules = describe([site.name for site in found], base)
    return replace(given, target_modules=modules, layers=(), exclude=()), found


def require_layers(layers: Iterable[int], base: BaseShape) -> None:
    """Raise ValueError for the first index that is no layer of the base."""
    for layer in layers:
        if not 0 <= layer < base.num_layers:
            raise ValueError(f"layers: must be indices 0 to {base.num_layers - 1} of the base's layers, given {layer}")


def require_named(field: str, ends: Iterable[str], sites: Iterable[Site]) -> None:
    """Raise ValueError for the first of `ends` that names none of `sites`."""
    modules = [site.name for site in sites]
    for one in ends:
        if not any(names(one, module) for module in modules):
            raise ValueError(f"{field}: must name adapted modules by the end of their paths, given {one!r}")


def require_decisive(field: str, patterns: Mapping[str, object], sites: Iterable[Site]) -> None:
    """Raise ValueError for the first pattern that decides nothing at `sites`."""
    modules = [site.name for site in sites]
    used = {decisive(patterns, module) for module in modules}
    for pattern in patterns:
        if pattern in used:
            continue
        rivals = [decisive(patterns, module) for module in modules if _fits(pattern, module)]
        if rivals:
            raise ValueError(
                f"{field}: {pattern!r} decides nothing, since {rivals[0]!r} comes first; put the longer path first"
            )
        raise ValueError(
            f"{field}: must hold ends of the paths of adapted modules, such as {modules[0]}; "
            f"{pattern!r} is the end of none"
        )


def _fits(pattern: str, module: str) -> bool:
    before, tail = module[: -len(pattern)], module[-len(pattern) :]
    if len(tail) != len(pattern) or (before and not before.endswith(".")):
        return False
    return all(expected in (".", given) for expected, given in zip(pattern, tail, strict=True))
