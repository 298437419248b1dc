"""Measurements behind the numbers in the docs; each is a command."""
