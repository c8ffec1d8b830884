"""All options in one frozen value, and the one function that reads them from a mapping and the environment.

Option names are the leaf field names of `Config` and its parts; `INFERCOMP_<NAME>` is the environment
variable of the same option. Types come from the fields, so a new field is a new option and nothing else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, NamedTuple, TypeGuard

from infercomp.codegen.config import CodegenConfig
from infercomp.passes.config import PassConfig, nearest_name
from infercomp.passes.grouped_query import GroupedQuery, grouped_query_of
from infercomp.passes.linear_recipes import Recipe
from infercomp.passes.n_m_sparsity import NM, nm_of
from infercomp.passes.recipes import recipe_from_json
from infercomp.runtime.config import RuntimeConfig, describe
from infercomp.runtime.errors import ConfigError

ENVIRONMENT_PREFIX = "INFERCOMP_"


@dataclass(frozen=True)
class Config:
    """Every choice that one compilation depends on; each layer is handed its own part only."""

    passes: PassConfig = field(default_factory=PassConfig)
    """What the pass pipeline may do."""

    codegen: CodegenConfig = field(default_factory=CodegenConfig)
    """How what the passes left is executed."""

    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """Sizes of the KV cache and of a step."""

    strict: bool = False
    """Whether running anything outside of infercomp's own pipeline is an error instead of a line in the report."""

    dump: str | None = field(default=None, metadata={"affects_compilation": False})
    """Folder that receives the graph after each pass, the kernels and the report; None means no dump."""

    offload_folder: str | None = field(default="auto", metadata={"affects_compilation": False})
    """Folder in which weights wait while a model is compiled; "auto" is that of the kernels, where text is learnt from;
    None keeps all in memory."""

    def __post_init__(self) -> None:
        for name, wanted in _field_types(Config).items():
            value = getattr(self, name)
            if not _is_part(wanted):
                _check_type(name, value, wanted)
            elif not isinstance(value, wanted):
                raise _wrong_type(name, value, f"a {wanted.__name__}", where=None)
        for name in ("dump", "offload_folder"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} must be the name of a folder or None, not ''", field=name)

    def fingerprint(self) -> str:
        """SHA-256 of canonical JSON over all fields, save those that say they do not affect compilation.

        A field whose value stands for something else, a folder for its files, says so by ``fingerprint``.
        """
        canonical = json.dumps(_compilation_fields(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def parse_options(options: Mapping[str, object] | None = None, environ: Mapping[str, str] | None = None) -> Config:
    """Build a `Config` from flat option names and INFERCOMP_* variables; an option wins over its variable.

    `environ` is the process's own environment if not given. A variable set to nothing counts as unset.
    """
    types = option_types()
    values, places = _read_environment(os.environ if environ is None else environ, types)
    for name, value in (options or {}).items():
        if name not in types:
            raise _unknown_name(f"option {name!r}", nearest_name(str(name), types), list(types), field=str(name))
        values[name] = _read_option(name, value, types[name])
        places[name] = f"option {name!r}"
    try:
        config: Config = _build(Config, values)
    except ConfigError as error:
        where = places.get(error.field or "", error.where)
        raise ConfigError(error.what, where=where, remedy=error.remedy, field=error.field) from None
    return config


def option_types() -> dict[str, Any]:
    """Every option with its type, as the leaf fields of `Config` declare them."""
    return dict(_leaf_types(Config))


class _Kind(NamedTuple):
    """How values of one field type are described, told from others, and read from text."""

    description: str
    accepts: Callable[[object], bool]
    parse: Callable[[str], object]


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("1", "true", "yes", "on", "0", "false", "no", "off"):
        raise ValueError(text)
    return text.lower() in ("1", "true", "yes", "on")


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _is_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(part, str) for part in value)


# bool is a subclass of int, and True is no size.
_KINDS: dict[Any, _Kind] = {
    bool: _Kind("true or false", lambda value: isinstance(value, bool), _parse_bool),
    int: _Kind("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool), int),
    str: _Kind("a string", lambda value: isinstance(value, str), str),
    tuple[str, ...]: _Kind("a list of names", _is_names, _parse_names),
    NM: _Kind("an NM", lambda value: isinstance(value, NM), nm_of),
    GroupedQuery: _Kind("a GroupedQuery", lambda value: isinstance(value, GroupedQuery), grouped_query_of),
    Recipe: _Kind("a recipe", lambda value: isinstance(value, Recipe), recipe_from_json),
}


def _read_environment(environ: Mapping[str, str], types: Mapping[str, Any]) -> tuple[dict[str, object], dict[str, str]]:
    """Values by option name, and where each was found."""
    values: dict[str, object] = {}
    places: dict[str, str] = {}
    names = {_variable_name(name): name for name in types}
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        if variable not in names:
            nearest = _variable_name(nearest_name(variable.removeprefix(ENVIRONMENT_PREFIX), types))
            raise _unknown_name(f"environment variable {variable}", nearest, list(names), field=variable)
        text = environ[variable].strip()
        if text:
            name = names[variable]
            places[name] = f"environment variable {variable}"
            values[name] = _parse_text(name, text, types[name], where=places[name])
    return values, places


def _variable_name(option: str) -> str:
    return ENVIRONMENT_PREFIX + option.upper()


def _read_option(name: str, value: object, wanted: Any) -> object:
    """The value as its field takes it: names may come as text or as a list."""
    if tuple[str, ...] in _alternatives(wanted):
        if isinstance(value, str):
            value = _parse_names(value)
        elif isinstance(value, list):
            value = tuple(value)
    _check_type(name, value, wanted, where=f"option {name!r}")
    return value


def _parse_text(name: str, text: str, wanted: Any, where: str) -> object:
    """The value that text from the environment stands for; there is no text for None: leave the variable unset.

    Of several types it is read as the first.
    """
    kind = next(_KINDS[one] for one in _alternatives(wanted) if one is not NoneType)
    try:
        return kind.parse(text)
    except ValueError:
        raise _wrong_type(name, text, kind.description, where) from None


def _check_type(name: str, value: object, wanted: Any, where: str | None = None) -> None:
    allowed = _alternatives(wanted)
    if value is None and NoneType in allowed:
        return
    if not any(_KINDS[one].accepts(value) for one in allowed if one is not NoneType):
        described = " or ".join("None" if one is NoneType else _KINDS[one].description for one in allowed)
        raise _wrong_type(name, value, described, where)


def _wrong_type(name: str, value: object, described: str, where: str | None) -> ConfigError:
    return ConfigError(f"{name} must be {described}, not {describe(value)}", where=where, field=name)


def _unknown_name(given: str, nearest: str, known: list[str], field: str) -> ConfigError:
    remedy = f"did you mean {nearest!r}? valid: {', '.join(known)}"
    return ConfigError(f"unknown {given}", remedy=remedy, field=field)


def _alternatives(wanted: Any) -> tuple[Any, ...]:
    """The members of a union, or the type alone."""
    if typing.get_origin(wanted) in (typing.Union, UnionType):
        return typing.get_args(wanted)
    return (wanted,)


def _is_part(wanted: Any) -> TypeGuard[type]:
    return dataclasses.is_dataclass(wanted)


def _field_types(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    return {each.name: hints[each.name] for each in dataclasses.fields(config_class)}


def _leaf_types(config_class: type) -> Iterator[tuple[str, Any]]:
    for name, wanted in _field_types(config_class).items():
        if _is_part(wanted):
            yield from _leaf_types(wanted)
        else:
            yield name, wanted


def _build(config_class: type, values: Mapping[str, object]) -> Any:
    arguments: dict[str, object] = {}
    for name, wanted in _field_types(config_class).items():
        if _is_part(wanted):
            arguments[name] = _build(wanted, values)
        elif name in values:
            arguments[name] = values[name]
    return config_class(**arguments)


def _compilation_fields(config: Any) -> dict[str, object]:
    result: dict[str, object] = {}
    for each in dataclasses.fields(config):
        if each.metadata.get("affects_compilation", True):
            value = getattr(config, each.name)
            value = each.metadata.get("fingerprint", lambda value: value)(value)
            result[each.name] = _compilation_fields(value) if dataclasses.is_dataclass(value) else value
    return result
