"""How many passes through the network a method's step makes, by its definition."""

from clustr_jax.objectives import METHODS, towards_clean


def passes(method: str, config) -> dict[str, int]:
    """How often each bare pass occurs in one step: forward, input gradient, parameter gradient.

    `both_gradients` is the one pass of Free AT that gives both.
    """
    steps = config.train.attack.steps
    count = {"forward_train": 0, "forward_eval": 0, "input_gradient_train": 0, "input_gradient_eval": 0}
    count |= {"parameter_gradient": 1, "both_gradients": 0}
    if config.train.replays > 1:
        return count | {"parameter_gradient": 0, "both_gradients": 1}
    if METHODS[method].adversary is None:
        return count
    count[f"input_gradient_{'eval' if config.train.attack_bn == 'eval' else 'train'}"] = steps
    if METHODS[method].adversary is towards_clean:
        count["parameter_gradient"] = 2  # clean and adversarial images
        if config.train.attack_bn == "eval":
            count["forward_eval"] = 1  # the attack's target, another network than the one that is trained
    return count


def gradients(method: str, config) -> int:
    """Gradient passes per image of a step, those of the adversary included."""
    return sum(number for name, number in passes(method, config).items() if "gradient" in name)
