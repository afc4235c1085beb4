"""A Classifier as a torch.nn.Module, and networks of PyTorch as a Classifier. PyTorch is imported here only.

    model = to_torch(clf)                        # eval mode; NCHW pixels in [0, 1] -> clf.logits
    clf = from_torch("their.pth", mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))

    python -m clustr_jax.doors.pytorch WORKDIR --out=model.pt

writes the model, and beside it clustr_torch.py, with which it is used where there is neither JAX nor
clustr_jax: `from clustr_torch import load; model = load("model.pt")` (docs/doors.md).
"""

import argparse
import contextlib
import importlib
import math
import pathlib
import shutil
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

import clustr_jax
from clustr_jax import models
from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.doors import torch_layout
from clustr_jax.models import unit
from clustr_jax.runtime.errors import UserError, first_line
from clustr_jax.runtime.paths import local
from clustr_jax.runtime.programs import program
from clustr_jax.storage import description

if TYPE_CHECKING:
    import torch  # pyright: ignore[reportMissingImports]

# Of max |z|: what an exported model may differ by from the logits it was made of.
TOLERANCE = 1e-4
_INSTALL = "pip install torch==2.13.0"


def _nets() -> Any:
    """clustr_torch, the PyTorch side; UserError where PyTorch is missing."""
    try:
        return importlib.import_module("clustr_jax.doors.clustr_torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UserError(f"this needs PyTorch, which is not installed: {_INSTALL}") from error


def to_torch(clf: Classifier, output: str = "logits") -> "torch.nn.Module":
    """The same function in PyTorch, on the CPU in eval mode.

    Every network can be exported; of the lip_* ones the rescaling is folded into plain kernels, so that these
    are not read back by `from_torch`.

        model = to_torch(clustr_jax.load("runs/digits-clustr_qtrades"))
        z = model(torch.tensor(x).permute(0, 3, 1, 2))

    Args:
        clf: any classifier.
        output: "logits" gives `clf.logits`, "scores" the exp scores that the paper attacks, "deployed" what
            `clf.predict` takes the argmax of.

    Returns:
        a module of pixels NCHW in [0, 1] (points [B, F]) -> [B, Y]. Its `.net` is the network alone,
        `.net.state_dict()` its parameters and statistics (ResNets as kuangliu's).
    """
    nets = _nets()
    if output not in nets.OUTPUTS:
        raise UserError(f"output must be one of {', '.join(nets.OUTPUTS)}, got {output!r}")
    return nets.assemble(checkpoint(clf), output)


def checkpoint(clf: Classifier, **about: Any) -> dict:
    """What is saved of a classifier: a dict in the layout of the authors' checkpoints, with `meta`.

    `about` (JSON values) goes into `meta`. `torch.save(checkpoint(clf), "model.pt")` is the file.
    """
    nets = _nets()
    net = clf.net
    meta = {"format": nets.FORMAT, **description.describe(clf)}
    if taken := meta.keys() & about.keys():
        raise UserError(f"about: {sorted(taken)[0]!r} is part of the description itself; take another name")
    meta |= about
    if isinstance(net.module, (models.UnitNet, models.OrthogonalNet)):
        meta["plan"], state = _folded(clf)
    else:
        state = {}
        for name, path, kind in torch_layout.layout(net):
            params, stats = (
                torch_layout.at(clf.variables["params"], path),
                torch_layout.at(clf.variables["batch_stats"], path),
            )
            for key, value in torch_layout.KINDS[kind][0](net, params, stats).items():
                state[f"{name}.{key}"] = value
    saved = {"state_dict": _tensors(state), "meta": meta}
    if clf.clusters is not None:
        valid = np.asarray(clf.clusters.valid)
        head = {
            "cluster_centers": np.asarray(clf.clusters.centroids)[valid],
            "cluster_classes": np.nonzero(valid)[0],
            "variance": np.full(valid.sum(), np.asarray(clf.clusters.variance), np.float32),
        }
        total = int(valid.sum())
        nearest = min(clf.nearest, total) or total
        saved |= _tensors(head) | {"K": valid.shape[1], "L": nearest, "normalize_probs": True}
    return saved


def _normalisation(meta: Mapping, name: str, given) -> tuple[float, ...] | None:
    """The file's own value, or what is given for a file that has none; UserError where they differ."""
    own = meta.get(name)
    if own is not None and given is not None and not np.allclose(own, given, rtol=1e-6, atol=1e-6):
        raise UserError(
            f"{name}={tuple(given)} is given, and the network of this file was trained with {tuple(own)}; "
            f"leave it out"
        )
    return given if own is None else own


def from_torch(
    source: "str | pathlib.Path | Mapping[str, Any]",
    *,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    input_shape: tuple[int, ...] = (32, 32, 3),
    clusters: Clusters | None = None,
    nearest: int | None = None,
    head: str | None = None,
) -> Classifier:
    """A Classifier with the parameters of a PyTorch ResNet-18 (or of a file that was exported here).

        clf = from_torch("CIFAR10_resnet18.pth", mean=(0.4914, 0.4822, 0.4465), std=(0.2023, 0.1994, 0.2010))
        result = attacks.autoattack(jax.random.key(0), clf.logits, x, y, eps=8 / 255)

    Args:
        source: a file, a state_dict in the layout of kuangliu's pytorch-cifar (conv1, bn1, layer1.0.conv1,
            ..., linear; any width; resnet8 alike), or a dict with such a "state_dict" and, as the ClusTR
            authors save them, "cluster_centers", "cluster_classes", "variance" and "L".
        mean: of the normalisation, in [0, 1] units: no such file has it (0 where the network takes pixels as
            they are).
        std: likewise (1 there).
        input_shape: (H, W, C).
        clusters: a head to use instead.
        nearest: the D of the deployed rule (0 for all; None for the file's L).
        head: "linear" or "clusters".

    Returns:
        a `Classifier`.

    Raises:
        UserError: with the first parameter that is missing, too much, or of another shape.
    """
    if head not in (None, "linear", "clusters"):
        raise UserError(f"head must be linear, clusters or None, got {head!r}")
    saved = _read(source) if isinstance(source, (str, pathlib.Path)) else dict(source)
    state = saved["state_dict"] if isinstance(saved.get("state_dict"), Mapping) else saved
    state = _without_prefix({name: value for name, value in state.items() if hasattr(value, "shape")})
    meta = saved.get("meta") or {}
    if not isinstance(meta, Mapping):
        raise UserError(f"meta must be a dict, got {type(meta).__name__}")
    mean, std = (_normalisation(meta, name, given) for name, given in (("mean", mean), ("std", std)))
    if mean is None or std is None:
        raise UserError(
            "mean and std of the normalisation are not in a state_dict: give both, in [0, 1] units"
        )
    net = _network(state, meta, tuple(mean), tuple(std), tuple(meta.get("input_shape", input_shape)))
    variables = _variables(net, state)
    if clusters is None and head != "linear" and "cluster_centers" in saved:
        clusters = _clusters(saved, net)
        if nearest is None:
            total = int(np.sum(clusters.valid))
            limit = int(saved.get("L", total)) if saved.get("normalize_probs", True) else total
            nearest = limit if limit < total else 0
    if head == "clusters" and clusters is None:
        raise UserError('there are no clusters in this file: give clusters=Clusters(...), or head="linear"')
    if clusters is not None and clusters.centroids.shape[0] != net.num_classes:
        raise UserError(f"clusters of {clusters.centroids.shape[0]} classes, a network of {net.num_classes}")
    return Classifier(
        variables,
        clusters if head != "linear" else None,
        net,
        nearest=0 if clusters is None or head == "linear" else nearest or 0,
        bounds=description.bounds({"bounds": (0.0, 1.0), **meta}),
    )


def _tensors(arrays):
    import torch  # pyright: ignore[reportMissingImports]

    return {name: torch.tensor(np.array(value)) for name, value in arrays.items()}


def _folded(clf):
    """(plan, state) of a lip_* network: its layers in eval mode as plain convolutions."""
    net, module = clf.net, clf.net.module
    plan, state = [], {}
    channels, cells = net.input_shape[-1], math.prod(net.input_shape[:-1])
    for i, (kind, features, size) in enumerate(module.plan(net.input_shape)):
        name = f"layer_{i}"
        plan.append([kind, channels, features, size])
        if kind == "space_to_depth":
            channels, cells = 4 * channels, cells // 4
            continue
        if kind == "flatten":
            channels, cells = channels * cells, 1
            continue
        channels = features
        if kind == "pad":
            continue
        params, stats = clf.variables["params"][name], clf.variables["batch_stats"].get(name, {})
        what, kernel, *rest = unit.describe(params, stats)
        kernel = kernel[None, None] if what == "pointwise" else kernel
        place = name if kind == "reduce" else f"{name}.conv"
        state[f"{place}.weight"] = np.transpose(kernel, (3, 2, 0, 1))
        state[f"{place}.bias"] = params["bias"]
        if what == "sll":
            scaled = 2 * np.asarray(rest[0])[None, None, :, None] * kernel[::-1, ::-1].transpose(0, 1, 3, 2)
            state[f"{name}.adjoint.weight"] = scaled.transpose(3, 2, 0, 1)
    head = clf.variables["params"][models.HEAD]
    state |= {f"linear.{key}": value for key, value in torch_layout.dense_out(net, head, {}).items()}
    return plan, state


# Reading


def _read(path):
    _nets()
    import torch  # pyright: ignore[reportMissingImports]

    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # no file, no permission, not a file of torch.save, or one with code in it
        raise UserError(f"cannot read {path} as a file of torch.save: {first_line(error)}") from error
    if not isinstance(saved, Mapping):
        raise UserError(f"{path} holds a {type(saved).__name__}; expected a dict of parameters")
    return dict(saved)


def _without_prefix(state):
    """Names as the network itself has them: DataParallel and wrappers put theirs in front."""
    for prefix in ("module.", "model.", "net."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _network(state, meta, mean, std, input_shape):
    name = meta.get("model")
    if name is None:
        stages = []
        while any(key.startswith(f"layer{len(stages) + 1}.") for key in state):
            prefix = f"layer{len(stages) + 1}."
            stages.append(len({key.split(".")[1] for key in state if key.startswith(prefix)}))
        name = next((n for n, blocks in _nets().STAGES.items() if list(blocks) == stages), None)
        if name is None or "layer1.0.conv1.weight" not in state:
            raise UserError(
                f"expected the parameters of a basic-block ResNet-18 (conv1, bn1, layer1.0.conv1 to "
                f"layer4.1.bn2, linear), got blocks per stage {stages or 'none'}, first name "
                f"{next(iter(state), 'none')}"
            )
    for key in ("conv1.weight", "linear.weight"):
        if "model" not in meta and key not in state:
            raise UserError(f"{key} is missing in this state_dict")
    channels = input_shape[-1]
    for what, values in (("mean", mean), ("std", std)):
        if len(values) not in (1, channels):
            raise UserError(f"{what} must have 1 or {channels} values, got {values}")
    if not all(value > 0 for value in std):
        raise UserError(f"std must be > 0, got {std}")
    return models.build(
        name,
        num_classes=meta.get("num_classes") or int(state["linear.weight"].shape[0]),
        input_shape=input_shape,
        mean=mean,
        std=std,
        width=meta.get("width") or int(state["conv1.weight"].shape[0]),
    )


def _variables(net, state):
    """{params, batch_stats} for `net`; UserError for the first thing that does not fit."""
    variables: dict = {"params": {}, "batch_stats": {}}
    used = set()
    expected = jax.eval_shape(net.init, jax.random.key(0))["params"]

    def get(name):
        if name not in state:
            raise UserError(f"{name} is missing in this state_dict")
        used.add(name)
        return state[name]

    for name, path, kind in torch_layout.layout(net):
        params, stats = torch_layout.KINDS[kind][1](net, lambda key, name=name: get(f"{name}.{key}"))
        for tree, found in ((variables["params"], params), (variables["batch_stats"], stats)):
            for part in path if found else ():
                tree = tree.setdefault(part, {})
            tree.update(found)
        wanted = torch_layout.at(expected, path)
        for key, value in params.items():
            if value.shape != wanted[key].shape:
                raise UserError(
                    f"{name}: {key} of shape {tuple(value.shape)} (in JAX's order), expected "
                    f"{tuple(wanted[key].shape)} for {models.name_of(net)} with width {net.module.width}"
                )
    left = sorted(set(state) - used - {name for name in state if name.endswith("num_batches_tracked")})
    if left:
        raise UserError(f"{left[0]} is in this state_dict and not in {models.name_of(net)}")
    return variables


def _clusters(saved, net):
    try:
        centroids, variance, valid = _nets().clusters(saved, net.num_classes)
    except (KeyError, ValueError) as error:
        raise UserError(f"the clusters cannot be read: {first_line(error)}") from error
    mask = None if bool(valid.all()) else jnp.asarray(valid.numpy())
    return Clusters(jnp.asarray(centroids.numpy()), jnp.asarray(variance.numpy()), mask)


# The command


def difference(clf: Classifier, model: "torch.nn.Module", count: int = 64) -> float:
    """max |z - z'| / max |z| of the two models' logits, on `count` inputs drawn uniformly from [0, 1].

    difference(clf, to_torch(clf)) < 1e-4
    """
    import torch  # pyright: ignore[reportMissingImports]

    x = np.random.default_rng(0).random((count, *clf.net.input_shape), np.float32)
    ours = np.asarray(clf.logits(x))
    with torch.no_grad():
        theirs = model(torch.tensor(np.moveaxis(x, -1, 1) if x.ndim == 4 else x)).numpy()
    return float(np.abs(ours - theirs).max() / np.abs(ours).max())


def save(clf: Classifier, path: str | pathlib.Path, **about: Any) -> float:
    """Write `clf` as a file for PyTorch, clustr_torch.py beside it; returns how far the logits are apart.

    The file is read again and compared with `clf` before it gets its name: UserError where the logits
    differ by more than 1e-4 of max |z|. `about` is kept in its `meta`.

        save(clustr_jax.load("runs/digits-clustr_qtrades"), "model.pt")
    """
    nets = _nets()
    import torch  # pyright: ignore[reportMissingImports]

    path = local(path, "the file")
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(checkpoint(clf, **about), temporary)
        apart = difference(clf, nets.load(temporary))
        if not apart <= TOLERANCE:
            raise UserError(f"the logits of PyTorch differ by {apart:.1e} of max |z|; {path} was not written")
        shutil.copyfile(nets.__file__, path.with_name("clustr_torch.py"))
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where it cannot write
        raise UserError(f"cannot write {path}: {first_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return apart


@program
def main(argv: list[str]) -> None:
    """python -m clustr_jax.doors.pytorch WORKDIR --out=model.pt."""
    parser = argparse.ArgumentParser(
        prog="python -m clustr_jax.doors.pytorch", description="Export a trained network to PyTorch."
    )
    parser.add_argument("workdir", help="a work directory of run.py, or a stage's folder")
    parser.add_argument("--out", default="model.pt", help="the file to write (model.pt)")
    parser.add_argument("--head", choices=("clusters", "linear"), help="default: the method's own")
    args = parser.parse_args(argv)
    local(args.out, "--out")
    clf = clustr_jax.load(args.workdir, args.head)
    apart = save(clf, args.out, source=pathlib.Path(args.workdir).expanduser().resolve().name)
    out = pathlib.Path(args.out)
    print(f"{args.out}: logits differ from JAX by {apart:.1e} of max |z| on 64 random inputs")
    print(f'with torch alone, in {out.parent}: from clustr_torch import load; model = load("{out.name}")')


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
