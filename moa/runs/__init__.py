"""Configured runs: tasks, training, evaluation, the demo."""
