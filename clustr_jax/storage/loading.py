"""From a work directory, or a stage's folder, back to a network."""

import pathlib

import jax

from clustr_jax import data, models
from clustr_jax.classifier import Classifier
from clustr_jax.models import Net
from clustr_jax.runtime import arrays
from clustr_jax.runtime.errors import UserError
from clustr_jax.runtime.paths import local
from clustr_jax.runtime.stage_names import TRAIN, WARMUP
from clustr_jax.settings import DataSettings, ModelSettings
from clustr_jax.storage import safetensors_file
from clustr_jax.storage.checkpoints import Checkpoints
from clustr_jax.storage.files import read_json
from clustr_jax.storage.workdir import Workdir
from clustr_jax.training import described
from clustr_jax.training.objectives import METHODS


def build_net(model: ModelSettings, split: data.Split, running_variance: str = "biased") -> Net:
    """The network for the shape and classes of this data; `running_variance`: as `models.build` has it."""
    shape = split.images.shape[1:]
    channels = shape[-1]
    for name in ("mean", "std"):
        if len(getattr(model, name)) not in (1, channels):
            raise UserError(
                f"model.{name} must have 1 or {channels} values for images of {channels} channels, "
                f"got {getattr(model, name)}"
            )
    return models.build(
        model.name,
        num_classes=split.num_classes,
        input_shape=shape,
        mean=model.mean,
        std=model.std,
        width=model.width,
        dtype=model.dtype,
        running_variance=running_variance,
    )


def digest(clf: Classifier) -> str:
    """Short SHA-256 of the parameters, statistics and clusters."""
    return arrays.digest((clf.variables, clf.clusters))


def load(path: str | pathlib.Path, head: str | None = None) -> Classifier:
    """The classifier that a run left behind.

    Args:
        path: a work directory (its newest finished stage), a stage's folder, or a .safetensors file.
        head: what predicts, "clusters" or "linear"; None for the method's own.

    Returns:
        a `Classifier`.

    Raises:
        UserError: where there is nothing to load, or no such head.

    >>> import contextlib, io, tempfile
    >>> from clustr_jax import stages
    >>> from configs import toy2d
    >>> config = toy2d.get_config("nominal")
    >>> config.smoke = True  # seconds instead of minutes: shows how, trains nothing worth having
    >>> workdir = tempfile.mkdtemp()
    >>> with contextlib.redirect_stdout(io.StringIO()):  # as python run.py --stages=2_train does
    ...     _ = stages.run(config, workdir, ("2_train",))
    >>> clf = clustr_jax.load(workdir)
    >>> clf.logits(np.zeros((5, 2), np.float32)).shape, clf.clusters
    ((5, 2), None)
    >>> clustr_jax.load(workdir, head="clusters")
    Traceback (most recent call last):
    clustr_jax.runtime.errors.UserError: ...2_train has no clusters: nominal ends in a linear head there; ...
    """
    if head not in (None, "clusters", "linear"):
        raise UserError(f"head must be clusters, linear or None, got {head!r}")
    if pathlib.Path(path).suffix == ".safetensors":
        clf = safetensors_file.load(path)
        if head == "clusters" and clf.clusters is None:
            raise UserError(f"{path} has no clusters; fit some with clusters.fit")
        return clf.replace(clusters=None, nearest=0) if head == "linear" else clf
    stage = find_stage(path)
    config = read_config(stage.parent)
    done = read_json(stage / "done.json")
    own = _head(config["method"], stage, done)
    if head == "clusters" and own == "linear":
        raise UserError(
            f"{stage} has no clusters: {config['method']} ends in a linear head there; "
            f"fit some with clusters.fit"
        )
    net = _own_net(ModelSettings.of(config["model"]), done)
    checkpoints, step = _checkpoints(stage), done["step"]
    try:
        abstract = _abstract(net)
        variables = checkpoints.model(abstract, step)
        clusters = None
        if (head or own) == "clusters":
            embedding = jax.eval_shape(
                net.eval, abstract, jax.ShapeDtypeStruct((1, *net.input_shape), "float32")
            )
            k = max(config["magnet"]["k_per_class"] or (config["magnet"]["k"],))
            clusters = checkpoints.clusters(net.num_classes, k, embedding.embeddings.shape[-1], step)
    finally:
        checkpoints.close()
    return Classifier(
        variables,
        clusters,
        net,
        nearest=config["eval"]["nearest"] if clusters is not None else 0,
        bounds=DataSettings.of(config["data"]).bounds,
    )


def _head(name, stage, done):
    """What predicts after this stage; UserError where neither this process nor done.json knows its method."""
    own = name
    if stage.name != TRAIN:  # the method of stage 1, which only a known one names
        own = METHODS[name].warmup if name in METHODS else None
    method = described.told(own, done)
    if method is None:
        raise UserError(
            f"{stage.parent} was trained by the method {str(name)[:100]!r}, which is not known here; import "
            f"the file that enters it into METHODS first (docs/own_method.md)"
        )
    return method.head


def model_variables(path: str | pathlib.Path, net: Net, *, body: bool = False) -> dict:
    """{params, batch_stats} for `net` that a finished stage ended with, or of a .safetensors file.

    With `body` the head is left as it was found: it may have other classes than `net`. Raises UserError for
    another network.
    """
    if pathlib.Path(path).suffix == ".safetensors":
        found = safetensors_file.load(path).variables
    else:
        stage = find_stage(path)
        config, done = read_config(stage.parent), read_json(stage / "done.json")
        checkpoints = _checkpoints(stage)
        try:
            found = checkpoints.model(
                _abstract(_own_net(ModelSettings.of(config["model"]), done)), done["step"]
            )
        finally:
            checkpoints.close()
    shapes = [
        {jax.tree_util.keystr(place): leaf.shape for place, leaf in jax.tree_util.tree_leaves_with_path(tree)}
        for tree in (found, _abstract(net))
    ]
    different = sorted(name for name, _ in shapes[0].items() ^ shapes[1].items())
    if body:
        different = [name for name in different if f"'{models.HEAD}'" not in name]
    if different:
        sizes = (str(tree.get(different[0], "absent")) for tree in shapes)
        raise UserError(
            f"{path} holds another network than this config's: they differ in {different[0]}, "
            f"{' and '.join(sizes)}; model and data must be those that it was trained with"
        )
    return found


def normalisation(path: str | pathlib.Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) per channel of the images that a finished stage, or a .safetensors file, was trained on."""
    if pathlib.Path(path).suffix == ".safetensors":
        module = safetensors_file.load(path).net.module
        return tuple(module.mean), tuple(module.std)
    model = read_config(find_stage(path).parent)["model"]
    return tuple(model["mean"]), tuple(model["std"])


def check_there(path: str | pathlib.Path) -> None:
    """UserError where `model_variables` would find nothing to load."""
    if pathlib.Path(path).suffix != ".safetensors":
        find_stage(path)
    elif not local(path, "the file").is_file():
        raise UserError(f"there is no file {path}")


def input_and_classes(path: str | pathlib.Path) -> tuple[tuple[int, ...], int]:
    """(shape of an image, number of classes) of a finished stage's network; UserError where there is none."""
    done = read_json(find_stage(path) / "done.json")
    return tuple(done["input_shape"]), done["num_classes"]


def _abstract(net: Net) -> dict:
    return jax.eval_shape(net.init, jax.random.key(0))


def _own_net(model: ModelSettings, done: dict) -> Net:
    """The network that a finished stage trained: its work directory's config.json, its own done.json."""
    return models.build(
        model.name,
        num_classes=done["num_classes"],
        input_shape=tuple(done["input_shape"]),
        mean=model.mean,
        std=model.std,
        width=model.width,
        dtype=model.dtype,
    )


def _checkpoints(stage):
    return Checkpoints(stage / "checkpoints", Workdir(stage.parent).identity(read_config(stage.parent)))


def read_config(workdir: pathlib.Path) -> dict:
    """config.json of a work directory; UserError where it is missing or not the config of a run."""
    path = workdir / "config.json"
    content = read_json(path)
    missing = [name for name in ("method", "seed", "data", "model", "train", "eval") if name not in content]
    if missing:
        raise UserError(f"{path} is not the config of a run: it has no {missing[0]!r}")
    return content


def find_stage(path: str | pathlib.Path) -> pathlib.Path:
    """The folder of a finished stage: the path itself, or the newest one in it; UserError without one."""
    path = local(path, "the work directory").resolve()
    for folder in (path, path / TRAIN, path / WARMUP):
        if (folder / "done.json").exists():
            return folder
    raise UserError(
        f"no finished stage in {path}; expected a work directory of run.py, or its {WARMUP} or {TRAIN}"
    )
