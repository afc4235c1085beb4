"""The networks of clustr_jax in PyTorch. This file needs torch and nothing else: copy it to where it is used.

    from clustr_torch import load
    model = load("model.pt")            # eval mode; pixels NCHW in [0, 1] -> log-domain logits [B, Y]
    model.net.state_dict()              # the network alone; a ResNet's names are those of kuangliu's

A saved file is a dict as the ClusTR authors' checkpoints are (`state_dict`, `cluster_centers` [n, E],
`cluster_classes` [n], `variance` [n], `K`, `L`, `normalize_probs`), with `meta` besides: what the network is.
It holds tensors, numbers and words only and is read with weights_only=True.

On a GPU set torch.backends.cudnn.allow_tf32 = False: the default keeps ten bits of a product, and the last
digits of the logits are what an attack follows.
"""

import os
from collections.abc import Sequence

import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

FORMAT = "clustr_jax-torch-1"
OUTPUTS = ("logits", "scores", "deployed")


class Block(nn.Module):
    """Basic residual block; a 1x1 convolution as its shortcut where the shape changes."""

    def __init__(self, channels: int, features: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, features, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(features)
        self.conv2 = nn.Conv2d(features, features, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(features)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels != features:
            conv = nn.Conv2d(channels, features, 1, stride, 0, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(features))

    def forward(self, x: torch.Tensor):
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Normalised images [B, C, H, W] -> (logits [B, Y], embeddings [B, E]); 3x3 stem, global average pool."""

    def __init__(self, channels: int, width: int, stages: Sequence[int], num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages, before = len(stages), width
        for i, blocks in enumerate(stages):
            features, layers = width * 2**i, []
            for j in range(blocks):
                layers.append(Block(before, features, 2 if i > 0 and j == 0 else 1))
                before = features
            self.add_module(f"layer{i + 1}", nn.Sequential(*layers))
        self.linear = nn.Linear(before, num_classes)

    def forward(self, x: torch.Tensor):
        x = F.relu(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = self.get_submodule(f"layer{i + 1}")(x)
        embeddings = x.mean(dim=(2, 3))
        return self.linear(embeddings), embeddings


class FastNet(nn.Module):
    """Normalised images -> (logits, embeddings): three groups of two convolutions, GELU, max pools."""

    def __init__(self, channels: int, width: int, whitened: bool, num_classes: int):
        super().__init__()
        before = 8 * channels
        if whitened:
            self.first = nn.Conv2d(channels, before, 2)
            self.first_norm = nn.Identity()
        else:
            self.first = nn.Conv2d(channels, before, 3, 1, 1, bias=False)
            self.first_norm = nn.BatchNorm2d(before)
        for i, features in enumerate((width, 2 * width, 2 * width)):
            for j in range(2):
                self.add_module(f"conv_{i}_{j}", nn.Conv2d(before, features, 3, 1, 1, bias=False))
                self.add_module(f"norm_{i}_{j}", nn.BatchNorm2d(features))
                before = features
        self.linear = nn.LazyLinear(num_classes)

    def forward(self, x: torch.Tensor):
        x = F.gelu(self.first_norm(self.first(x)))
        for i in range(3):
            x = F.max_pool2d(self.get_submodule(f"conv_{i}_0")(x), 2)
            x = F.gelu(self.get_submodule(f"norm_{i}_0")(x))
            x = F.gelu(self.get_submodule(f"norm_{i}_1")(self.get_submodule(f"conv_{i}_1")(x)))
        x = F.max_pool2d(x, min(x.shape[2:]))
        embeddings = x.permute(0, 2, 3, 1).flatten(1) / 9
        return self.linear(embeddings), embeddings


class CNN(nn.Module):
    """Two convolutions and a hidden layer: (logits [B, Y], embeddings [B, 4 width])."""

    def __init__(self, shape: Sequence[int], width: int, num_classes: int):
        super().__init__()
        height, columns, channels = shape
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * width)
        cells = -(-height // 2) * -(-columns // 2)
        self.fc = nn.Linear(2 * width * cells, 4 * width)
        self.bn3 = nn.BatchNorm1d(4 * width)
        self.linear = nn.Linear(4 * width, num_classes)

    def forward(self, x: torch.Tensor):
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        embeddings = F.relu(self.bn3(self.fc(x.flatten(1))))
        return self.linear(embeddings), embeddings


class MLP(nn.Module):
    """Points [B, F] -> (logits [B, Y], embeddings [B, width]), the embeddings before their ReLU."""

    def __init__(self, features: int, width: int, num_classes: int):
        super().__init__()
        self.fc1 = nn.Linear(features, width)
        self.fc2 = nn.Linear(width, width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: torch.Tensor):
        embeddings = self.fc2(F.relu(self.fc1(x)))
        return self.linear(F.relu(embeddings)), embeddings


class Residual(nn.Module):
    """x - adjoint(relu(conv(x))): an SLL or CPL layer, its rescaling folded into `adjoint`."""

    def __init__(self, channels: int, features: int, size: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, features, size, 1, size // 2)
        self.adjoint = nn.Conv2d(features, channels, size, 1, size // 2, bias=False)

    def forward(self, x: torch.Tensor):
        return x - self.adjoint(F.relu(self.conv(x)))


class Sorted(nn.Module):
    """MaxMin of a convolution: an AOL layer, its rescaling folded into the kernel."""

    def __init__(self, channels: int, features: int, size: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, features, size, 1, size // 2)

    def forward(self, x: torch.Tensor):
        x = self.conv(x)
        even = x.shape[1] // 2 * 2
        a, b = x[:, :even:2], x[:, 1:even:2]
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b), x[:, even:]], dim=1)


class Shifted(nn.Module):
    """An orthogonal layer: channels moved around the image, a matrix, and |x| on half of the channels."""

    def __init__(self, channels: int, features: int):
        super().__init__()
        self.part = max(channels // 8, 1)
        self.conv = nn.Conv2d(channels, features, 1)

    def forward(self, x: torch.Tensor):
        moves = ((1, 0), (-1, 0), (0, 1), (0, -1))
        pieces = [
            torch.roll(x[:, i * self.part : (i + 1) * self.part], move, dims=(2, 3))
            for i, move in enumerate(moves)
        ]
        x = self.conv(torch.cat([*pieces, x[:, len(moves) * self.part :]], dim=1))
        half = x.shape[1] // 2
        return torch.cat([x[:, :half].abs(), x[:, half:]], dim=1)


class UnitNet(nn.Module):
    """The 1-Lipschitz networks; `plan` lists (kind, channels in, features, kernel size) of each step."""

    def __init__(self, plan: Sequence[Sequence], num_classes: int):
        super().__init__()
        self.plan = [tuple(step) for step in plan]
        for i, (kind, channels, features, size) in enumerate(self.plan):
            if kind in ("sll", "cpl"):
                self.add_module(f"layer_{i}", Residual(channels, features, size))
            elif kind == "aol":
                self.add_module(f"layer_{i}", Sorted(channels, features, size))
            elif kind == "orthogonal":
                self.add_module(f"layer_{i}", Shifted(channels, features))
            elif kind == "reduce":
                self.add_module(f"layer_{i}", nn.Conv2d(channels, features, size, 1, size // 2))
        self.linear = nn.Linear(self.plan[-1][2], num_classes)

    def forward(self, x: torch.Tensor):
        for i, (kind, channels, features, _) in enumerate(self.plan):
            if kind == "space_to_depth":
                batch, _, height, width = x.shape
                x = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
                x = x.permute(0, 3, 5, 1, 2, 4).reshape(batch, 4 * channels, height // 2, width // 2)
            elif kind == "flatten":
                x = x.permute(0, 2, 3, 1) if x.ndim == 4 else x
                x = x.reshape(x.shape[0], -1, 1, 1)
            elif kind == "pad":
                x = F.pad(x, (0, 0, 0, 0, 0, features - channels))
            else:
                x = self.get_submodule(f"layer_{i}")(x)
        embeddings = x.flatten(1)
        return self.linear(embeddings), embeddings


class Model(nn.Module):
    """A network with its normalisation and its head: pixels NCHW in [0, 1] (or points [B, F]) -> [B, Y].

    `output` says what comes out. "logits": the log-domain scores of all clusters, or the linear head.
    "scores": the exp scores over the `nearest` clusters that the ClusTR paper attacks. "deployed": log scores
    over the `nearest` clusters, whose argmax is the prediction (-inf for a class without one). `centroids`
    [Y, K, E], `variance` [], `valid` Bool [Y, K]; all None for a linear head; nearest 0 = all.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        centroids: torch.Tensor | None = None,
        variance: torch.Tensor | None = None,
        valid: torch.Tensor | None = None,
        nearest: int = 0,
        output: str = "logits",
    ):
        super().__init__()
        if output not in OUTPUTS:
            raise ValueError(f"output must be {', '.join(OUTPUTS)}, got {output!r}")
        self.net, self.nearest, self.output = net, nearest, output
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32))
        self.register_buffer("centroids", centroids)
        self.register_buffer("variance", variance)
        self.register_buffer("valid", valid)

    def embed(self, x: torch.Tensor):
        """Embeddings [B, E]."""
        return self._pass(x)[1]

    def forward(self, x: torch.Tensor):
        logits, z = self._pass(x)
        if self.centroids is None:
            return logits
        nearest = 0 if self.output == "logits" else self.nearest
        scores = self._log_scores(z, nearest)
        return torch.exp(scores) if self.output == "scores" else scores

    def _pass(self, x):
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return self.net((x - self.mean.view(shape)) / self.std.view(shape))

    def _log_scores(self, z, nearest):
        """logsumexp_j(-|z - mu_cj|^2 / 2 sigma^2) per class, from differences."""
        squared = (z[:, None, None, :] - self.centroids[None]).square().sum(dim=-1)
        keep = self.valid[None].expand(squared.shape)
        if 0 < nearest < self.valid.numel():
            flat = squared.masked_fill(~keep, torch.inf).flatten(1)
            index = flat.topk(nearest, dim=1, largest=False).indices
            chosen = torch.zeros_like(flat, dtype=torch.bool).scatter(1, index, True)
            keep = keep & chosen.view(squared.shape)
        exponents = (-squared / (2 * self.variance)).masked_fill(~keep, -torch.inf)
        empty = ~keep.any(dim=-1)
        # logsumexp of an empty set has a NaN gradient: compute it on something finite and drop it
        finite = exponents.masked_fill(empty[..., None], 0.0)
        return torch.logsumexp(finite, dim=-1).masked_fill(empty, -torch.inf)


# Blocks per stage of the ResNets; clustr_jax.models has the same.
STAGES = {"resnet18": (2, 2, 2, 2), "resnet8": (1, 1, 1)}


def build(meta: dict) -> nn.Module:
    """The network that `meta` describes, with fresh parameters."""
    name, width, classes = meta["model"], meta["width"], meta["num_classes"]
    shape = tuple(meta["input_shape"])
    if name in STAGES:
        return ResNet(shape[-1], width, STAGES[name], classes)
    if name in ("fast", "fast_plain"):
        return FastNet(shape[-1], width, name == "fast", classes)
    if name == "cnn":
        return CNN(shape, width, classes)
    if name == "mlp":
        return MLP(shape[0], width, classes)
    if "plan" in meta:
        return UnitNet(meta["plan"], classes)
    raise ValueError(f"unknown network {name!r}")


def assemble(saved: dict, output: str = "logits") -> Model:
    """The model of a dict as it is saved (see the top of this file), in eval mode on the CPU."""
    meta = saved["meta"]
    net = build(meta)
    net.load_state_dict(saved["state_dict"])
    head = clusters(saved, meta["num_classes"]) if "cluster_centers" in saved else ()
    return Model(net, meta["mean"], meta["std"], *head, nearest=meta["nearest"], output=output).eval()


def clusters(saved: dict, num_classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(centroids [Y, K, E], variance [], valid [Y, K]) of `cluster_centers`, each class's in their order."""
    centers, classes = saved["cluster_centers"].float(), saved["cluster_classes"].long()
    if len(centers) != len(classes) or not bool(((classes >= 0) & (classes < num_classes)).all()):
        raise ValueError(
            f"cluster_classes must give one of {num_classes} classes for each of {len(centers)} centres"
        )
    members = [centers[classes == c] for c in range(num_classes)]
    k = max(len(m) for m in members)
    if min(len(m) for m in members) == 0:
        raise ValueError(f"there are {num_classes} classes, and at least one has no cluster")
    variance = torch.as_tensor(saved["variance"]).float().flatten()
    if not bool((variance == variance[0]).all()) or not bool(variance[0] > 0):
        raise ValueError("variance must be one positive value, the same for all clusters")
    centroids = torch.stack([F.pad(m, (0, 0, 0, k - len(m))) for m in members])
    valid = torch.tensor([[j < len(m) for j in range(k)] for m in members])
    return centroids, variance[0], valid


def load(path: str | os.PathLike, output: str = "logits") -> Model:
    """The model of a file of `python -m clustr_jax.doors.pytorch`; ValueError if it is another file."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        found = saved["meta"]["format"]
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is no model that clustr_jax exported: {error}".splitlines()[0]) from error
    if found != FORMAT:
        raise ValueError(f"{path} has the format {found!r}, this file reads {FORMAT!r}")
    return assemble(saved, output)
