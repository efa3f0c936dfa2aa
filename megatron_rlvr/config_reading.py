"""From YAML and dotted overrides to a dataclass; knows no key of its own.

Every mistake is a ConfigError that names the key, the rule, the value and the way out.
"""

from __future__ import annotations

import difflib
import math
import os
import types
import typing
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml


class ConfigError(ValueError):
    """A configuration that cannot run; the message is meant for the person who wrote it."""


def rule(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless the rule holds."""
    if not condition:
        raise ConfigError(message)


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has twice: YAML's own reader forgets the first, and all that stands below it."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is there twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_tree(path: Path, includers: tuple[Path, ...] = ()) -> dict:
    """The file's keys over those of its bases; ``includers`` are the files that lead here. Raises ConfigError."""
    if path.resolve() in includers:
        raise ConfigError(f"{path} includes itself: {' -> '.join(str(item) for item in (*includers, path.resolve()))}")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        by = f", a base of {includers[-1]}" if includers else ""
        raise ConfigError(f"cannot read the config {path}{by}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}): save it as UTF-8"
        ) from error
    try:
        tree = yaml.load(text, _Loader) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} must hold a mapping of keys to values, not a {type(tree).__name__}")
    bases = tree.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ConfigError(f"{path}: base must be the name of a config file or a list of them, not {bases!r}")
    merged: dict = {}
    for base in bases:
        _merge(merged, read_tree(path.parent / base, (*includers, path.resolve())))
    _merge(merged, tree)
    return merged


def _merge(into: dict, tree: dict) -> None:
    """The keys of ``tree`` over those of ``into``, level by level; a YAML alias gets keys of its own, to override."""
    for key, value in tree.items():
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
            _merge(into[key], value)
        else:
            into[key] = value


def apply_override(tree: dict, override: str) -> None:
    """Set one ``key.sub=value`` in the tree. Raises ConfigError."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} must look like key.sub=value")
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        if node.get(parent) is None:  # as a section whose keys are all commented out
            node[parent] = {}
        node = node[parent]
        rule(isinstance(node, dict), f"override {override!r}: {parent!r} holds a value, not keys: {node!r}")
    try:
        node[leaf] = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: {text!r} is not a YAML value") from error


def from_dict(cls: type, tree: Any, path: str = "") -> Any:
    """A mapping -> a dataclass of type ``cls``; ``path`` is what errors call it ("exploration.lp_reg")."""
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path or 'the config'} must be a mapping of keys to values, not {tree!r}")
    hints = typing.get_type_hints(cls)
    known = [item.name for item in fields(cls)]
    values = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else str(key)
        if key not in known:
            raise ConfigError(f"unknown key {name!r}{_closest(str(key), known, path)}")
        values[key] = _convert(hints[key], value, name)
    for item in fields(cls):
        has_default = item.default is not MISSING or item.default_factory is not MISSING
        rule(item.name in values or has_default, f"{path}.{item.name} has no default: set it".lstrip("."))
    try:
        return cls(**values)
    except ConfigError:
        raise
    except ValueError as error:  # of a method's own __post_init__
        raise ConfigError(f"{path}: {error}") from error


def _closest(key: str, known: list[str], path: str) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    prefix = f"{path}." if path else ""
    return f"; did you mean {prefix + close[0]!r}?" if close else f"; {path} takes no keys"


def _convert(hint: Any, value: Any, name: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if is_dataclass(hint):
        return from_dict(typing.cast(type, hint), value, name)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name} must be one of {', '.join(map(repr, arguments))}, not {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, name)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{name} must be a list, not {value!r}")
        return [_convert(arguments[0], item, f"{name}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        return _convert_dict(arguments, value, name)
    if not isinstance(hint, type):
        raise ConfigError(
            f"{name} is declared as {hint}, which no YAML value is: declare it as bool, int, float, str, list, dict, "
            f"Literal or a dataclass"
        )
    return _convert_scalar(hint, value, name)


def _convert_dict(arguments: tuple, value: Any, name: str) -> dict:
    if value is None:  # `exploration: null` takes away what a base file switched on
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{name} must be a mapping, not {value!r}")
    if arguments[1] is not dict:
        return {key: _convert(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    for key, item in value.items():  # sections, of which a file may leave out one that its base has
        rule(
            item is not None,
            f"{name}.{key} is null, which could mean on or off: write {{}} for its defaults, false to leave it out",
        )
        rule(
            item is False or isinstance(item, dict),
            f"{name}.{key} must be a mapping, not {item!r}: write {{}} for its defaults, false to leave it out",
        )
    return {key: item for key, item in value.items() if item is not False}


def _convert_union(arguments: tuple, value: Any, name: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    problems = []
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return _convert(argument, value, name)
        except ConfigError as error:
            problems.append(str(error))
    raise ConfigError("; or ".join(problems))


def _convert_scalar(hint: Any, value: Any, name: str) -> Any:
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        with suppress(ValueError):  # YAML 1.1 reads 1e-6 as text
            value = float(value)
    if hint is float and isinstance(value, float):
        rule(math.isfinite(value), f"{name} must be a finite number, not {value}")
    if hint is str and value is None:  # `key=` on the command line, `key:` in the file
        return ""
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        quoted = f": write it in quotes that YAML sees, {name}='\"{value}\"'" if hint is str else ""
        raise ConfigError(f"{name} must be of type {hint.__name__}, not {value!r}{quoted}")
    if isinstance(value, str) and value.startswith("~/"):  # a shell leaves it as it is behind `key=`
        return os.path.expanduser(value)
    return value
