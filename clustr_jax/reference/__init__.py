"""What the paper reports, and where the authors' code differs from it."""
