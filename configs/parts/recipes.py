"""What the settings of methods are made of: how a stage is optimised, and its adversary's steps."""

from ml_collections import ConfigDict


def recipe(epochs, lr, milestones):
    """The settings of one stage of training."""
    r = ConfigDict()
    r.epochs = epochs
    r.batch_size = 128  # not used with Magnet batches
    r.optimizer = "adam"  # or "sgd"
    r.momentum = 0.9  # of SGD
    r.nesterov = True  # of SGD; the code of Free AT, Fast AT, TRADES, Pang et al.: plain momentum, False
    r.norm_bias_rate = 1.0  # of SGD: so many times the rate for the biases of batch norm
    r.lookahead = 0  # steps after which slow weights move towards the fast ones (Zhang et al. 2019); 0 = off
    r.lr = lr
    r.weight_decay = 0.0
    r.schedule = "multistep"  # x decay at the epochs `milestones`; or "cosine", "onecycle", "triangle"
    r.milestones = milestones
    r.decay = 0.1
    r.replays = 1  # steps on the same batch, the perturbation carried along (Free AT: 8)
    r.eps_ramp = 0.0  # epochs over which the adversary's radius grows from 0 to eps
    r.ema = 0.0  # decay of a moving average of the weights, which is then evaluated; 0 = off
    r.nonfinite = "stop"  # at a loss or gradient that is not finite: "stop", or "skip" the step and count it
    r.select = "last"  # the model that is kept at the end: "last", or "best" on the held-out part
    r.awp = 0.0  # gamma of adversarial weight perturbation; 0 = off
    return r


def sgd(c, epochs, lr, milestones, weight_decay):
    """Stage 2 by SGD with a stepwise rate."""
    c.train.optimizer, c.train.schedule = "sgd", "multistep"
    c.train.epochs, c.train.lr, c.train.milestones = epochs, lr, milestones
    c.train.weight_decay, c.train.batch_size = weight_decay, 128


OPTIMISATION = (
    "epochs", "batch_size", "optimizer", "momentum", "nesterov", "norm_bias_rate", "lookahead", "lr",
    "weight_decay", "schedule", "milestones", "decay",
)  # fmt: skip


def as_warmup(c):
    """Stage 2 is optimised as the config has it for the warm-up."""
    for name in OPTIMISATION:
        c.train[name] = c.warmup[name]


def to_warmup(c):
    """The warm-up is optimised as stage 2 is, to its last epoch."""
    for name in OPTIMISATION:
        c.warmup[name] = c.train[name]
    c.warmup.target = 0.0


def scaled_attack(c, steps, step, start="uniform"):
    """Steps of `step`/8 of eps: 2 means 2/255 at eps 8/255."""
    c.train.attack.steps, c.train.attack.start = steps, start
    c.train.attack.step_size = c.train.attack.eps * step / 8
