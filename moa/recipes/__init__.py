"""The table of systems: importing this package fills `RECIPES`, one file per family of rows."""

from . import choice, flylora, gates, given, hydra, mixlora, poly, remix, xcross
from .base import RECIPES, Recipe, Site, make_recipe, recipe_class, register_recipe

__all__ = [
    "RECIPES",
    "Recipe",
    "Site",
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
