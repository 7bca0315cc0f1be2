"""The table of systems: importing this package fills `RECIPES`, one file per family of rows."""

from . import flylora, gates, hydra, poly, remix
from .base import RECIPES, Recipe, Site, make_recipe, recipe_class, register_recipe

__all__ = [
    "RECIPES",
    "Recipe",
    "Site",
    "flylora",
    "gates",
    "hydra",
    "make_recipe",
    "poly",
    "recipe_class",
    "register_recipe",
    "remix",
]
