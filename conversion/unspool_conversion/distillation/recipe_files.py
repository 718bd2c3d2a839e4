"""Recipes as YAML files, shipped or the user's own: strict about every key."""

import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from unspool.errors import UserError
from unspool_conversion.distillation.recipe import STAGES, LoraOptions, Recipe

MAX_RECIPE_BYTES = 1 << 20
_EXPONENT = re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+")


def shipped_recipes() -> list[str]:
    """The names of the recipes that come with the package."""
    return sorted(each.name.removesuffix(".yaml") for each in _folder().iterdir() if each.name.endswith(".yaml"))


def read_recipe(name_or_file: str) -> Recipe:
    """A shipped recipe by its name, or one from a .yaml file.

    Raises UserError, naming file and key, for a file that cannot be read, an unknown key or a value out of range.
    """
    if name_or_file in shipped_recipes():
        return parse_recipe((_folder() / f"{name_or_file}.yaml").read_text(encoding="utf-8"), f"{name_or_file}.yaml")
    path = Path(name_or_file)
    if not path.is_file():
        raise UserError(f"recipe {name_or_file!r} is neither a file nor one of {', '.join(shipped_recipes())}")
    if path.stat().st_size > MAX_RECIPE_BYTES:
        raise UserError(f"{path} has more than {MAX_RECIPE_BYTES} bytes; a recipe is a small YAML file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error})") from error
    return parse_recipe(text, str(path))


def parse_recipe(text: str, where: str) -> Recipe:
    """Reads the YAML of a recipe. `where` names it in errors."""
    try:
        values = yaml.load(text, _StrictLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{where} is not valid YAML ({' '.join(str(error).split())})") from error
    values = dict(_mapping(values, where))
    if values.get("lora") is not None:
        values["lora"] = _build(LoraOptions, _mapping(values["lora"], f"{where}: lora"), f"{where}: lora")
    if "stages" in values:
        if not isinstance(values["stages"], list):
            raise UserError(f"{where}: stages: must be a list")
        values["stages"] = [_stage(stage, f"{where}: stages[{i}]") for i, stage in enumerate(values["stages"])]
    recipe = _build(Recipe, values, where)
    assert isinstance(recipe, Recipe)
    return recipe


class _StrictLoader(yaml.SafeLoader):
    """Refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _folder() -> Any:
    return files("unspool_conversion") / "data" / "recipes"


def _mapping(value: object, where: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: must be a mapping of keys to values")
    return value


def _stage(value: object, where: str) -> Any:
    values = dict(_mapping(value, where))
    kind = values.pop("kind", None)
    if kind not in STAGES:
        raise UserError(f"{where}: kind {kind!r} is not one of {', '.join(STAGES)}")
    return _build(STAGES[kind], values, where)


def _build(record: type[Any], values: Mapping[Any, Any], where: str) -> Any:
    known = {each.name: each for each in fields(record)}
    if unknown := [key for key in values if key not in known]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(known))}")
    if missing := [name for name, each in known.items() if each.default is MISSING and name not in values]:
        raise UserError(f"{where}: the key {missing[0]!r} is missing")
    try:
        return record(**{key: _plain(value) for key, value in values.items()})
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _plain(value: object) -> object:
    """Lists as tuples, and 1e-3 as the number that YAML 1.1 takes for text."""
    if isinstance(value, list):
        return tuple(_plain(entry) for entry in value)
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
