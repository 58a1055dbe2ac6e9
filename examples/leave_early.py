"""Label sentences with a trained model and see at which layer each one left.

Run:     python examples/leave_early.py runs/docstrings/model
Expect:  one line per sentence: label, probability, exit layer of how many; easy sentences leave first. With a threshold
         of 1 nothing leaves early and every layer is computed.
"""

import sys

from rl_exit import EarlyExitModel

SENTENCES = [
    "Compute the shortest path between two nodes of a weighted graph.",
    "Draw a scatter plot with error bars and a legend.",
    "Return a copy of the object.",
]


def main(folder: str) -> None:
    """Print what the model says of each sentence, with and without exits."""
    model = EarlyExitModel.from_pretrained(folder)
    early = model.predict(SENTENCES)
    full = model.predict(SENTENCES, threshold=1.0)
    for sentence, a, b in zip(SENTENCES, early, full, strict=True):
        print(f"{a.label:>18} {max(a.probabilities):.2f}  layer {a.exit_layer} of {model.num_layers}  {sentence}")
        if a.label != b.label:
            print(f"{b.label:>18} {max(b.probabilities):.2f}  at full depth")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/docstrings/model")
