"""Command-line flags from the fields of a frozen dataclass, so that an option is defined once. Knows no option."""

import argparse
import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from unspool.errors import UserError
from unspool.sizes import ByteSize, parse_size

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Options = TypeVar("Options", bound="DataclassInstance")

SCALARS = (int, float, str, Path)


def add_flags(
    parser: argparse._ActionsContainer, cls: "type[DataclassInstance]", defaults: Mapping[str, Any] | None = None
) -> None:
    """Adds `--field-name` for every field of `cls` but those with metadata {"flag": False}.

    Types int, float, str, Path, ByteSize, bool (`--x` and `--no-x`), Literal, and any of these or None. Help is
    metadata["help"].
    `defaults` replaces the class's own. A flag that is not given and has no default there leaves nothing in the
    parsed namespace: `from_flags` lets the class fill it in. Raises TypeError for a field of another type and
    ValueError when `defaults` names what is no flag.
    """
    overrides = dict(defaults or {})
    hints = get_type_hints(cls)
    for field in _flag_fields(cls):
        options = _value_options(field.name, hints[field.name])
        default = overrides.pop(field.name, MISSING)
        options["default"] = argparse.SUPPRESS if default is MISSING else default
        shown = _class_default(field) if default is MISSING else default
        options["required"] = shown is MISSING
        options["help"] = _help(field, shown)
        parser.add_argument(f"--{field.name.replace('_', '-')}", dest=field.name, **options)
    if overrides:
        raise ValueError(f"{cls.__name__} has no flag for {', '.join(sorted(overrides))}")


def from_flags(
    args: argparse.Namespace, cls: type[Options], defaults: Mapping[str, Any] | None = None, **values: Any
) -> Options:
    """A `cls` of the flags given; `defaults` fills those that were not, `values` sets fields that are no flags.

    Raises UserError when the class refuses the values with a ValueError.
    """
    names = {field.name for field in _flag_fields(cls)}
    given = {name: value for name, value in vars(args).items() if name in names}
    try:
        return cls(**(dict(defaults or {}) | given | values))
    except ValueError as error:
        raise UserError(str(error)) from error


def _flag_fields(cls: "type[DataclassInstance]") -> list[Field[Any]]:
    return [field for field in fields(cls) if field.init and field.metadata.get("flag", True)]


def _value_options(name: str, hint: Any) -> dict[str, Any]:
    """What argparse needs to read a value of this type."""
    hint = _without_none(hint)
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if get_origin(hint) is Literal:
        return {"type": type(get_args(hint)[0]), "choices": get_args(hint)}
    if hint is ByteSize:
        return {"type": _size, "metavar": "SIZE"}
    if hint in SCALARS:
        return {"type": hint, "metavar": "PATH" if hint is Path else name.rsplit("_", 1)[-1].upper()}
    raise TypeError(f"field {name} has type {hint}, of which no flag can be made; give it metadata={{'flag': False}}")


def _size(text: str) -> ByteSize:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _without_none(hint: Any) -> Any:
    if get_origin(hint) not in (types.UnionType, Union):
        return hint
    members = [member for member in get_args(hint) if member is not types.NoneType]
    return members[0] if len(members) == 1 else hint


def _class_default(field: Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _help(field: Field[Any], default: Any) -> str:
    """The field's help with its default, unless that is absent or says nothing."""
    text = str(field.metadata.get("help", ""))
    if default is not MISSING and default is not None:
        text = f"{text} (default: {default})".strip()
    return text.replace("%", "%%")
