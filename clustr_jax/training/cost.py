"""How many passes through the network a method's step makes, by its definition."""

from clustr_jax.settings import Recipe, TrainingSettings
from clustr_jax.training.adversaries import of_method, shares_clean, towards_clean
from clustr_jax.training.objectives import METHODS, both_sides, single_stage


def passes(method: str, settings: TrainingSettings, recipe: Recipe) -> dict[str, int]:
    """How often each bare pass occurs in one step: forward, input gradient, parameter gradient.

    `both_gradients` is the one pass of Free AT that gives both. `recipe`: that of the stage.
    """
    steps = settings.train.attack.steps
    count = {"forward_train": 0, "forward_eval": 0, "input_gradient_train": 0, "input_gradient_eval": 0}
    count |= {"parameter_gradient": 1, "both_gradients": 0}
    if recipe.replays > 1:
        return count | {"parameter_gradient": 0, "both_gradients": 1}
    adversary = of_method(METHODS[method], settings)
    mode = "eval" if settings.train.attack_bn == "eval" else "train"
    if adversary is not None:
        count[f"input_gradient_{mode}"] = steps
    if adversary is towards_clean:
        count["parameter_gradient"] = 2  # clean and adversarial images
        if not shares_clean(METHODS[method], settings) or recipe.awp:
            count[f"forward_{mode}"] = 1  # the attack's target in a pass of its own
    if METHODS[method].objective is single_stage:
        count["parameter_gradient"] = 2 if both_sides(settings) else 1
    if recipe.awp:
        count["parameter_gradient"] *= 2  # first where the weights are, then at their worst
    return count


def gradients(method: str, settings: TrainingSettings, recipe: Recipe) -> int:
    """Gradient passes per image of a step, those of the adversary included."""
    return sum(number for name, number in passes(method, settings, recipe).items() if "gradient" in name)
