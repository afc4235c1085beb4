"""What a run needs of the machine that it runs on."""
