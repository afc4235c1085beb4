"""The smoke configs in this process."""

import importlib.util

import pytest

from runs import ROOT


def toy2d(method):
    """The smoke config of a method on points."""
    return smoke("toy2d", method)


def smoke(name, method):
    """The smoke config of a method."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        spec.loader.exec_module(module)
    config = module.get_config(method)
    config.smoke = True
    return config
