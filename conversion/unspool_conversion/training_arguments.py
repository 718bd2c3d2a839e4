"""The arguments of `convert` that train: read into options, and refused where there is no recipe to train with."""

import argparse
from dataclasses import replace

import torch

from unspool.errors import UserError
from unspool_conversion.distillation.recipe import Recipe
from unspool_conversion.distillation.recipe_files import read_recipe, shipped_recipes
from unspool_conversion.trained_conversion import TrainingOptions

_NEEDS_RECIPE = ("data", "seed", "device", "resume")


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training", "of what the conversion added, towards the source, with `--recipe`")
    group.add_argument("--recipe", metavar="NAME_OR_FILE", help=f"{', '.join(shipped_recipes())}, or a .yaml file")
    group.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="TEXT",
        help='.txt, .jsonl with "text" or "messages" (each also .gz), or datasets:NAME[:SPLIT]; may be repeated',
    )
    group.add_argument("--seed", type=int, help="(default: the recipe's)")
    group.add_argument("--device", help="to train on (default: cuda where there is one, else cpu)")
    group.add_argument("--resume", action="store_true", help="continue a conversion that was stopped in its training")


def training_options(arguments: argparse.Namespace) -> TrainingOptions | None:
    """None without a recipe. Raises UserError for an unknown recipe, and for what a recipe needs or needs one."""
    if arguments.recipe is None:
        for name in _NEEDS_RECIPE:
            if getattr(arguments, name) is not None and getattr(arguments, name) is not False:
                raise UserError(f"--{name} says how to train, and there is no --recipe; pass one, or leave it out")
        return None
    if arguments.adapter is not None:
        raise UserError("--adapter brings what --recipe would train; leave one out")
    return TrainingOptions(
        recipe=_seeded(read_recipe(arguments.recipe), arguments.seed),
        texts=tuple(arguments.data or ()),
        device=arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        resume=arguments.resume,
    )


def _seeded(recipe: Recipe, seed: int | None) -> Recipe:
    try:
        return recipe if seed is None else replace(recipe, seed=seed)
    except ValueError as error:
        raise UserError(f"--{error}") from error
