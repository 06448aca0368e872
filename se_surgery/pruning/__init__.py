"""Pruning: operated networks with fewer channels, and how such a one is written down."""
