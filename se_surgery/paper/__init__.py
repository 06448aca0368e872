"""The paper's tables, with what is counted here beside its figures.

`printed` (the paper's figures) and `counted` (ours) -> `tables` (side by side) -> `text` (docs/paper.md).
"""
