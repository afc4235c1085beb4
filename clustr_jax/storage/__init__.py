"""What is on disk: the work directory, checkpoints, results, and the way back from there to a network."""
