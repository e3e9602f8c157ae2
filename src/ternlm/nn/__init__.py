"""Layers: each file holds one, with its formula, shapes and source."""
