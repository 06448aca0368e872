"""Time and memory of networks with SEs: this library's, timm's own, and what others write by hand, beside the base.

The data's way: `peers` makes the networks, `measure` runs them and makes rows, `document` writes docs/benchmarks.md and
its figure from the rows.
"""
