"""Is the canary worth its name? It has to catch jaxlib 0.10.2, raise no false alarm, and be quick.

    python benchmarks/canary.py [--save]        (some minutes; needs pip and its index once)

An environment of its own gets jax 0.10.2, in which the same patterns are compiled. The installed JAX is asked
with a number of XLA flags, on 1, 2 and 8 devices. Each line is a process; its seconds are those of
`canary.check` alone.
"""

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import venv

import process

OLD = "0.10.2"
FLAGS = (
    "",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_multi_thread_eigen=false",
    "--xla_cpu_prefer_vector_width=512",
    "--xla_cpu_enable_fast_min_max=true",
    "--xla_disable_hlo_passes=fusion",
    "--xla_cpu_enable_concurrency_optimized_scheduler=false",
)
DEVICES = (1, 2, 8)
# The package itself needs more than JAX and NumPy, the canary does not.
ASK = """
import json, pathlib, sys, time, types
package = types.ModuleType("clustr_jax")
package.__path__ = [sys.argv[1]]
sys.modules["clustr_jax"] = package
from clustr_jax.runtime import canary
import jax
devices = len(jax.devices())
started, said = time.perf_counter(), ""
try:
    canary.check()
except Exception as error:
    said = f"{type(error).__name__}: {error}"
seconds = time.perf_counter() - started
print(json.dumps({"jax": jax.__version__, "devices": devices, "said": said, "seconds": seconds}))
"""


def ask(python, cache, flags="", devices=1) -> dict:
    """What the canary says under these flags, in a process of its own."""
    environment = os.environ | {
        "XLA_FLAGS": flags,
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
        "XDG_CACHE_HOME": str(cache),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [str(python), "-c", ASK, str(process.ROOT / "clustr_jax")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {"flags": flags, **json.loads(done.stdout.splitlines()[-1])}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--save", action="store_true", help="write results/benchmarks/canary.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = pathlib.Path(scratch)
        venv.create(folder / "old", with_pip=True)
        old = folder / "old" / "bin" / "python"
        subprocess.run([old, "-m", "pip", "install", "-q", f"jax=={OLD}", f"jaxlib=={OLD}"], check=True)
        caught = ask(old, folder / "old-cache")
        print(f"jax {OLD}: {caught['said'] or 'NOT CAUGHT'}", flush=True)
        alarms = []
        for flags, devices in itertools.product(FLAGS, DEVICES):
            alarms.append(ask(sys.executable, folder / "cache", flags, devices))
            print(f"{alarms[-1]['said'] or 'ok'}  {devices} devices  {flags or 'no flags'}", flush=True)
        known = ask(sys.executable, folder / "cache")
        for path in (folder / "cache" / "clustr_jax").rglob("*.json"):
            path.unlink()
        compiled = ask(sys.executable, folder / "cache")
    content = {
        "old": caught,
        "caught": "wrong numbers" in caught["said"],
        "runs": alarms,
        "false_alarms": sum(bool(row["said"]) for row in alarms),
        "first_seconds": alarms[0]["seconds"],
        "compiled_before_seconds": compiled["seconds"],
        "known_seconds": known["seconds"],
    }
    process.finish("canary", content, args.save)


if __name__ == "__main__":
    main()
