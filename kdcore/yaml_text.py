"""YAML as configurations are written in it, by PyYAML with the scalars of YAML 1.2; ``kdcore.config`` reads with it."""

from __future__ import annotations

import re
from typing import Any

import yaml

# values of one text, each counted as often as it is referred to
MOST_VALUES = 100_000


def load(text: str) -> Any:
    """Return the value of a YAML text; yaml.YAMLError for what is none, or holds itself or very much by references."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    waiting, count = [value], 0
    while waiting:
        each, count = waiting.pop(), count + 1
        if count > MOST_VALUES:
            raise yaml.YAMLError(f"holds more than {MOST_VALUES:,} values, or refers to itself")
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
    return value


def dump(value: dict[str, Any]) -> str:
    """Return a mapping as YAML that ``load`` reads back as it was."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML with the scalars of version 1.2, and no name twice in a mapping.

    By 1.1 a data set called ``no`` would be False, ``12:30`` the number 750, ``2020-01-01`` a date, and ``1e-3`` text.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        for index, name in enumerate(names):
            if name in names[:index]:
                mark = node.value[index][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{name!r} stands here twice", mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what ``_Loader`` reads: quotes exactly the texts that would not come back as text."""


_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "int": (r"[-+]?[0-9]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _name, (_pattern, _first) in _SCALARS.items():
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))
# 1.1 reads 010 as eight
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
