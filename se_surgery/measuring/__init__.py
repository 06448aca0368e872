"""Measuring: what a model costs, counted and timed."""
