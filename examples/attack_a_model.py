# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Attack a model
#
# Load a ClusTR network, attack it in five lines, and see why the paper's own attack found it robust.
# A minute or two on a CPU; the training is done once and kept in `runs/`.

# %%
import os
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.utils.capture import capture_output

for folder in (pathlib.Path.cwd(), *pathlib.Path.cwd().parents):
    if (folder / "configs").is_dir():  # in a clone, configs/ lies beside the package
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        break
else:  # in an installed copy, inside it
    import clustr_jax.configs

    sys.modules["configs"] = clustr_jax.configs

import clustr_jax  # noqa: E402
from clustr_jax import attacks, data, losses, stages  # noqa: E402
from configs import digits  # noqa: E402

WORKDIR = "runs/digits-clustr_qtrades"  # the one of `make run`: what is finished there is not done again
with capture_output():
    stages.run(digits.get_config("clustr_qtrades"), WORKDIR, ("1_warmup", "2_train"))

# %% [markdown]
# ## Five lines
#
# `clf.logits` is a function of images: pixels float32 `[B, H, W, C]` in [0, 1] in, log-domain scores `[B, Y]`
# out. `attacks.pgd` takes any such function. For each image it returns the first point within `eps` that is
# misclassified, of any restart, and the one with the largest loss where there is none. So what counts is
# whether the classifier is wrong there, and that is for you to look at:

# %%
clf = clustr_jax.load(WORKDIR)
x, y = data.load("digits", "test")
x_adv = attacks.pgd(jax.random.key(0), clf.logits, x, y, eps=0.2, step_size=0.05, steps=20, restarts=10)
clean, robust = (clf.predict(x) == y).mean(), (clf.predict(x_adv) == y).mean()
print(f"accuracy on {len(y)} test images: {clean:.1%} clean, {robust:.1%} under PGD")

# %% [markdown]
# ## Why the paper saw more
#
# A ClusTR network is a nearest-centroid classifier. The paper scores class c by the sum of exp(-d²/2σ²) over
# its clusters, and attacks the cross entropy of these scores. `clf.scores` are these scores, `clf.logits` are
# their logarithms: both rank the classes the same way. The paper's evaluation has a second habit: of all
# restarts it keeps the one with the largest loss, whether that one fools the network or not
# (`select="loss"`). The same PGD, both ways of each:


# %%
def survivors(f, eps, restarts=10, **settings):
    """Which images the deployed rule still classifies correctly after PGD on f, and where they ended."""
    x_adv = attacks.pgd(
        jax.random.key(0), f, x, y, eps=eps, step_size=eps / 4, steps=20, restarts=restarts, **settings
    )
    return np.asarray(clf.predict(x_adv) == y), x_adv


# An attack says of exp scores that they may blind it. Here they shall.
warnings.filterwarnings("ignore", "logits_fn returned bounded scores")
print("accuracy under PGD     largest loss   first success")
for name, f in (("exp scores (paper)", clf.scores), ("log scores", clf.logits)):
    rates = [survivors(f, 0.2, select=select)[0].mean() for select in ("loss", "success")]
    print(f"{name:22} {rates[0]:12.1%} {rates[1]:15.1%}")

# %% [markdown]
# What stops the attack on exp scores? Look at where it gave up. The features have left their own centroids,
# all ten scores are close to 0, and the softmax of ten zeros is one tenth each: the loss has arrived at log
# 10 and has nowhere to go. What is left of the gradient points away from the own centroid, not towards
# another class. The logarithm has no such plateau:


# %%
def steepness(f, x):
    """Largest derivative of the cross entropy by a pixel, for each image."""
    gradient = jax.grad(lambda x: losses.cross_entropy(f(x), jnp.asarray(y)).sum())(jnp.asarray(x))
    return np.abs(gradient).max(axis=(1, 2, 3))


stuck, x_stuck = survivors(clf.scores, 0.2, select="loss")
scores = clf.scores(x_stuck)
print(f"images on which the attack on exp scores gave up: {stuck.sum()}; medians there:")
print(f"    largest of the ten scores  {np.median(scores.max(axis=1)[stuck]):.2g}")
print(f"    loss, exp scores           {np.median(losses.cross_entropy(scores, y)[stuck]):.3f}"
      f" (log 10 is {np.log(10):.3f})")  # fmt: skip
print(f"    steepness, exp scores      {np.median(steepness(clf.scores, x_stuck)[stuck]):.2g}")
print(f"    steepness, log scores      {np.median(steepness(clf.logits, x_stuck)[stuck]):.2g}")

# %% [markdown]
# The radius is traced, so that a sweep of it compiles once (two restarts, for speed):

# %%
RADII = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3)
blind, sound = [100 * clean], [100 * clean]  # at radius 0
for eps in RADII[1:]:
    blind.append(100 * survivors(clf.scores, eps, restarts=2, select="loss")[0].mean())
    sound.append(100 * survivors(clf.logits, eps, restarts=2)[0].mean())

figure, axes = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
axes.plot(RADII, blind, "o--", color="#cc6677", label="exp scores, largest loss (paper)")
axes.plot(RADII, sound, "o-", color="#4477aa", label="log scores, first success")
axes.set(xlabel="eps (l∞, pixels in [0, 1])", ylabel="accuracy under attack (%)", ylim=(-2, 102))
axes.legend(frameon=False)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# The network is the same in both curves: what lies between them is the attack, not robustness.
#
# ## AutoAttack
#
# The standard ensemble, each attack on what the others left. `broken_by` has the attack that broke each
# image, "" where none did and "clean" where the image was misclassified before.

# %%
result = attacks.autoattack(jax.random.key(0), clf.logits, x, y, eps=0.2)
names, counts = np.unique(result.broken_by, return_counts=True)
print(f"robust accuracy {result.robust.mean():.1%}")
print({str(name): int(count) for name, count in zip(names, counts, strict=True)})

# %% [markdown]
# ## What the images look like
#
# Above the clean images, below what AutoAttack made of them, between them the difference (grey is 0, black
# and white are -0.2 and 0.2).

# %%
shown = [
    np.flatnonzero(~result.robust & (result.broken_by != "clean") & (y == digit))[0] for digit in range(8)
]
before, after = clf.predict(x[shown]), clf.predict(result.x_adv[shown])
figure, axes = plt.subplots(3, len(shown), figsize=(8, 3.4), layout="constrained")
for i, index in enumerate(shown):
    images = (x[index], result.x_adv[index] - x[index], result.x_adv[index])
    limits = ((0, 1), (-0.2, 0.2), (0, 1))
    for row, (image, (low, high)) in enumerate(zip(images, limits, strict=True)):
        axes[row, i].imshow(image[..., 0], cmap="gray", vmin=low, vmax=high)
        axes[row, i].set(xticks=[], yticks=[])
    axes[0, i].set_title(f"{before[i]}", fontsize=10)
    axes[2, i].set_xlabel(f"{after[i]}", fontsize=10, color="#cc3311")
axes[0, 0].set_ylabel("clean")
axes[1, 0].set_ylabel("difference")
axes[2, 0].set_ylabel("adversarial")
plt.show()

# %% [markdown]
# Where to go on: `bring_your_own_model` takes a network of yours; `docs/attacks.md` says what each attack
# does; `python run.py --config=configs/digits.py:clustr_qtrades` makes the whole evaluation with its checks.
