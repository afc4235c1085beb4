"""The stages of a run, as they are called on the command line, in metrics.jsonl and on disk."""

WARMUP, TRAIN, EVALUATE, CERTIFY, REPORT = "1_warmup", "2_train", "evaluate", "certify", "report"
STAGES = (WARMUP, TRAIN, EVALUATE, CERTIFY, REPORT)  # add at the end: a stage's key is made of its place
# Those that leave a folder of their own.
TRAINING = (WARMUP, TRAIN)
