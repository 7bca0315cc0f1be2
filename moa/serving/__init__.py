"""Serving: mixtures in the engines that people run, many adapters in one process."""
