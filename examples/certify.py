# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Certify
#
# An attack can only show that an image is not robust. A certificate shows that it is: no perturbation shorter
# than the radius changes the prediction. For a ClusTR network it follows from two things, the distances of
# the features to the centroids and an upper bound L of how fast features move when pixels do (the paper's
# Theorem 1, in forms that are sound for many classes: `docs/certificates.md`). For an ordinary network that
# bound is so loose that next to nothing is certified. So here we train one whose features cannot move faster
# than its input.

# %%
import os
import pathlib
import sys

import jax
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
from clustr_jax import attacks, certify, data, lipschitz, losses, stages  # noqa: E402
from configs import digits  # noqa: E402

# %% [markdown]
# ## Two networks
#
# `clustr_certified` trains 1-Lipschitz layers with a certified margin; `clustr` is the paper's, without an
# adversary. Both are small and trained for a few epochs only.


# %%
def trained(method, **model):
    """A digits classifier; kept in runs/, so that it is trained once."""
    config = digits.get_config(method)
    config.warmup.epochs, config.train.epochs = 8, 6
    config.model.update(model)
    workdir = f"runs/notebook-certify-{method}"
    with capture_output():
        stages.run(config, workdir, ("1_warmup", "2_train"))
    return clustr_jax.load(workdir)


unit, ordinary = trained("clustr_certified", width=12), trained("clustr")
x, y = data.load("digits", "test")

# %% [markdown]
# ## How fast can the features move?
#
# `bound` multiplies the layers' exact norms: an upper bound, the same for all inputs. `jacobian_norm` is the
# steepest slope met at given images: no constant can be smaller. The truth lies between the two.

# %%
for name, clf in (("1-Lipschitz", unit), ("ordinary", ordinary)):
    upper = lipschitz.bound(clf.net.describe(clf.variables), clf.net.input_shape)
    lower = lipschitz.jacobian_norm(jax.tree_util.Partial(type(clf).embed, clf), x[:64]).max()
    accuracy = (clf.predict(x) == y).mean()
    print(f"{name:12} clean accuracy {accuracy:.1%}, Lipschitz constant between {lower:.3g} and {upper:.3g}")

# %% [markdown]
# ## Radii
#
# `certify.radius` has no default for `lipschitz`: a certificate is as good as that number. The radius is in
# units of pixels in [0, 1], l2, and 0 where the image is misclassified. The default rule, "any_d", covers
# every rule of the D nearest clusters at once.


# %%
def radii(clf):
    """Certified l2 radius of each test image."""
    upper = lipschitz.bound(clf.net.describe(clf.variables), clf.net.input_shape)
    return certify.radius(clf.clusters, np.asarray(clf.embed(x)), y, lipschitz=upper)


r, r_ordinary = radii(unit), radii(ordinary)
print(f"1-Lipschitz  median radius {np.median(r):.3f}, largest {r.max():.3f}")
print(f"ordinary     median radius {np.median(r_ordinary):.2g}, largest {r_ordinary.max():.2g}")

# %% [markdown]
# ## Certified and attacked
#
# The certificate promises a lower bound of the accuracy at each radius, an attack finds an upper bound. The
# truth lies between the curves; the certified one can never be above the other.

# %%
GRID = np.linspace(0, 1, 101)
STEPS = (0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)
attacked = []
for eps in STEPS:
    x_adv = attacks.pgd(
        jax.random.key(0), unit.logits, x, y, eps=eps, step_size=eps / 8, steps=20, restarts=2, norm="l2",
        loss_fn=losses.margin,
    )  # fmt: skip
    survived = np.asarray(unit.predict(x_adv) == y)
    assert not np.any(~survived & (r > eps)), "a certified image was broken"
    attacked.append(survived.mean())

figure, axes = plt.subplots(figsize=(5.5, 3.4), layout="constrained")
axes.plot(STEPS, 100 * np.array(attacked), "o-", color="#cc6677", label="l2-PGD leaves")
axes.plot(GRID, 100 * certify.accuracy(r, GRID), color="#4477aa", label="certified, 1-Lipschitz")
axes.plot(GRID, 100 * certify.accuracy(r_ordinary, GRID), ":", color="#222222", label="certified, ordinary")
axes.set(xlabel="l2 radius (pixels in [0, 1])", ylabel="accuracy (%)", ylim=(-2, 102))
axes.legend(frameon=False)
axes.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## The safest and the least safe
#
# Test images with their certified radii: the largest above, the smallest of those that are classified
# correctly below.

# %%
order = np.argsort(-r)
correct = order[r[order] > 0]
figure, axes = plt.subplots(2, 8, figsize=(8, 2.6), layout="constrained")
for row, chosen in enumerate((correct[:8], correct[-8:])):
    for panel, index in zip(axes[row], chosen, strict=True):
        panel.imshow(x[index, ..., 0], cmap="gray", vmin=0, vmax=1)
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"{y[index]}: {r[index]:.2f}", fontsize=9)
plt.show()

# %% [markdown]
# `python run.py --config=configs/digits.py:clustr_certified` trains for longer and writes `certified.json`
# with the attack on every certified image. `docs/certificates.md` has the proofs.
