"""Text from decoders whose tokens leave early (docs/generation.md).

``cache`` and ``engine`` run tokens through layers, ``loop`` makes texts of them, ``sampling`` chooses tokens, ``text``
turns tokens into text, ``api`` is what ``model.generate`` calls.
"""
