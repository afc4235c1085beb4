"""The base config, and what each method changes in it.

Names follow the keyword arguments of the functions they are passed to; the paper's symbols are in
the comments. Every default of the project lives here: the code has none of its own. Leaves are
JSON values (numbers, words, tuples), so that any of them can be set on the command line
(`--config.train.epochs=5`; eps as a decimal, 8/255 = 0.03137255).
"""

from ml_collections import ConfigDict

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # authors' code, CIFAR-10 and -100
SVHN_MEAN, SVHN_STD = (0.4378, 0.4439, 0.4729), (0.1980, 0.2011, 0.1971)  # authors' code


def base(dataset: str) -> ConfigDict:
    """What all data sets and methods share: the paper's appendix D and the authors' evaluation."""
    c = ConfigDict()
    c.method = ""
    c.variant = ""  # names the default work directory: runs/<dataset>-<method>[-<variant>]
    c.seed = 0
    c.smoke = False  # True shrinks everything to seconds
    c.init_from = ""  # a work directory or stage folder: start the first stage from its model

    c.data = ConfigDict()
    c.data.name = dataset
    c.data.dir = ""  # "" = $TFDS_DATA_DIR or ~/tensorflow_datasets
    c.data.train_size = 0  # stratified subset; 0 = all
    c.data.test_size = 0
    c.data.val_size = 0.02  # share of the training split held out for stopping and selection
    c.data.augment = "none"  # "crop_flip", "crop" or "none"

    c.model = ConfigDict()
    c.model.name = "resnet18"
    c.model.width = 0  # channels of the first stage; 0 = the usual ones
    c.model.mean = (0.0,)
    c.model.std = (1.0,)

    c.warmup = _recipe(epochs=90, lr=1e-2, milestones=(30, 60))  # appendix D
    c.warmup.target = 0.0  # stop at this accuracy on the held-out part; 0 = run all epochs
    c.train = _recipe(epochs=30, lr=1e-4, milestones=())
    c.train.lam = 8.0  # lambda of Eq. 5
    c.train.attack = ConfigDict()  # the adversary of training: keyword arguments of attacks.pgd
    c.train.attack.eps = 8 / 255
    c.train.attack.step_size = 10 / 255  # eta of QTRADES: authors' code
    c.train.attack.steps = 1
    c.train.attack.start = "uniform"

    c.magnet = ConfigDict()
    c.magnet.alpha = 12.5  # margin of Eq. 3
    c.magnet.k = 2  # K, clusters per class
    c.magnet.k_per_class = ()  # one K per class, instead of k
    c.magnet.clusters = 0  # M, clusters per batch; 0 = min(12, all clusters)
    c.magnet.samples = 20  # S, examples per cluster
    c.magnet.n_init = 10  # k-means restarts
    c.magnet.max_iter = 40  # Lloyd iterations
    c.magnet.seed_floor = 0.05  # uniform share in drawing the seed cluster

    c.eval = ConfigDict()
    c.eval.n = 0  # test images to attack; 0 = all
    c.eval.nearest = 0  # D, nearest clusters of the deployed rule; 0 = all
    c.eval.quick = False  # main eps only, 20 steps
    c.eval.lanes = 256  # images attacked side by side
    c.eval.protocols = ("paper", "sound")
    c.eval.attack = ConfigDict()  # keyword arguments of attacks.pgd
    c.eval.attack.eps = 8 / 255
    c.eval.attack.step_size = 2 / 255  # eta
    c.eval.attack.steps = 100
    c.eval.attack.restarts = 10
    c.eval.paper_steps = (20, 100)  # PGD^20 and PGD^100 of the paper's protocol
    c.eval.sweep = (2 / 255, 16 / 255, 25.5 / 255)  # other radii of Table 4
    return c


def _recipe(epochs, lr, milestones):
    """The settings of one stage of training."""
    r = ConfigDict()
    r.epochs = epochs
    r.batch_size = 128  # not used with Magnet batches
    r.optimizer = "adam"  # or "sgd"
    r.lr = lr
    r.weight_decay = 0.0
    r.schedule = "multistep"  # x decay at the epochs `milestones`; or "cosine", "onecycle"
    r.milestones = milestones
    r.decay = 0.1
    return r


def nominal(c):
    """Cross entropy: the warm-up's recipe and nothing after it."""
    for name in ("epochs", "batch_size", "optimizer", "lr", "weight_decay", "schedule", "milestones", "decay"):
        c.train[name] = c.warmup[name]


def magnet(c):
    """Magnet loss from scratch. The paper gives no epochs: warm-up and fine-tuning together (ours)."""
    c.train.epochs = c.warmup.epochs + c.train.epochs


def clustr(c):
    """Warm-up, then the Magnet loss."""


def clustr_qtrades(c):
    """Warm-up, then the Magnet loss and the QTRADES term (Eq. 5)."""


METHODS = {f.__name__: f for f in (nominal, magnet, clustr, clustr_qtrades)}


def configure(c: ConfigDict, method: str) -> ConfigDict:
    """Apply a method to a data set's config; ValueError with the list where there is none of that name."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}")
    c.method = method
    METHODS[method](c)
    return c
