"""Routing as a person sees it: loads, run logs, figures, reports."""
