"""Where each array of a network lies in PyTorch, and how it is turned there and back."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from clustr_jax import models
from clustr_jax.runtime.errors import UserError

if TYPE_CHECKING:
    pass  # pyright: ignore[reportMissingImports]


def as_jax(value: Any) -> Float[Array, "..."]:
    """A PyTorch weight in JAX's order: [O, I, H, W] -> [H, W, I, O], [O, I] -> [I, O], others as they are."""
    value = np.asarray(value.detach().cpu().float().numpy() if hasattr(value, "detach") else value)
    order = {4: (2, 3, 1, 0), 2: (1, 0)}.get(value.ndim)
    return jnp.asarray(value if order is None else value.transpose(order))


def layout(net: models.Net) -> list[tuple[str, tuple[str, ...], str]]:
    """(PyTorch's name, path in the JAX parameters, kind of layer) of each layer."""
    module = net.module
    if isinstance(module, models.ResNet):
        rows: list[tuple[str, tuple[str, ...], str]] = [
            ("conv1", ("Conv_0",), "conv"),
            ("bn1", ("BatchNorm_0",), "norm"),
        ]
        number = 0
        for i, blocks in enumerate(module.stages):
            for j in range(blocks):
                ours, theirs = f"Block_{number}", f"layer{i + 1}.{j}"
                layers = [("conv1", "bn1"), ("conv2", "bn2")]
                if i > 0 and j == 0:
                    layers.append(("shortcut.0", "shortcut.1"))
                for n, (conv, norm) in enumerate(layers):
                    rows.append((f"{theirs}.{conv}", (ours, f"Conv_{n}"), "conv"))
                    rows.append((f"{theirs}.{norm}", (ours, f"BatchNorm_{n}"), "norm"))
                number += 1
        return [*rows, ("linear", (models.HEAD,), "dense")]
    if isinstance(module, models.FastNet):
        first = "whitening" if module.whitened else "conv"
        rows = [("first", ("first",), first)]
        rows += [] if module.whitened else [("first_norm", ("first_norm",), "shift")]
        for name in (f"{i}_{j}" for i in range(len(module.groups)) for j in range(2)):
            rows += [
                (f"conv_{name}", (f"conv_{name}",), "conv"),
                (f"norm_{name}", (f"norm_{name}",), "shift"),
            ]
        return [*rows, ("linear", (models.HEAD,), "dense")]
    if isinstance(module, models.CNN):
        names = ("Conv_0", "BatchNorm_0", "Conv_1", "BatchNorm_1", "Dense_0", "BatchNorm_2", models.HEAD)
        theirs = ("conv1", "bn1", "conv2", "bn2", "fc", "bn3", "linear")
        kinds = ("conv", "norm", "conv", "norm", "flattened", "norm", "dense")
        return [(t, (n,), kind) for t, n, kind in zip(theirs, names, kinds, strict=True)]
    if isinstance(module, models.MLP):
        return [
            ("fc1", ("Dense_0",), "dense"),
            ("fc2", ("Dense_1",), "dense"),
            ("linear", (models.HEAD,), "dense"),
        ]
    raise UserError(f"{models.name_of(net)} can be exported to PyTorch, but not read back")


def at(tree: dict, path: Iterable[str]):
    """The subtree at this path, {} where there is none."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def _conv_out(net, params, stats):
    return {"weight": np.transpose(params["kernel"], (3, 2, 0, 1))}


def dense_out(net: models.Net, params: dict, stats: dict):
    """Inputs last."""
    return {"weight": np.transpose(params["kernel"]), "bias": params["bias"]}


def _norm_out(net, params, stats):
    return {
        "weight": params["scale"],
        "bias": params["bias"],
        "running_mean": stats["mean"],
        "running_var": stats["var"],
        "num_batches_tracked": np.int64(0),
    }


def _shift_out(net, params, stats):
    """A batch norm without a scale."""
    return _norm_out(net, {**params, "scale": np.ones_like(params["bias"])}, stats)


def _whitening_out(net, params, stats):
    return {**_conv_out(net, stats, {}), "bias": params["bias"]}


def _flattened_out(net, params, stats):
    """The inputs of this layer are the pixels of all channels: channels first in PyTorch, last in JAX."""
    kernel = np.asarray(params["kernel"])
    kernel = kernel.reshape(*_cells(net), -1, kernel.shape[1])
    return {"weight": kernel.transpose(3, 2, 0, 1).reshape(kernel.shape[3], -1), "bias": params["bias"]}


def _conv_in(net, get):
    return {"kernel": as_jax(get("weight"))}, {}


def _dense_in(net, get):
    return {"kernel": as_jax(get("weight")), "bias": as_jax(get("bias"))}, {}


def _norm_in(net, get):
    params = {"scale": as_jax(get("weight")), "bias": as_jax(get("bias"))}
    return params, {"mean": as_jax(get("running_mean")), "var": as_jax(get("running_var"))}


def _shift_in(net, get):
    params, stats = _norm_in(net, get)
    scale = params.pop("scale")
    if not bool((scale == 1).all()):
        raise UserError(f"{models.name_of(net)} has batch norms without a scale, and one here has a scale")
    return params, stats


def _whitening_in(net, get):
    return {"bias": as_jax(get("bias"))}, {"kernel": as_jax(get("weight"))}


def _flattened_in(net, get):
    weight = get("weight")
    features = weight.shape[0]
    kernel = as_jax(weight.reshape(features, -1, *_cells(net)))
    return {"kernel": kernel.reshape(-1, features), "bias": as_jax(get("bias"))}, {}


KINDS = {
    "conv": (_conv_out, _conv_in),
    "dense": (dense_out, _dense_in),
    "norm": (_norm_out, _norm_in),
    "flattened": (_flattened_out, _flattened_in),
    "shift": (_shift_out, _shift_in),
    "whitening": (_whitening_out, _whitening_in),
}


def _cells(net):
    """Height and width after the CNN's second convolution."""
    return tuple(-(-side // 2) for side in net.input_shape[:2])
