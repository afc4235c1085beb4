"""A module that can be called: `clustr_jax.judge` is a function, and the file that it lies in.

Python puts a module that is imported by its full name in the place of a function of the same name.
"""

import sys
import types


class _Callable(types.ModuleType):
    def __call__(self, *args, **settings):
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **settings)


def make(name: str) -> None:
    """Calls of the module of this name go to the function of its last part."""
    module = sys.modules[name]
    if name != "__main__":
        module.__class__ = _Callable
