"""What surgery was tried on, and what came of it: every name of timm and torchvision, as a table.

`python -m benchmarks.coverage` runs from the root of a checkout. The data goes names -> tasks -> rows -> tables, one
file each: `zoo`, `tasks`, (`planning`, `running` with `structure`) in processes of `pool`, `rows`, `render`.
"""
