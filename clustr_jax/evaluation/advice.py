"""What to do about a check that warns or fails: one sentence for each number."""

ADVICE = {
    1: "Report this as a fault of clustr_jax: an attack of its own left the ball.",
    2: "Put the model into evaluation mode (no dropout, noise or statistics of the batch) and judge again.",
    3: "Give logits in the log domain: what comes before the softmax, the sigmoid or the exponential.",
    4: "Find the operation without a derivative (rounding, argmax, a saturated exponential) and put a "
    "smooth one in its place.",
    5: "Look for a custom gradient or lost precision: the gradient is not that of the function.",
    6: "Divide the logits by a constant, so that their median margin is about 5, and judge again.",
    7: "Judge again with more steps: settings= with attack.steps and apgd_steps doubled.",
    8: "Compute the model in float32: rounding decides which images are broken.",
    9: "Judge again with more restarts (settings= with attack.restarts doubled): the last ones still broke "
    "images.",
    10: "Do not report the figure before you know why a larger ball breaks fewer images.",
    11: "Do not report the figure: an attack that may change everything fails, so the attacks are blind.",
    12: "Do not report the figure: attacks without gradients find what gradients do not.",
    13: "Look at the gradients through the clusters: attacks made for them should break at least as many.",
    14: "Run the whole protocol: targeted or untargeted attacks are missing.",
    15: "Treat the gradients as doubtful: Square, which uses none, improves on all that do.",
    16: "Describe the defence as outside RobustBench's rules, or mend checks 2 and 4.",
    17: "Do not trust this machine: a problem whose answer is known came out wrong.",
    18: "Do not report the certificate: an image inside it was broken.",
    19: "Judge more images: the interval is wide.",
    20: "Give the model in evaluation mode: evaluating it changed its arrays.",
    21: "Do not trust this machine: programs whose answers are known came out wrong.",
    22: "Judge again with more steps: the loss of the attack is still rising.",
    23: "Do not report the figure: with half the box in reach, no attack should leave more than chance.",
    24: "Do not report the figure: random points break images that the attacks left.",
    25: "Compute the model in float32: rounding decides which images are broken.",
    26: "Multiply the logits by a constant, so that their median margin is about 5, and judge again; no "
    "prediction changes.",
    27: "Judge images that the model has not seen: its answers do not survive a change that nobody sees.",
    28: "Give the scores before the sigmoid, tanh, exponential or ReLU at the end, and judge again.",
    29: "Judge with more steps and restarts: two runs of the same attacks should come to the same figure.",
    30: "Look for stop_gradient, a custom gradient or a ripple in the scores: the gradient is not that of "
    "the function.",
}
