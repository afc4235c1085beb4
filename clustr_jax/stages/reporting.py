"""report.html, figures and MODEL_CARD.md: made when they are missing, or of other results."""

import time

from clustr_jax import report
from clustr_jax.runtime import processes
from clustr_jax.runtime.progress import duration
from clustr_jax.runtime.stage_names import REPORT
from clustr_jax.stages.context import Run
from clustr_jax.storage import loading


def run(this: Run) -> None:
    """All processes look at the network together; the leader writes."""
    root = this.workdir.root
    record = report.read(root, loading.digest(loading.load(root)))
    (current,) = processes.agree([int(report.current(record))])
    if current:
        this.progress.line("report: was made before")
        return
    started = time.monotonic()
    this.progress.status("report  embeddings and adversarial images")
    found = report.look(record, this.key(REPORT), (this.train_split, this.val_split, this.test_split))
    if processes.leader():
        this.progress.status("report  figures and page")
        report.write(record, found, this.progress.line)
    processes.wait("report.html")
    this.progress.line(f"report: made ({duration(time.monotonic() - started)})")
