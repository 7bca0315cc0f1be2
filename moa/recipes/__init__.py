"""The table of systems: importing this package fills `RECIPES`, one file per family of rows."""

from ..mixture import Site
from . import encoder_gates as choice
from . import flylora, gates, given, hydra, mixlora, poly, remix, xcross
from .recipe import RECIPES, Recipe, TopKRecipe, make_recipe, recipe_class, register_recipe

__all__ = [
    "RECIPES",
    "Recipe",
    "Site",
    "TopKRecipe",
    "choice",
    "flylora",
    "gates",
    "given",
    "hydra",
    "make_recipe",
    "mixlora",
    "poly",
    "recipe_class",
    "register_recipe",
    "remix",
    "xcross",
]
