"""ClusTR + QTRADES as a PyTorch user would write it: the other side of benchmarks/epoch.py.

Channels last, a DataLoader with a batch sampler that draws Magnet batches, crops and flips of uint8 tensors
in the loader, scikit-learn's k-means on the embeddings of each epoch.
"""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.cluster import KMeans

from clustr_jax.doors.clustr_torch import FastNet, ResNet


class Images(torch.utils.data.Dataset):
    """uint8 NCHW with a random crop (4 pixels) and flip."""

    def __init__(self, images, labels):
        self.images = F.pad(torch.from_numpy(images).permute(0, 3, 1, 2), (4, 4, 4, 4))
        self.labels = torch.from_numpy(labels.astype(np.int64))

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        top, left = torch.randint(0, 9, (2,)).tolist()
        image = self.images[i, :, top : top + 32, left : left + 32]
        return (image.flip(2) if torch.rand(()) < 0.5 else image), self.labels[i], i


class MagnetBatches:
    """Batch sampler: a cluster drawn by its loss, the nearest ones of other classes, S images of each."""

    def __init__(self, owner, rows, samples):
        self.owner, self.rows, self.samples = owner, rows, samples

    def __len__(self):
        return len(self.owner.labels) // (self.rows * self.samples)

    def __iter__(self):
        o, k = self.owner, self.owner.k
        for _ in range(len(self)):
            weights = np.maximum(o.losses, 0) + 0.05 * o.losses.mean() + 1e-12
            seed = np.random.choice(len(weights), p=weights / weights.sum())
            distance = ((o.centroids - o.centroids[seed]) ** 2).sum(1)
            distance[seed // k * k : (seed // k + 1) * k] = np.inf
            chosen = [seed, *np.argsort(distance)[: self.rows - 1]]
            yield [int(i) for c in chosen for i in np.random.choice(o.members[c], self.samples)]


def network(stages, width):
    """A ResNet of these stages; without any the fast network, whose first convolution is not trained."""
    if stages:
        return ResNet(3, width, stages, 10)
    net = FastNet(3, width, True, 10)
    net.first.weight.requires_grad_(False)
    net(torch.zeros(2, 3, 32, 32))  # its head finds out how wide it is
    return net


class Clustr:
    """Model, data and clusters; `epoch` trains once through the set and refits."""

    def __init__(self, images, labels, *, stages, width, mean, std, workers, settings):
        torch.manual_seed(0)
        self.s, self.k = settings, settings["k"]
        self.net = network(stages, width).to(memory_format=torch.channels_last)
        self.mean, self.std = (torch.tensor(value).view(1, 3, 1, 1) for value in (mean, std))
        trained = [p for p in self.net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(trained, lr=1e-4)
        self.labels, self.set = labels, Images(images, labels)
        self.pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        self.losses = np.ones(10 * self.k)
        self.refit()
        self.loader = torch.utils.data.DataLoader(
            self.set,
            batch_sampler=MagnetBatches(self, settings["rows"], settings["samples"]),
            num_workers=workers,
            persistent_workers=workers > 0,
        )

    def refit(self):
        self.net.eval()
        with torch.inference_mode():
            pieces = [self._pixels(self.pixels[i : i + 500]) for i in range(0, len(self.pixels), 500)]
            z = torch.cat([self.embed(piece) for piece in pieces]).numpy()
        self.members, centroids, squares = [], [], 0.0
        for c in range(10):
            index = np.flatnonzero(self.labels == c)
            fit = KMeans(self.k, n_init=self.s["n_init"], max_iter=self.s["max_iter"]).fit(z[index])
            squares += fit.inertia_
            centroids.append(fit.cluster_centers_)
            self.members += [index[fit.labels_ == j] for j in range(self.k)]
        self.centroids = np.concatenate(centroids)
        self.means = torch.from_numpy(self.centroids)
        self.variance = squares / (len(z) - 1)

    def embed(self, x):
        return self.net((x - self.mean) / self.std)[1]

    def _pixels(self, images):
        return (images.float() / 255).contiguous(memory_format=torch.channels_last)

    def logits(self, z):
        squared = torch.cdist(z, self.means) ** 2
        return torch.logsumexp((-squared / (2 * self.variance)).view(len(z), 10, self.k), 2)

    def magnet(self, z):
        """Eq. 3 per example, in the log domain; rows of `samples` images share a cluster."""
        rows, samples = self.s["rows"], self.s["samples"]
        z = z.view(rows, samples, -1)
        means = z.mean(1)
        variance = ((z - means[:, None]) ** 2).sum() / (rows * samples - 1)
        exponent = -((z[:, :, None] - means) ** 2).sum(-1) / (2 * variance)
        classes = self.classes.view(rows, samples)[:, 0]
        other = classes[:, None] != classes[None]
        others = torch.logsumexp(exponent.masked_fill(~other[:, None], -torch.inf), 2)
        own = exponent[torch.arange(rows), :, torch.arange(rows)]
        return F.relu(self.s["alpha"] - own + others)

    def step(self, images, labels):
        s = self.s
        x, self.classes = self._pixels(images), labels
        self.net.train()
        with torch.no_grad():
            target = self.logits(self.embed(x)).softmax(1)
        x_adv = (x + torch.empty_like(x).uniform_(-s["eps"], s["eps"])).requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(self.logits(self.embed(x_adv)), target), x_adv)
        x_adv = x_adv.detach() + s["step_size"] * gradient.sign()
        x_adv = torch.clamp(torch.minimum(torch.maximum(x_adv, x - s["eps"]), x + s["eps"]), 0, 1)
        clean = self.embed(x)
        adversarial = self.embed(x_adv)
        magnet = self.magnet(clean)
        consistency = F.cross_entropy(self.logits(adversarial), self.logits(clean).softmax(1))
        loss = magnet.mean() + s["lam"] * consistency
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return magnet.detach()

    def epoch(self):
        cluster = np.empty(len(self.labels), np.int64)
        for c, index in enumerate(self.members):
            cluster[index] = c
        for images, labels, ids in self.loader:
            magnet = self.step(images, labels).mean(1).numpy()
            rows = cluster[ids.view(len(magnet), -1)[:, 0].numpy()]
            self.losses[rows] = magnet
        self.refit()
