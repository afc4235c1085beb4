"""Parts of configs; no file here is one of a run."""
