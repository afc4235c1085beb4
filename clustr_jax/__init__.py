"""clustr_jax: ClusTR (Clustering Training for Robustness) in JAX, with evaluations that can be believed.

    clf = clustr_jax.load("runs/digits-clustr_qtrades")
    x, y = data.load("digits", "test")
    x_adv = attacks.pgd(key, clf.logits, x, y, eps=0.2, step_size=0.05, steps=20, restarts=10)

Map, from the bottom up:
    mesh, processes, errors                 several devices, several processes, mistakes of the user
    losses, kmeans, convolution, models     arrays in, arrays out
    clusters, sampling, attacks             the cluster head, Magnet batches, adversaries
    classifier                              network and head together: what is attacked and deployed
    objectives, train, fitting, cost        one function per method, the train step, k-means++ between epochs,
                                            gradient passes
    settings, fidelity, paper               what a config may say, the authors' switches, the paper's figures
    evaluate, sound, diagnostics, quirks    the paper's protocol, the sound ones, can they be believed?
    certify, certified, lipschitz           radii of the cluster head, certified.json, bounds of networks
    checkpoints, seals, workdir, loading, results, files    what is on disk
    data, prepare, folder                   prepared sets, how they are, and your own images
    shares, remarks, mend, memory           who is in which split, what to know of it, images that do not fit
    doors                                   PyTorch, Foolbox, safetensors
    events                                  the metrics once more, for TensorBoard
    preemption, profiling, progress         signals, traces, what is seen while work runs
    report                                  report.html, figures and MODEL_CARD.md of a work directory
    stages, usage                           the order of things; run.py calls stages.run; --help

Shape legend: B batch, N train set, Y classes, K clusters per class, M x S Magnet batch, E embedding,
R restarts. Pixels are float32 NHWC in [0, 1]; normalisation is inside the model.
"""

from clustr_jax.classifier import Classifier
from clustr_jax.clusters import Clusters
from clustr_jax.runtime.errors import UserError
from clustr_jax.storage.loading import load

__version__ = "0.1.0"
__all__ = ["Classifier", "Clusters", "UserError", "load"]
