"""What pip installs with an extra only: named in one line where it is missing."""

from clustr_jax.runtime.errors import UserError

# Extra -> what it brings, as it is imported. pyproject.toml has the versions.
EXTRAS = {
    "train": ("flax", "optax", "orbax", "ml_collections", "absl", "rich", "safetensors", "tensorboardX"),
    "data": ("tensorflow_datasets", "array_record", "PIL", "sklearn"),
    "report": ("matplotlib", "jinja2", "markupsafe"),
}


class Missing(UserError, ImportError):
    """A package of an extra is not installed."""


def explained(error: ImportError, what: str) -> ImportError:
    """The error to raise instead: with the command that installs what is missing, if an extra has it."""
    package = (error.name or "").split(".")[0]
    extra = next((name for name, packages in EXTRAS.items() if package in packages), None)
    if extra is None:
        return error
    return Missing(
        f"{what} needs {package}, which is not installed: pip install 'clustr-jax[{extra}]', "
        f"or 'clustr-jax[all]' for everything"
    )
