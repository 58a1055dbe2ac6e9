"""Tokens to text, piece by piece: whole characters only, and cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "�"  # what a decoder puts for bytes that are not yet a character


class TextPieces:
    """The text of one row as it grows.

    What may still become part of a stop string, or of a character, is held back until it is settled.

    Args:
        tokenizer: Decodes.
        stop_strings: The text ends before the first of them.
        context: Tokens before the first, so that a space between them and the text is seen.
    """

    def __init__(self, tokenizer: Any, stop_strings: Sequence[str] = (), context: Sequence[int] = ()) -> None:
        self.tokenizer = tokenizer
        self.stop_strings = tuple(stop_strings)
        self.longest = max((len(stop) for stop in stop_strings), default=0)
        self.tokens = list(context)
        self.text = ""
        self.given = 0
        self.stopped = False
        # Tokens from `anchor` on are decoded; those before `settled` are in the text already. Starting a little before
        # the new ones keeps the space that tokenizers drop at a text's beginning.
        self.anchor = 0
        self.settled = len(self.tokens)

    def add(self, token: int) -> str:
        """Take one more token and return what can be shown now."""
        self.tokens.append(token)
        before, after = self._decode(self.anchor, self.settled), self._decode(self.anchor, len(self.tokens))
        if len(after) > len(before) and not after.endswith(UNFINISHED):
            self._extend(after[len(before) :])
            self.anchor, self.settled = self.settled, len(self.tokens)
        return self._show(self._held())

    def end(self) -> str:
        """No more tokens come; return what was held back."""
        if not self.stopped:
            before, after = self._decode(self.anchor, self.settled), self._decode(self.anchor, len(self.tokens))
            self._extend(after[len(before) :])
            self.anchor = self.settled = len(self.tokens)
        return self._show(0)

    def _extend(self, piece: str) -> None:
        if self.stopped:
            return
        start = max(len(self.text) - self.longest + 1, 0)
        self.text += piece
        found = [at for at in (self.text.find(stop, start) for stop in self.stop_strings) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        if self.stopped:
            return 0
        for size in range(min(self.longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self.stop_strings):
                return size
        return 0

    def _show(self, held: int) -> str:
        upto = max(len(self.text) - held, self.given)
        piece, self.given = self.text[self.given : upto], upto
        return piece

    def _decode(self, start: int, end: int) -> str:
        return self.tokenizer.decode(self.tokens[start:end], skip_special_tokens=True)
