"""Our attacks against PyTorch's, on the same weights: robust accuracy, and time of PGD^20 with 10 restarts.

    python benchmarks/attacks.py [--n=500] [--parts=agreement,bare,speed] [--speed_eps=3] [--output=FILE]

Needs benchmarks/requirements-bench.txt and a prepared TFDS CIFAR-10. A small CNN is trained in PyTorch,
once with a PGD-5 adversary and once without, and kept under --cache; its weights are carried over to JAX.

agreement: APGD-CE, APGD-T, FAB-T and Square each alone, and the standard ensemble, ours against those
of pyautoattack, on n images. Where ours succeeds and theirs does not, our images are verified in PyTorch.
bare: the input gradient of the network by itself, XLA against PyTorch.
speed: 512 images, PGD^20 x 10 restarts, on the first network at SPEED_EPS/255 (where it is about 45 % robust)
and on the other at 8/255 (where it is not), against the libraries' documented loops
(torchattacks' PGD and Foolbox's and ART's with 10 restarts) and torchattacks' MultiAttack; seconds after
compilation, compilation beside it, and gradient evaluations counted in the model.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import process  # noqa: F401  puts clustr_jax on the path
import torch
import torch.nn.functional as F
from jax.tree_util import Partial

from clustr_jax import attacks, data, losses
from clustr_jax.attacks import attack_losses, ensemble, scheduler
from clustr_jax.attacks.pgd import as_partial
from clustr_jax.attacks.scheduled_pgd import PGD
from clustr_jax.doors.torch_layout import as_jax
from clustr_jax.models.convolution import conv2d

EPS, STEPS, RESTARTS = 8 / 255, 20, 10


class Net(torch.nn.Module):
    """Three strided convolutions and two linear layers; pixels in [0, 1]."""

    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(3, 32, 3, padding=1)
        self.conv2 = torch.nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.conv3 = torch.nn.Conv2d(64, 64, 3, stride=2, padding=1)
        self.fc1 = torch.nn.Linear(64 * 8 * 8, 128)
        self.fc2 = torch.nn.Linear(128, 10)
        self.passes = 0  # images that went through

    def forward(self, x):
        self.passes += len(x)
        x = (x - 0.473) / 0.251
        for conv in (self.conv1, self.conv2, self.conv3):
            x = F.relu(conv(x))
        return self.fc2(F.relu(self.fc1(x.permute(0, 2, 3, 1).flatten(1))))


def to_jax(net: Net) -> Partial:
    """The same function in JAX, NHWC."""
    p = {name: as_jax(value) for name, value in net.state_dict().items()}

    def logits(p, x):
        x = (x - 0.473) / 0.251
        for name, stride in (("conv1", 1), ("conv2", 2), ("conv3", 2)):
            x = jax.nn.relu(conv2d(x, p[f"{name}.weight"], stride, 1) + p[f"{name}.bias"])
        x = jax.nn.relu(x.reshape(x.shape[0], -1) @ p["fc1.weight"] + p["fc1.bias"])
        return x @ p["fc2.weight"] + p["fc2.bias"]

    return Partial(logits, p)


def train(path, epochs, adversarial, size) -> Net:
    """Adam, one-cycle; with `adversarial` on PGD-5 images, the radius growing over half of the steps."""
    torch.manual_seed(0)
    net = Net()
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    x, y = data.load("cifar10", "train")
    x, y = torch.tensor(x[:size]).permute(0, 3, 1, 2).contiguous(), torch.tensor(y[:size]).long()
    steps = epochs * (size // 128)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        index = torch.randint(size, (128,))
        image, label = x[index], y[index]
        image = torch.where(torch.rand(128, 1, 1, 1) < 0.5, image.flip(3), image)
        if adversarial:
            eps = EPS * min(1.0, 2 * (step + 1) / steps)  # at once it stays at one class
            delta = torch.empty_like(image).uniform_(-eps, eps)
            for _ in range(5):
                delta.requires_grad_(True)
                loss = F.cross_entropy(net((image + delta).clamp(0, 1)), label)
                (gradient,) = torch.autograd.grad(loss, delta)
                delta = (delta.detach() + eps / 2 * gradient.sign()).clamp(-eps, eps)
            image = (image + delta).clamp(0, 1)
        loss = F.cross_entropy(net(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(
                f"training {path.stem}: step {step}/{steps} loss {loss.item():.3f}",
                file=sys.stderr,
                flush=True,
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net.eval()


def right(net, x, y) -> np.ndarray:
    """Bool [B] by PyTorch, NHWC images."""
    with torch.no_grad():
        return net(torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)).argmax(1).numpy() == y


def agreement(net, model, x, y) -> list[dict]:
    """Robust accuracy of each attack alone and of the ensemble, theirs and ours."""
    from pyautoattack import AutoAttack

    tx, ty = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y).long()
    rows = []
    for name in ("apgd-ce", "apgd-t", "fab-t", "square", "standard"):
        theirs = AutoAttack(net, norm="Linf", eps=EPS, version="standard", seed=0, device="cpu")
        if name != "standard":
            theirs.attacks_to_run = [name]
        started = time.perf_counter()
        their_adv = theirs.run_standard_evaluation(tx, ty, batch_size=250)
        seconds = time.perf_counter() - started
        their_adv = their_adv[0] if isinstance(their_adv, tuple) else their_adv
        their_robust = right(net, their_adv.permute(0, 2, 3, 1).numpy(), y)
        started = time.perf_counter()
        ours = attacks.autoattack(
            jax.random.key(0),
            model,
            x,
            y,
            eps=EPS,
            attacks=ensemble.STANDARD if name == "standard" else (name,),
        )
        our_seconds = time.perf_counter() - started
        verified = right(net, ours.x_adv, y)
        rows.append({
            "attack": name, "ours": float(ours.robust.mean()), "theirs": float(their_robust.mean()),
            "ours_only": int(np.sum(~ours.robust & their_robust)),
            "theirs_only": int(np.sum(ours.robust & ~their_robust)),
            "ours_broken": int(np.sum(~ours.robust)),
            "ours_verified_in_torch": int(np.sum(~verified & ~ours.robust)),
            "max_delta": float(np.abs(ours.x_adv - x).max()),
            "ours_seconds": our_seconds, "theirs_seconds": seconds,
        })  # fmt: skip
        print(rows[-1], flush=True)
    return rows


def loops(net, x, y, eps, step):
    """name -> a function that runs PGD^20 x 10 as each library documents it, and returns Bool [B] robust."""
    import foolbox
    import torchattacks
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    tx, ty = torch.tensor(x).permute(0, 3, 1, 2).contiguous(), torch.tensor(y).long()

    def torchattacks_loop():
        robust = np.ones(len(y), bool)
        for _ in range(RESTARTS):
            attack = torchattacks.PGD(net, eps=eps, alpha=step, steps=STEPS, random_start=True)
            adv = torch.cat([attack(tx[i : i + 128], ty[i : i + 128]) for i in range(0, len(y), 128)])
            robust &= right(net, adv.permute(0, 2, 3, 1).numpy(), y)
        return robust

    def torchattacks_multi():
        one = [
            torchattacks.PGD(net, eps=eps, alpha=step, steps=STEPS, random_start=True)
            for _ in range(RESTARTS)
        ]
        attack = torchattacks.MultiAttack(one)
        adv = torch.cat([attack(tx[i : i + 128], ty[i : i + 128]) for i in range(0, len(y), 128)])
        return right(net, adv.permute(0, 2, 3, 1).numpy(), y)

    def foolbox_repeat():
        fmodel = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
        attack = foolbox.attacks.LinfPGD(abs_stepsize=step, steps=STEPS, random_start=True).repeat(RESTARTS)
        adv = torch.cat(
            [attack(fmodel, tx[i : i + 128], ty[i : i + 128], epsilons=eps)[1] for i in range(0, len(y), 128)]
        )
        return right(net, adv.permute(0, 2, 3, 1).numpy(), y)

    def art_restarts():
        classifier = PyTorchClassifier(
            net,
            loss=torch.nn.CrossEntropyLoss(),
            input_shape=(3, 32, 32),
            nb_classes=10,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        attack = ProjectedGradientDescent(
            classifier, norm=np.inf, eps=eps, eps_step=step, max_iter=STEPS, num_random_init=RESTARTS,
            batch_size=128, verbose=False,
        )  # fmt: skip
        adv = attack.generate(tx.numpy(), y)
        return right(net, adv.transpose(0, 2, 3, 1), y)

    return {
        "torchattacks PGD loop": torchattacks_loop,
        "torchattacks MultiAttack": torchattacks_multi,
        "foolbox repeat(10)": foolbox_repeat,
        "ART num_random_init=10": art_restarts,
    }


def speed(net, model, x, y, eps, runs) -> list[dict]:
    """Seconds and gradient evaluations, in turns, medians."""
    step = eps / 4
    attack = PGD(
        eps=jnp.float32(eps),
        steps=np.int32(STEPS),
        norm="linf",
        bounds=(0.0, 1.0),
        step_size=jnp.float32(step),
        loss=attack_losses.one(attack_losses.cross_entropy),
    )
    spent = {}

    def ours():
        outcome = scheduler.run(
            attack, jax.random.key(0), as_partial(model), x, y, restarts=RESTARTS, slots=64
        )
        spent["ours"] = outcome.evaluations
        return ~outcome.broken

    functions = {"ours": ours, **loops(net, x, y, eps, step)}
    started = time.perf_counter()
    ours()
    first = time.perf_counter() - started
    taken, robust = {name: [] for name in functions}, {}
    for _ in range(runs):
        for name, function in functions.items():
            net.passes = 0
            started = time.perf_counter()
            robust[name] = float(np.mean(function()))
            taken[name].append(time.perf_counter() - started)
            if name != "ours":  # forward passes beside gradients are few; ART and Foolbox make them in pairs
                spent[name] = net.passes
    median = {name: statistics.median(values) for name, values in taken.items()}
    rows = [{
        "library": name, "robust": robust[name], "seconds": median[name],
        "times_ours": median[name] / median["ours"], "evaluations": spent[name],
        "ours_share_of_evaluations": spent["ours"] / spent[name],
        "first_call_seconds": first if name == "ours" else None,
    } for name in functions]  # fmt: skip
    for row in rows:
        print(row, flush=True)
    return rows


def bare(net, model, x, y, runs) -> dict[str, float]:
    """Microseconds per image of one input gradient without any attack around it, in turns, medians.

    Ours as it runs in the slots: in a compiled loop, 64 images at a time.
    """
    steps, lanes = 20, 64

    @jax.jit
    def loop(model, x, y):
        def step(_, z):
            gradient = jax.grad(lambda z: jnp.sum(losses.cross_entropy(model(z), y)))(z)
            return z + 1e-3 * jnp.sign(gradient)

        return jax.lax.fori_loop(0, steps, step, x)

    tx, ty = torch.tensor(x[:128]).permute(0, 3, 1, 2).contiguous(), torch.tensor(y[:128]).long()

    def theirs():
        for _ in range(steps):
            z = tx.clone().requires_grad_(True)
            torch.autograd.grad(F.cross_entropy(net(z), ty, reduction="sum"), z)

    functions = {
        "ours": (lambda: jax.block_until_ready(loop(model, x[:lanes], y[:lanes])), lanes),
        "pytorch": (theirs, 128),
    }
    taken = {name: [] for name in functions}
    for run in range(runs + 1):  # the first one compiles
        for name, (function, size) in functions.items():
            started = time.perf_counter()
            function()
            if run:
                taken[name].append(1e6 * (time.perf_counter() - started) / (steps * size))
    return {name: statistics.median(values) for name, values in taken.items()}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--speed_n", type=int, default=512)
    parser.add_argument("--speed_eps", type=float, default=3.0, help="in 1/255")
    parser.add_argument("--speed_nets", default="robust,nominal")
    parser.add_argument("--parts", default="agreement,bare,speed")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--size", type=int, default=50_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cache", type=pathlib.Path, default=pathlib.Path("runs/bench-attacks"))
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(2)
    x, y = data.load("cifar10", "test")
    nets = {
        name: train(args.cache / f"{name}.pt", args.epochs, name == "robust", args.size)
        for name in ("robust", "nominal")
    }
    report = {
        "machine": f"{torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "jax": jax.__version__,
        "eps": EPS,
        "speed_eps": args.speed_eps / 255,
    }
    for name, net in nets.items():
        model = to_jax(net)
        theirs = net(torch.tensor(x[:256]).permute(0, 3, 1, 2)).detach().numpy()
        report[f"{name}_logits_differ_by"] = float(
            np.abs(np.asarray(model(jnp.asarray(x[:256]))) - theirs).max()
        )
        report[f"{name}_clean"] = float(np.mean(right(net, x[:1000], y[:1000])))
        if "bare" in args.parts:
            report[f"{name}_bare_microseconds"] = bare(net, model, x, y, 3 * args.runs)
        if "speed" in args.parts and name in args.speed_nets:
            eps = args.speed_eps / 255 if name == "robust" else EPS
            report[f"{name}_speed"] = speed(net, model, x[: args.speed_n], y[: args.speed_n], eps, args.runs)
    if "agreement" in args.parts:
        report["agreement"] = agreement(nets["robust"], to_jax(nets["robust"]), x[: args.n], y[: args.n])
    text = json.dumps(report, indent=2)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
