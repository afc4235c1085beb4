"""The base config, and what each method changes in it.

Names follow the keyword arguments of the functions they are passed to; the paper's symbols are in
the comments. Every default of a run lives here. Leaves are
JSON values (numbers, words, tuples), so that any of them can be set on the command line
(`--config.train.epochs=5`, `--config.eval.attack.eps=8/255`).
"""

from ml_collections import ConfigDict

from clustr_jax.reference.switches import SWITCHES
from clustr_jax.runtime.errors import nearest
from configs.parts import recipes

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # authors' code, CIFAR-10 and -100
SVHN_MEAN, SVHN_STD = (0.4378, 0.4439, 0.4729), (0.1980, 0.2011, 0.1971)  # authors' code


def base(dataset: str) -> ConfigDict:
    """What all data sets and methods share: the paper's appendix D and the authors' evaluation."""
    c = ConfigDict()
    c.method = ""
    c.variant = ""  # names the default work directory: runs/<dataset>-<method>[-<variant>]
    c.seed = 0
    c.smoke = False  # True shrinks everything to seconds
    c.init_from = ""  # a work directory, stage folder or .safetensors file to start the first stage from

    c.data = ConfigDict()
    c.data.name = dataset
    c.data.dir = ""  # "" = $TFDS_DATA_DIR or ~/tensorflow_datasets; of "folder": your images
    c.data.train_size = 0  # stratified subset; 0 = all
    c.data.test_size = 0
    c.data.val_size = 0.02  # share of the training split held out for stopping and selection
    c.data.augment = "none"  # "crop_flip", "crop", "flip", "translate_alternate" or "none"
    # Of the training images: "every_device", "sharded" by rows, or "auto", by their bytes (docs/scaling.md).
    c.data.placement = "auto"

    c.model = ConfigDict()
    c.model.name = "resnet18"  # "auto": by the size of the images
    c.model.width = 0  # channels of the first stage; 0 = the usual ones
    c.model.mean = (0.0,)  # () = of the training images, as std
    c.model.std = (1.0,)
    c.model.dtype = "float32"  # "bfloat16": layers in training mode, for accelerators

    c.warmup = recipes.recipe(epochs=90, lr=1e-2, milestones=(30, 60))  # appendix D
    c.warmup.target = 0.0  # stop at this accuracy on the held-out part; 0 = run all epochs
    c.train = recipes.recipe(epochs=30, lr=1e-4, milestones=())
    c.train.lam = 8.0  # lambda of Eq. 5
    c.train.beta = 6.0  # 1 / lambda of TRADES
    c.train.consistency = "ce"  # of ClusTR+QTRADES: "ce" (Eq. 5), "kl", or "mse" of the embeddings
    c.train.stop_target = False  # no gradient through the clean side of the consistency term
    c.train.label_smoothing = 0.0  # share of a label that cross entropy spreads over all classes, linear head
    c.train.xent_lam = 0.0  # weight of cross entropy on the cluster head (authors' --xent-lambda)
    c.train.radius = 36 / 255  # l2 radius that the *_certified methods train for, in [0, 1] pixels
    # Of the cross entropy of nominal_certified, for a head of unit length; 0 = the head finds its own length.
    c.train.temperature = 0.0
    c.train.nearest = 0  # D nearest clusters in training; 0 = all (authors' --L)
    c.train.attack_bn = "batch"  # inner attack: "batch" statistics (kept out of the running ones) or "eval"
    # What follows when a stage destroys the network it was handed: "warn", "stop" or "restore".
    c.train.on_collapse = "warn"
    # Held-out images that are attacked after each epoch, by the paper's protocol and by quick-1; 0 = none.
    c.train.probe = 0
    c.train.monitor = True  # single-step against multi-step accuracy on held-out images, each epoch
    c.train.attack = ConfigDict()  # the adversary of training: keyword arguments of attacks.pgd
    c.train.attack.eps = 8 / 255
    c.train.attack.step_size = 10 / 255  # eta of QTRADES: authors' code
    c.train.attack.steps = 1
    c.train.attack.start = "uniform"
    c.train.noise = 0.0  # N-FGSM: its one step starts from noise of so many eps, in no ball; 0 = off
    # Of clustr_at and linear_at, which are one stage:
    c.train.loss = "ce"  # of the adversary's images, or "trades": of clean ones + beta KL
    c.train.aim = (
        "labels"  # what their adversary leads away from; "clean" predictions, or to a "rival" (MALT)
    )
    c.train.ikl = 0.0  # weight of IKL's term between centroids (theirs: beta 20)
    c.train.ikl_temperature = 4.0  # of the probabilities that weigh it
    c.train.centroids = "learned"  # or "simplex": held, as far from each other as they can be
    c.train.learn_variance = False  # of the head as well
    c.train.sampler = "uniform"  # or "magnet" batches

    c.fidelity = ConfigDict()  # the authors' code switch by switch: docs/fidelity.md
    c.fidelity.preset = ""  # "paper_code" sets all switches that are left empty
    for switch in SWITCHES:
        c.fidelity[switch] = ""

    c.pretrain = ConfigDict()  # source data set of at_pretrain
    c.pretrain.name = "imagenet_resized/32x32"
    c.pretrain.dir = ""
    c.pretrain.train_size = 0
    c.pretrain.test_size = 0
    c.pretrain.val_size = 0.02
    c.pretrain.augment = "crop_flip"
    c.pretrain.placement = "auto"

    c.magnet = ConfigDict()
    c.magnet.alpha = 12.5  # margin of Eq. 3
    c.magnet.fit = "kmeans"  # or "linear_head": one cluster per class, the same classifier as the warm-up's
    c.magnet.k = 2  # K, clusters per class
    c.magnet.k_per_class = ()  # one K per class, instead of k
    c.magnet.clusters = 0  # M, clusters per batch; 0 = min(12, all clusters)
    c.magnet.samples = 20  # S, examples per cluster
    c.magnet.n_init = 10  # k-means restarts
    c.magnet.max_iter = 40  # Lloyd iterations
    c.magnet.sharpness = 1.0  # divides the variance, a trace over E dimensions, in the loss and in the head
    c.magnet.seed_floor = 0.05  # uniform share in drawing the seed cluster

    c.eval = ConfigDict()
    c.eval.n = 0  # test images to attack; 0 = all
    c.eval.nearest = 0  # D, nearest clusters of the deployed rule; 0 = all
    c.eval.quick = False  # main eps only, 20 steps, 200 queries; protocols are then called ...-quick
    c.eval.slots = 64  # (example, restart) pairs attacked side by side: sets the memory; 512 or more on a GPU
    c.eval.protocols = ("paper", "sound")  # of "paper", "sound", "quick"
    c.eval.diagnostics = True  # twenty-nine checks of the sound result, and a verdict
    c.eval.transfer = ()  # work directories whose models attack this one as well
    c.eval.attack = ConfigDict()  # keyword arguments of attacks.pgd
    c.eval.attack.eps = 8 / 255
    c.eval.attack.step_size = 2 / 255  # eta
    c.eval.attack.steps = 100
    c.eval.attack.restarts = 10
    c.eval.paper_steps = (20, 100)  # PGD^20 and PGD^100 of the paper's protocol
    c.eval.sweep = (2 / 255, 16 / 255, 25.5 / 255)  # other radii of the paper's protocol (Table 4)
    c.eval.curve = (1 / 255, 2 / 255, 4 / 255, 16 / 255, 32 / 255, 64 / 255)  # ... of the sound one
    c.eval.apgd_steps = 100  # of APGD-CE, APGD-T and FAB-T, as in AutoAttack
    c.eval.targets = 9  # likeliest classes, or nearest clusters, that targeted attacks go for
    c.eval.queries = 5000  # of Square

    c.certify = ConfigDict()  # l2, pixels in [0, 1]
    c.certify.rule = "any_d"  # or "hard" (K = 1), "soft" (K = 1 or nearest = 0)
    c.certify.radii = (36 / 255, 72 / 255, 108 / 255, 1.0)  # customary for CIFAR; the first is the main one
    c.certify.steps = 50  # of l2-PGD on eval.n images, to hold against the certificates
    c.certify.restarts = 2
    return c


def parse(arg: str) -> tuple[str, tuple[str, ...]]:
    """ "method,variant" -> (method, variants); ValueError with the list for an unknown one."""
    method, *variants = arg.split(",")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}{nearest(method, METHODS)}; known: {', '.join(METHODS)}")
    for variant in variants:
        if variant not in VARIANTS:
            raise ValueError(
                f"unknown variant {variant!r}{nearest(variant, VARIANTS)}; known: {', '.join(VARIANTS)}"
            )
    return method, tuple(variants)


def configure(c: ConfigDict, arg: str) -> ConfigDict:
    """Apply "method" or "method,variant" to a data set's config."""
    c.method, variants = parse(arg)
    METHODS[c.method](c)
    for variant in variants:
        VARIANTS[variant](c)
        c.variant = variant
    return c


def nominal(c):
    """Cross entropy: the warm-up's recipe and nothing after it."""
    recipes.as_warmup(c)


def free_at(c):
    """Free AT, m = 8 (Shafahi et al. 2019: 200 / m epochs of SGD, rate / 10 at 1/2 and 3/4)."""
    recipes.sgd(c, epochs=25, lr=0.1, milestones=(12, 19), weight_decay=2e-4)
    c.train.replays = 8
    recipes.scaled_attack(c, 1, 8)  # their step is eps


def fast_at(c):
    """FGSM from a random start, step 1.25 eps (Wong et al. 2020: cyclic rate up to 0.2)."""
    recipes.sgd(c, epochs=30, lr=0.2, milestones=(), weight_decay=5e-4)
    c.train.schedule = "onecycle"
    recipes.scaled_attack(c, 1, 10)


def pgd_at(c):
    """Madry et al. 2018 with PGD-10 and the schedule of Pang et al. 2021."""
    recipes.sgd(c, epochs=110, lr=0.1, milestones=(100, 105), weight_decay=5e-4)
    recipes.scaled_attack(c, 10, 2)


def at_pretrain(c):
    """PGD-AT on another data set, then 5 epochs with a new head (Hendrycks et al. 2019)."""
    pgd_at(c)
    recipes.to_warmup(c)
    c.train.epochs, c.train.lr, c.train.schedule, c.train.milestones = 5, 1e-3, "cosine", ()


def trades(c):
    """Zhang et al. 2019: 10 steps from N(0, 0.001), beta 6, attack in eval mode, 76 epochs, drop at 75."""
    recipes.sgd(c, epochs=76, lr=0.1, milestones=(75,), weight_decay=2e-4)
    recipes.scaled_attack(c, 10, 2, start="normal")
    c.train.attack_bn = "eval"


def qtrades(c):
    """QTRADES on its own, linear head. The paper gives no epochs or rate: the warm-up's recipe (ours)."""
    recipes.as_warmup(c)


def magnet(c):
    """Magnet loss from scratch. The paper gives no epochs: warm-up and fine-tuning together (ours)."""
    c.train.epochs = c.warmup.epochs + c.train.epochs


def clustr(c):
    """Warm-up, then the Magnet loss."""


def clustr_qtrades(c):
    """Warm-up, then the Magnet loss and the QTRADES term (Eq. 5) by the authors' exp scores.

    By the text's log scores the paper's own lambda destroys the network. After each epoch the batch
    statistics are those of clean images (docs/fidelity.md).
    """
    c.fidelity.scores = "exp"


def clustr_trades(c):
    """Ours: TRADES, then log-domain Magnet + KL to a 10-step adversary through the cluster head.

    Not from a network trained on clean images: there the KL of a full-size adversary outweighs the Magnet
    loss, which stays at its margin while the features of all classes fall together. The Magnet loss does not
    see their scale and the KL shrinks with it, so cross entropy on the cluster head holds it. Margin and
    weights: docs/lab-notes.md. Batches have 20 clusters, all of them with 10 classes: with fewer classes the
    batch statistics are not those of the data.

    At equal passes the second stage gained nothing beyond the interval in any setting that was tried, and
    mostly lost (docs/lab-notes.md). With `train.epochs=0` there is none: k-means on the features of TRADES,
    as robust within the interval on CIFAR-10 and three points less accurate; with `magnet.fit=linear_head`,
    `magnet.k=1` and `magnet.clusters=10` as well, it is TRADES' own classifier.
    """
    train = c.train.copy_and_resolve_references()
    trades(c)
    recipes.to_warmup(c)
    for name in recipes.OPTIMISATION:
        c.train[name] = train[name]
    c.train.epochs = 5
    c.train.consistency = "kl"
    c.train.lam, c.train.xent_lam, c.magnet.alpha = 96.0, 8.0, 0.0
    c.magnet.clusters, c.magnet.samples = 20, 12


def clustr_at(c):
    """Ours: one stage with a cluster head that is trained from the first step, one-step TRADES + IKL, EMA.

    No exchange of heads: the centroids are parameters, and the adversary, the loss and the predictions go
    through their log scores. The one inner step is that of N-FGSM, with a radius that grows over the first
    fifth. docs/one_stage.md has the options; `linear_at` is the same with a linear head.
    """
    recipes.sgd(c, epochs=30, lr=0.1, milestones=(), weight_decay=5e-4)
    c.train.schedule, c.train.eps_ramp, c.train.ema = "onecycle", 6.0, 0.999
    recipes.scaled_attack(c, 1, 8)
    c.train.noise = 2.0  # de Jorge et al. 2022
    c.train.loss, c.train.beta, c.train.stop_target, c.train.ikl = "trades", 4.0, True, 20.0
    c.magnet.k = 1


def linear_at(c):
    """Ours: the twin of clustr_at with a linear head and all else the same."""
    clustr_at(c)


def nominal_certified(c):
    """Ours: 1-Lipschitz network, cross entropy with the certified margin on the linear head."""
    _unit(c)
    recipes.as_warmup(c)


def clustr_certified(c):
    """Ours: 1-Lipschitz network, certified margin in the warm-up and in the Magnet loss, K = 1.

    The margin alpha is small and the loss's variance divided by 16: features that move by at most
    |x - x'| never get 12.5 nats apart at their full variance.
    """
    _unit(c)
    c.magnet.k, c.magnet.alpha, c.magnet.sharpness = 1, 1.0, 16.0


def _unit(c):
    """A 1-Lipschitz network; no division by the std, which would multiply its constant by 1 / std.

    No crops: zeros moved in at the border are a large change in l2, which such a network must follow.
    """
    c.model.name = "lip_sll"
    c.model.std = (1.0,)
    if c.data.augment == "crop_flip":
        c.data.augment = "flip"


METHODS = {
    f.__name__: f
    for f in (
        nominal, free_at, fast_at, pgd_at, at_pretrain, trades, qtrades, magnet, clustr, clustr_qtrades,
        clustr_trades, clustr_at, linear_at, nominal_certified, clustr_certified,
    )
}  # fmt: skip


def cpu(c):
    """What two CPU cores can train: resnet8, one-cycle Adam, few epochs; at most 1,000 test images.

    Adversaries are cheaper than in the paper's rows: three steps of eps / 2 instead of ten, four replays
    instead of eight. Their radius grows over the first epochs: from the full radius on, a small network
    predicts one class only for many epochs.
    """
    c.model.name = {"resnet18": "resnet8", "auto": "auto_small"}.get(c.model.name, c.model.name)
    c.warmup.epochs, c.warmup.lr, c.warmup.schedule, c.warmup.target = 12, 5e-3, "onecycle", 0.0
    c.warmup.optimizer, c.warmup.weight_decay, c.warmup.milestones = "adam", 1e-4, ()
    c.train.optimizer, c.train.schedule, c.train.milestones = "adam", "onecycle", ()
    c.train.lr, c.train.weight_decay, c.train.epochs = 5e-3, 1e-4, 12
    if c.method in ("magnet", "clustr", "clustr_qtrades", "clustr_trades", "clustr_certified"):
        c.train.lr, c.train.weight_decay, c.train.epochs = 1e-3, 0.0, 18 if c.method == "magnet" else 6
    if c.method in ("fast_at", "pgd_at", "trades", "free_at"):
        c.train.lr, c.train.batch_size = 1e-2, 64
        c.train.epochs = {"fast_at": 25, "free_at": 5}.get(c.method, 8)
        c.train.eps_ramp = 0.4 * c.train.epochs
    if c.method == "pgd_at":  # no clean images: the slowest to start
        c.train.lr, c.train.batch_size, c.train.epochs, c.train.eps_ramp = 5e-3, 32, 10, 6.0
    if c.method in ("pgd_at", "trades", "at_pretrain", "clustr_trades"):
        c.train.attack.steps, c.train.attack.step_size = 3, c.train.attack.eps / 2
    if c.method in ("at_pretrain", "clustr_trades"):  # the warm-up is the smaller trades, or close to it
        c.warmup.epochs, c.warmup.lr, c.warmup.batch_size, c.warmup.eps_ramp = 8, 1e-2, 64, 3.2
    if c.method == "clustr_trades":
        c.train.epochs, c.train.lr, c.magnet.samples = 3, 2e-3, 8
    if c.method == "at_pretrain":
        c.train.epochs = 5
    if c.method == "free_at":
        c.train.replays = 4
    if c.method in ("clustr_at", "linear_at"):
        c.train.optimizer, c.train.lr, c.train.weight_decay = "sgd", 0.1, 5e-4
        c.train.epochs, c.train.eps_ramp = 20, 4.0
    if c.method.endswith("_certified"):
        c.warmup.epochs, c.warmup.weight_decay = 9, 0.0
    c.eval.attack.steps, c.eval.paper_steps, c.eval.sweep = 20, (20,), ()
    if c.data.name != "digits" and not c.data.name.startswith("toy2d"):  # those have fewer, and other radii
        c.eval.n, c.eval.curve = 1000, (2 / 255, 4 / 255, 16 / 255, 32 / 255)


def _airbench(recipe):
    """As cifar10-airbench, whose rate of 11.5 and decay of 0.0153 are for sums over 1,024 images."""
    recipe.optimizer, recipe.momentum, recipe.nesterov = "sgd", 0.85, True
    recipe.batch_size, recipe.lr, recipe.weight_decay = 1024, 1.5, 1.33e-3
    recipe.schedule, recipe.milestones = "triangle", ()
    recipe.epochs, recipe.norm_bias_rate, recipe.lookahead = 16, 64.0, 5


def fast(c):
    """The small network and recipe of cifar10-airbench, for images of some 32 pixels and two CPU cores.

    Its first convolution whitens where clean images train it, and is an ordinary one where an adversary does
    from the first step: whitening amplifies what images hardly vary in. Adversaries are as in `cpu`. Magnet
    batches are small, for the number of updates decides (docs/results.md).
    """
    own = c.model.name
    cpu(c)
    if c.method.endswith("_certified"):
        _certified(c)
        return
    if own not in ("resnet18", "auto", "resnet8", "auto_small"):
        raise ValueError(f"variant fast is for images of 9 pixels or more a side, this data set takes {own}")
    adversarial = c.method not in ("nominal", "magnet", "clustr", "clustr_qtrades")
    c.model.name, c.model.width = "fast_plain" if adversarial else "fast", 64
    if c.data.augment == "crop_flip":
        c.data.augment = c.pretrain.augment = "translate_alternate"
    if not adversarial:
        _airbench(c.warmup)
        c.train.label_smoothing = 0.2
    if c.method == "nominal":
        recipes.as_warmup(c)
    if c.method in ("clustr_at", "linear_at"):
        c.train.epochs, c.train.eps_ramp = 30, 6.0
    if c.method in ("magnet", "clustr", "clustr_qtrades"):
        c.magnet.samples = 8
        c.train.epochs, c.train.lr, c.train.schedule = 12, 1e-4, "multistep"
        c.train.probe = 200


def _certified(c):
    """Convex potential layers, trained by cross entropy with the certified margin; no second stage.

    CIFAR-10: 64.9 % clean and 53.9 % certified at 36/255 on all test images, after 49 minutes on two cores
    that were not idle (results/certified/long-cpl-0.json, seed 0). Temperature and radius are of Prach and
    Lampert 2022: twice the radius of the certificates, which is a margin of 2 sqrt(2) x 36/255.
    """
    c.model.name, c.model.width = "lip_cpl", 32
    if c.data.augment == "flip":
        c.data.augment = c.pretrain.augment = "translate_alternate"
    c.train.radius, c.train.temperature = 72 / 255, 0.25
    c.warmup.epochs, c.warmup.lr, c.warmup.batch_size = 40, 5e-3, 256
    if c.method == "nominal_certified":
        recipes.as_warmup(c)
    else:
        c.magnet.fit, c.train.epochs = "linear_head", 0


VARIANTS = {"cpu": cpu, "fast": fast}
