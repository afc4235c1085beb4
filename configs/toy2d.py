"""Two binary point sets in the plane and the paper's 3-layer network with 20 hidden units (section 4.1).

    python run.py --config=configs/toy2d.py:clustr

The paper does not publish its point sets: these are two moons (toy2d_moons, the default) and
interleaved Gaussian pairs (--config.data.name=toy2d_pairs). There is no box; eps is in data units.
`python examples/fig3.py` trains magnet and clustr on both and draws the paper's Fig. 3.
"""

from configs import common


def get_config(method="clustr"):
    c = common.base("toy2d_moons")
    c.model.name = "mlp"
    c.model.mean, c.model.std = (0.0, 0.0), (1.0, 1.0)
    c.warmup.epochs, c.warmup.lr, c.warmup.milestones = 100, 1e-2, ()
    c.train.epochs, c.train.lr = 200, 1e-3
    c.pretrain.augment = "none"
    c.train.attack.eps, c.train.attack.step_size = 0.1, 0.125
    c.magnet.k = 1  # section 4.1
    c.eval.attack.eps, c.eval.attack.step_size, c.eval.attack.steps = 0.1, 0.025, 20
    c.eval.sweep = (0.05, 0.2)
    c.eval.curve = (0.05, 0.2, 0.4)
    c.certify.radii = (0.1, 0.2, 0.3)
    c = common.configure(c, method)
    c.magnet.clusters = 0  # all, which are two
    c.fidelity.scores = ""  # the text's, as for digits: the settings are ours and the updates few
    return c
