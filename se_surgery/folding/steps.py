"""Steps: what the functions in a block's graph do to a factor on each channel of a map.

In: a node of a `Block`. Out: the factors that it lets through, or none, and what people call it.
"""

from __future__ import annotations

import operator

from torch import fx

from ..reading.block import Block
from .absorb import ANY, NOT_NEGATIVE

# Functions that let any factor on the channels through, and those that do for factors that are not negative.
_LINEAR = frozenset(
    "contiguous clone permute transpose movedim dropout dropout_ dropout1d dropout2d feature_dropout float half to "
    "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d".split()
)
_HOMOGENEOUS = frozenset(
    "relu relu_ leaky_relu leaky_relu_ max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d".split()
)
# What these return has the shape or the type of a map and nothing of its values: the masks of a drop path.
_VALUELESS = frozenset(
    "new_empty new_ones new_zeros new_full rand_like empty_like ones_like zeros_like size dim".split()
)


def kept_by(block: Block, node: fx.Node) -> int | None:
    """Which factors on its map a function lets through: `ANY`, `NOT_NEGATIVE`, or None for none."""
    name = _name(node)
    if name in _LINEAR or _scales(block, node) or _changes_nothing(block, node):
        return ANY
    return NOT_NEGATIVE if name in _HOMOGENEOUS else None


def _scales(block: Block, node: fx.Node) -> bool:
    """Whether a node multiplies its one map by numbers that are not computed from it: layer scale, a drop path."""
    is_product = block.kind(node) == "gate" or "div" in _name(node)
    if not is_product or not block.passes(node) or not _keeps_shape(block, node):
        return False
    return not any(_has_values(source) for source in node.all_input_nodes if not block.is_map(source))


def _changes_nothing(block: Block, node: fx.Node) -> bool:
    """Whether a node takes a slice that is all of its map, or adds the number zero."""
    if not _keeps_shape(block, node):
        return False
    if node.target is operator.getitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(isinstance(step, slice) or step is ... for step in index)
    return block.kind(node) == "add" and any(type(arg) in (int, float) and arg == 0 for arg in node.args)


def _keeps_shape(block: Block, node: fx.Node) -> bool:
    maps = block.maps_into(node)
    return len(maps) == 1 and block.is_map(node) and bool(block.value(node).shape == block.value(maps[0]).shape)


def _has_values(node: fx.Node) -> bool:
    """Whether a value is computed from the values of what a block is given, and not from their shape alone."""
    if node.op in ("placeholder", "call_module"):
        return True
    if node.target is getattr:
        return node.args[1] not in ("shape", "ndim", "dtype", "device")
    return _name(node) not in _VALUELESS and any(_has_values(source) for source in node.all_input_nodes)


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")


def called(block: Block, node: fx.Node) -> str:
    """What a node calls, for people: the module at that path, or a function in that block."""
    if node.name in block.calls:
        return repr(block.calls[node.name].path)
    return f"{_name(node) or node.name} in {block.path or 'the model'!r}"


def told(block: Block, node: fx.Node) -> str:
    """A node's value, for people."""
    if node.op == "placeholder":
        return f"the input of {block.path or 'the model'!r}"
    return f"what {called(block, node)} makes"
