"""Text from decoders whose tokens leave early (docs/generation.md).

``cache`` and ``engine`` run tokens through layers, ``loop`` makes texts of them, ``sampling`` chooses tokens, ``text``
turns tokens into text, ``api`` is what ``model.generate`` calls.
"""

LEAST_TEMPERATURE = 0.001
"""Below it, logits over the temperature are no numbers of float32 any more. Here, as the HTTP side has no torch."""
