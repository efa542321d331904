"""An option is declared once, as a field of a dataclass.

    @dataclass(frozen=True)
    class MaskingConfig(Settings):
        unit: str = option("what is masked as a whole", "token", name="masking", choices=MASKING_UNITS)

makes `--masking`, its help, its check, its place in config.json and its row of docs/options.md.
"""

from __future__ import annotations

import argparse
import math
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ds_roberta.errors import UserError

Check = Callable[[str, Any], None]
"""Raises `UserError` for a bad value, given its option's name, such as "--seed", and the value."""
Group = TypeVar("Group", bound="Settings")
_DECLARED, _FIELDS = "option", "__dataclass_fields__"


def option(
    text: str,
    default: Any = MISSING,
    *,
    name: str | None = None,
    choices: Collection[str] | None = None,
    check: Check | None = None,
    **keywords: Any,
) -> Any:
    """A field that is an option of a command.

    Args:
        text: the help, to which a default that is not None is added.
        default: the field's default; without one, the option is None until the program resolves it.
        name: the option's name, if it differs from the field's.
        check: checks a value that is not None.
        keywords: for `add_argument`, such as `required`, `metavar` or a `type` that the annotation does not give.
    """
    declared = {"help": text, "name": name, "choices": choices, "check": check, "keywords": keywords}
    return field(default=default, metadata={_DECLARED: declared})


@dataclass(frozen=True)
class Settings:
    """A group of settings; its options' choices and checks hold for every instance."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value, declared = getattr(self, each.name), each.metadata.get(_DECLARED)
            if declared is None or value is None:
                continue
            name = f"--{declared['name'] or each.name}"
            if declared["choices"] is not None:
                require_one_of(name, value, declared["choices"])
            if declared["check"] is not None:
                declared["check"](name, value)

    @classmethod
    def from_options(cls: type[Group], options: Mapping[str, Any], **given: Any) -> Group:
        """An instance, nested groups included, from values by their options' names; None means the default.

        Args:
            given: values of fields, instead of their options'.

        Raises:
            UserError: a value fails its check.
        """
        kinds = get_type_hints(cls)
        for each in fields(cls):
            if each.name in given:
                continue
            if _DECLARED in each.metadata:
                value = options[each.metadata[_DECLARED]["name"] or each.name]
                if value is not None or each.default is MISSING:
                    given[each.name] = value
            elif _is_group(kinds[each.name]):
                given[each.name] = kinds[each.name].from_options(options)
        return cls(**given)


@dataclass(frozen=True)
class Option:
    """A declared option.

    Attributes:
        place: names of the fields that lead to it from the outermost group.
        group: the class that declares it.
        kind: the type of its values that are not None.
    """

    name: str
    place: tuple[str, ...]
    group: type[Settings]
    kind: Any
    field: Field[Any]

    @property
    def default(self) -> Any:
        return None if self.field.default is MISSING else self.field.default

    def add_to(self, parser: argparse._ActionsContainer) -> None:
        declared = self.field.metadata[_DECLARED]
        if self.kind is bool:
            parser.add_argument(f"--{self.name}", action="store_true", help=declared["help"], **declared["keywords"])
            return
        shown = "" if self.default is None else f" (default: {self.default})"
        keywords = {"type": self.kind, "default": self.default, "choices": declared["choices"], **declared["keywords"]}
        parser.add_argument(f"--{self.name}", help=declared["help"] + shown, **keywords)


def options_of(group: type[Settings], place: tuple[str, ...] = ()) -> Iterator[Option]:
    """The options of a group and of the groups in it, a group's own first."""
    kinds = get_type_hints(group)
    for each in fields(group):
        if _DECLARED in each.metadata:
            name = each.metadata[_DECLARED]["name"] or each.name
            declaring = next(base for base in reversed(group.__mro__) if each.name in getattr(base, _FIELDS, ()))
            yield Option(name, (*place, each.name), declaring, _without_none(kinds[each.name]), each)
    for each in fields(group):
        if _DECLARED not in each.metadata and _is_group(kinds[each.name]):
            yield from options_of(kinds[each.name], (*place, each.name))


def add_options(parser: argparse.ArgumentParser, *groups: type[Settings], only: Collection[str] | None = None) -> None:
    """Add the options of groups to a command, under a heading for each class that declares some.

    Args:
        groups: an option that several of them inherit is added once.
        only: the names of those to add; None: all.
    """
    headings: dict[type[Settings], argparse._ActionsContainer] = {}
    for each in {each.name: each for group in groups for each in options_of(group)}.values():
        if only is not None and each.name not in only:
            continue
        if only is None and each.group not in headings:
            headings[each.group] = parser.add_argument_group(_heading(each.group))
        each.add_to(headings.get(each.group, parser))


def _heading(group: type[Settings]) -> str:
    return (group.__doc__ or "").partition("\n")[0].partition(";")[0].rstrip(".")


def _is_group(kind: Any) -> bool:
    return get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Settings)


def _without_none(kind: Any) -> Any:
    """The type without None, such as `int` for `int | None`."""
    if get_origin(kind) is types.UnionType:
        (kind,) = (each for each in get_args(kind) if each is not types.NoneType)
    return kind


def must_be(description: str, holds: Callable[[Any], bool]) -> Check:
    """A check whose error says what the value must be."""

    def check(name: str, value: Any) -> None:
        if not holds(value):
            raise UserError(f"{name} must be {description}, got {value!r}")

    return check


require_positive = must_be(
    "a positive whole number", lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 1
)
require_positive_number = must_be("a positive number", lambda value: 0 < value < math.inf)
require_share = must_be("from 0 to 1", lambda value: 0 <= value <= 1)
require_open_share = must_be("above 0 and below 1", lambda value: 0 < value < 1)
require_fraction = must_be("at least 0 and below 1", lambda value: 0 <= value < 1)


def require_one_of(name: str, value: str, known: Collection[str]) -> None:
    """Raise `UserError` unless `value` is one of `known`."""
    must_be(f"one of {', '.join(known)}", lambda value: value in known)(name, value)
