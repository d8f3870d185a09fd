"""Settings files: YAML or JSON in, checked values or one line per fault out. Knows no particular setting."""
from __future__ import annotations

import difflib
import json
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A settings file that cannot be used; the message has one line per fault."""


class _Loader(yaml.SafeLoader):
    """YAML with version 1.2's scalars: `no` is a word, `1e-3` a number, a date text; and no key twice."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^([Tt]rue|[Ff]alse)$"), list("tfTF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d[\d_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.[\d_]*|\.\d+|\d[\d_]*(?=[eE]))([eE][-+]?\d+)?$"), list("-+.0123456789"))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise ConfigError(f"line {key.start_mark.line + 1}: key {key.value!r} is given twice")
        seen.add(key.value)
    loader.flatten_mapping(node)
    return {str(loader.construct_object(key, True)): loader.construct_object(value, True)
            for key, value in node.value}


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value.replace("_", ""))                  # YAML 1.1 would read 010 as eight


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a .yaml, .yml or .json file. Raises ConfigError naming the file and the line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.load(text, Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file") from None
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read ({fault.strerror})") from None
    except UnicodeDecodeError as fault:
        raise ConfigError(f"{path}: byte {fault.start} is not UTF-8 text") from None
    except json.JSONDecodeError as fault:
        raise ConfigError(f"{path}: line {fault.lineno}: not JSON ({fault.msg})") from None
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{path}: {where}not YAML ({getattr(fault, 'problem', None) or fault})") from None
    except ConfigError as fault:
        raise ConfigError(f"{path}: {fault}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds {_kind(values)}; needs a mapping of keys to values")
    return values


def parse(model: type[Model], values: Mapping[str, Any], source: str | Path) -> Model:
    """Check `values` against `model`, strictly. Raises ConfigError, a line per fault, naming `source`."""
    try:
        return model.model_validate_json(json.dumps(values), strict=True)   # in JSON a list may fill a tuple
    except ValidationError as fault:
        raise ConfigError("\n".join(f"{source}: {line}" for line in fault_lines(fault, model))) from None


def fault_lines(fault: ValidationError, model: type[BaseModel]) -> list[str]:
    """One line per fault: the key as one would write it, the value, and what is allowed."""
    lines = [_line(error, model) for error in fault.errors(include_url=False)]
    return list(dict.fromkeys(lines))


def nearest(word: str, allowed: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing when no allowed word is close."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _line(error: Any, model: type[BaseModel]) -> str:
    kind, loc, value, context = error["type"], list(error["loc"]), error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        allowed = _fields_at(model, loc[:-1])
        where = f"{_dotted(loc[:-1])}: " if loc[:-1] else ""
        near = nearest(str(loc[-1]), allowed)
        return f"{where}unknown key {loc[-1]!r}{near}; allowed: {', '.join(allowed)}"
    where = f"{_dotted(loc)}: " if loc else ""
    if kind == "missing":
        return f"{where}is missing"
    if kind == "value_error":
        return f"{where}{context['error']}"
    if kind == "literal_error":
        allowed = context["expected"].replace("'", "").replace(" or ", ", ")
        return f"{where}{value!r} is not one of {allowed}{nearest(str(value), allowed.split(', '))}"
    if kind == "too_short":
        return f"{where}{json.dumps(value)} is too short; needs at least {context['min_length']}"
    if kind in _WANTED:
        return f"{where}{value!r} is not {_WANTED[kind]}"
    if kind in _BOUNDS:
        words, key = _BOUNDS[kind]
        return f"{where}{value!r} is not {words} {context[key]}"
    return f"{where}{value!r}: {error['msg']}"


_WANTED = {"int_type": "an integer", "int_parsing": "an integer", "int_from_float": "an integer",
           "float_type": "a number", "float_parsing": "a number", "finite_number": "a finite number",
           "bool_type": "true or false", "bool_parsing": "true or false", "string_type": "text",
           "tuple_type": "a list", "list_type": "a list", "dict_type": "a mapping", "model_type": "a mapping",
           "model_attributes_type": "a mapping"}

_BOUNDS = {"greater_than": ("above", "gt"), "greater_than_equal": ("at least", "ge"),
           "less_than": ("below", "lt"), "less_than_equal": ("at most", "le")}


def _dotted(loc: list) -> str:
    """`main.seeds[1]`; drops the branch names that pydantic adds inside a union."""
    text = ""
    for part in loc:
        if isinstance(part, int):
            text += f"[{part}]"
        elif re.fullmatch(r"str|tuple\[.*\]|int|float|bool", part):
            continue
        else:
            text += f".{part}" if text else part
    return text


def _fields_at(model: Any, loc: list) -> list[str]:
    """Field names of the model found by walking `loc` from `model`."""
    for part in loc:
        if isinstance(model, type) and issubclass(model, BaseModel):
            model = model.model_fields[part].annotation
        else:                                                # dict[str, X] or tuple[X, ...]
            arguments = typing.get_args(model)
            model = arguments[1] if typing.get_origin(model) is dict else arguments[0]
        if isinstance(model, types.UnionType):               # X | None
            model = typing.get_args(model)[0]
    return list(model.model_fields)


def _kind(value: Any) -> str:
    names = {type(None): "nothing", list: "a list", str: "text", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)
