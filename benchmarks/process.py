"""The process of a benchmark: where `configs` is found, what is set before Python starts, and its JSON."""

import json
import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def restart(**environment: str) -> None:
    """Start this script again with these variables, unless they are set already."""
    if any(os.environ.get(name) != value for name, value in environment.items()):
        os.environ |= environment
        os.execv(sys.executable, [sys.executable, *sys.argv])


def on_cores():
    """A context with the devices that run.py has: one for each core."""
    import jax

    from clustr_jax.runtime import mesh, processes

    processes.use_cores()
    return mesh.over(jax.devices())


def finish(name: str, content, save: bool) -> None:
    """Print the result as JSON, and with `save` keep it as results/benchmarks/NAME.json."""
    from clustr_jax.storage import results

    content = {"benchmark": name, "cores": os.cpu_count(), "versions": results.versions(), **content}
    text = json.dumps(content, indent=2)
    print(text)
    if save:
        (ROOT / "results" / "benchmarks" / f"{name}.json").write_text(text + "\n")
