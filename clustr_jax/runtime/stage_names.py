"""The stages of a run, as they are called on the command line, in metrics.jsonl and on disk."""

WARMUP, TRAIN, EVALUATE, CERTIFY, REPORT = "1_warmup", "2_train", "evaluate", "certify", "report"
STAGES = (WARMUP, TRAIN, EVALUATE, CERTIFY, REPORT)  # new ones at the end: the place decides the randomness
# Those that leave a folder of their own.
TRAINING = (WARMUP, TRAIN)
