"""What an evaluation may spend: numbers that would attack nothing, and count it as survived, are refused."""

import dataclasses

from clustr_jax.attacks.options import whole
from clustr_jax.attacks.pgd import check_settings
from clustr_jax.runtime.errors import UserError
from clustr_jax.settings import EvalSettings


def check(settings: EvalSettings, prefix: str = "eval") -> None:
    """UserError for budgets that cannot be run; `prefix` is what the settings are called there."""
    attack = settings.attack
    check_settings(eps=attack.eps, step_size=attack.step_size)
    for name, value, low in (
        ("attack.steps", attack.steps, 1),
        ("attack.restarts", attack.restarts, 1),
        ("n", settings.n, 0),
        ("slots", settings.slots, 1),
        ("nearest", settings.nearest, 0),
        ("targets", settings.targets, 1),
        ("apgd_steps", settings.apgd_steps, 1),
        ("queries", settings.queries, 1),
    ):
        whole(f"{prefix}.{name}", value, low)
    steps = settings.paper_steps
    if not steps or min(steps) < 1:
        raise UserError(f"{prefix}.paper_steps must be one or more numbers >= 1, got {steps}")
    for eps in (*settings.sweep, *settings.curve):
        check_settings(eps=eps, step_size=attack.step_size)


def at_radius(settings: EvalSettings, eps: float, slots: int) -> EvalSettings:
    """These budgets at another radius: a step stays the same part of it. UserError as `check` has it."""
    if not isinstance(settings, EvalSettings):
        raise UserError(
            f"settings must be EvalSettings (evaluation.judging.budget makes them), got "
            f"{type(settings).__name__}"
        )
    check(settings, "settings")
    own = settings.attack
    if own.eps != eps and not own.eps > 0:
        raise UserError(f"settings.attack.eps must be above 0: a step is a part of it, got {own.eps}")
    step_size = own.step_size if own.eps == eps else own.step_size * eps / own.eps
    return dataclasses.replace(
        settings, slots=slots, attack=dataclasses.replace(own, eps=eps, step_size=step_size)
    )
