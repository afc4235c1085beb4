"""scikit-learn's 8x8 digits: the embedded default, real images and no download.

    python run.py --config=configs/digits.py:clustr_qtrades

The images are small and clean, so the radius is 0.2 (at 8/255 a linear model is already robust),
with steps in the paper's proportions (1.25 eps in training, eps / 4 in evaluation).
"""

from configs import common


def get_config(method="clustr_qtrades"):
    c = common.base("digits")
    c.model.name = "cnn"
    c.model.mean, c.model.std = (0.305,), (0.376,)  # of the training images
    c.warmup.epochs, c.warmup.lr, c.warmup.milestones = 20, 1e-3, ()
    c.warmup.batch_size = 64
    c.train.epochs, c.train.lr = 30, 1e-3
    c.pretrain.augment = "none"  # a mirrored digit is none
    c.train.attack.eps, c.train.attack.step_size = 0.2, 0.25
    c.eval.attack.eps, c.eval.attack.step_size = 0.2, 0.05
    c.eval.attack.steps = 20
    c.eval.sweep = (0.1,)
    c.eval.curve = (0.05, 0.1, 0.3, 0.5)
    c.certify.steps, c.certify.restarts = 20, 1  # this network's certificate is vacuous
    c = common.configure(c, method)
    if c.method == "clustr_qtrades":
        c.fidelity.scores = ""  # the text's, which does no harm in so few updates
    return c
