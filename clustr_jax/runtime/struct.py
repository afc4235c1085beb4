"""Frozen dataclasses that are pytrees: what compiled functions take and return.

    class Work(struct.PyTreeNode):
        x: Array
        norm: str = struct.field(pytree_node=False)    # compiled in

flax.struct has the same; the attacks, the clusters and the losses do without flax.
"""

import dataclasses
from typing import Any, Self, dataclass_transform

import jax

_LEAF = "pytree_node"


def field(*, pytree_node: bool = True, **settings: Any) -> Any:
    """A field of a PyTreeNode; with `pytree_node` False it is compared by value and compiled in."""
    return dataclasses.field(metadata={_LEAF: pytree_node}, **settings)


@dataclass_transform(field_specifiers=(field,), frozen_default=True)
class PyTreeNode:
    """Subclasses are frozen dataclasses, and pytrees whose leaves are their fields, in order."""

    def __init_subclass__(cls, **settings: Any):
        super().__init_subclass__(**settings)
        dataclasses.dataclass(frozen=True)(cls)
        leaves = {f.name: f.metadata.get(_LEAF, True) for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
        jax.tree_util.register_dataclass(
            cls,
            data_fields=[name for name, leaf in leaves.items() if leaf],
            meta_fields=[name for name, leaf in leaves.items() if not leaf],
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with other values of these fields."""
        return dataclasses.replace(self, **changes)  # pyright: ignore[reportArgumentType]
