"""From a docstring to one or two plain English sentences with telling names masked; for the built-in task.

Rules, in order: find the opening prose, strip the markup, replace identifiers and library names by a placeholder, put
the leading verb into the imperative, and keep only what reads as English.
"""

from __future__ import annotations

import functools
import re

PLACEHOLDER = "foo"
"""Stands for every code identifier and every masked name."""

_LIBRARIES = """
    aiohttp anyscale arrow asyncio dask farama fastapi gradio gym gymnasium hf httpx huggingface jax jinja jinja2 keras
    matplotlib mpl mpmath multidict networkx np numpy nx openai pandas pd plotly plotly.js px pyarrow pydantic pygments
    pyplot pytorch ray requests rich rllib scikit scikit-learn scikits scipy seaborn sklearn starlette statsmodels sympy
    tensorflow tf tf2 timm torch torchvision transformers tune urllib3 uvicorn uvloop wandb websockets werkzeug yarl
"""
_PARTS = "cobyqa connectorv2 dreamerv3 ipywidgets kaleido liealgebras ntheory polys rlmodule rlmodules stats"

MASKED_NAMES = frozenset((*_LIBRARIES.split(), *_PARTS.split()))
"""Lower-case words that name a library or sub-package; masked as whole words, in any case, also in the plural."""

_PHRASES = ("hugging face", "weights & biases", "scikit learn")
_NAME = re.compile(
    r"(?i)(?<!\w)(?:"
    + "|".join(re.escape(name) + "(?:es|s)?" for name in sorted((*MASKED_NAMES, *_PHRASES), key=lambda x: (-len(x), x)))
    + r")(?:'s)?(?!\w)"
)
_KEPT_IDENTIFIERS = frozenset(("e.g", "i.e", "w.r.t", "a.k.a", "NaN", "GitHub", "JavaScript", "LaTeX"))

_ROLE = re.compile(r":[a-zA-Z][a-zA-Z:+.-]*:[`'](?:[^`'<]*?\s*<[^`'>]*>|[^`']*)[`']")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}|\[([^\]\[]+)\]\([^)]*\)")
_FOOTNOTE = re.compile(r"\s*\[(?:\d+|[A-Z]\w*\d+)\]_?")
_CODE = re.compile(r"``([^`]*)``|`([^`]*)`_{0,2}")
_EMPHASIS = re.compile(r"(?<!\w)(\*\*?|_)([^*_\s][^*_]*?)\1(?!\w)")
_IDENTIFIER = re.compile(
    r"""(?x)(?<![\w.])(?:
      [~@]?[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?:\(\))?   # dotted
    | \w*_\w*(?:\(\))?                                # snake_case
    | [a-z]+[A-Z]\w*(?:\(\))?                         # camelCase
    | [A-Z]+[a-z0-9]+[A-Z]\w*(?:\(\))?                # CamelCase
    | [A-Z]{2,}[a-z]{2,}\w*(?:\(\))?                  # RLModule
    | \w+\(\)                                         # call()
    )(?!\w)"""
)
_WORDY_CODE = re.compile(r"[a-z]{2,}(?: [a-z]{2,})+")
_RUN = re.compile(rf"\b{PLACEHOLDER}(?:[\s\-/.,'’]*(?:(?:or|and)\s+)?(?:\b{PLACEHOLDER}(?:'s)?\b|\({PLACEHOLDER}\)))+")

_UNDERLINE = re.compile(r"^[=\-~^*#\"'+]{3,}$")
_SECTION = re.compile(
    r"(?i)(?::\w|\.\. |[-*+•] |\d+[.)] |>>>|@\w|\w+ ?: |\w+\s*\(.*\)\s*:|"
    r"(?:args|arguments|parameters|returns?|examples?|notes?|raises|yields|attributes|see also|references|usage|"
    r"warnings?|methods|inputs?|outputs?|shape|keyword)\b"
    r"[^.]{0,20}:?$)"
)
_STOP = re.compile(r"[.!?](?=\s+[\"'`(:]*[A-Z0-9])|[.!?]$")
_ABBREVIATION = re.compile(
    r"(?i)\b(?:e\.g|i\.e|etc|vs|cf|resp|approx|eq|fig|ref|no|al|w\.r\.t|incl|dr|prof|st|sec|ch|jr)\.$"
)

_FOREIGN = re.compile(r"[={}<>|\\@$#%^~`\[\]]|->|//|::|\.\.\.|\b(?:TODO|FIXME|XXX)\b")
_BOILERPLATE = re.compile(
    r"(?i)^(?:construct a new|the '\w+' property|return self|see (?:base|parent|super)|deprecated|copyright|licensed|"
    r"auto-?generated|missing associated|test(?:s|ing)?\b|internal (?:method|helper)|private |alias (?:for|of)\b|"
    r"base class for all|initiali[sz]e (?:self|foo)\b|set the (?:source reference|foo)|notes?\b|warning|examples?\b|"
    r"args|parameters?\b|returns?:|usage|attributes|raises|yields|param\b|this (?:file|module) (?:is|was) )"
)
_SMALL_WORDS = "a all an and are as at be by for from if in into is it its of on or that the this to when which with"
_FUNCTION_WORDS = frozenset(_SMALL_WORDS.split())
_WORD = re.compile(r"[A-Za-z][A-Za-z'\-]*")
_LEAST_WORDS, _MOST_WORDS, _MOST_SENTENCE = 6, 40, 40

_VERBS = """
    add aggregate append apply assert build calculate cast check choose clear close combine compute construct
    contain convert copy count create decode decorate define delete describe determine disable draw drop enable
    encode ensure estimate evaluate execute expand extract fetch fill filter find fit format forward generate get
    give handle implement indicate infer initialize insert iterate join list load locate make map merge modify move
    normalize open parse perform plot predict prepare print process produce provide raise read reduce register
    remove render repeat replace represent reset resize resolve retrieve return run sample save scale select send
    set show simplify solve sort specify split start stop store take test transform try update use validate verify
    wrap write yield
"""
_THIRD_PERSON = {
    **{verb + "s": verb for verb in _VERBS.split()},
    "applies": "apply",
    "carries": "carry",
    "copies": "copy",
    "fetches": "fetch",
    "modifies": "modify",
    "processes": "process",
    "simplifies": "simplify",
    "specifies": "specify",
    "tries": "try",
    "verifies": "verify",
}


def opening(docstring: str, names: tuple[str, ...] = ()) -> str:
    """The first sentence of a docstring, with the second where both are usable and short enough; else an empty string.

    Args:
        docstring: Dedented, as ``ast.get_docstring`` gives it.
        names: Further names to mask, in any case, with ``_``, ``-``, a blank or nothing between their parts.
    """
    text = ""
    for sentence in _sentences(docstring)[:2]:
        plain = _plain(sentence, names)
        if not _is_english(plain) or len(f"{text} {plain}".split()) > _MOST_WORDS:
            break
        text = f"{text} {plain}".lstrip()
    return text if len(text.split()) >= _LEAST_WORDS else ""


def normalised(text: str) -> str:
    """What two texts have in common that count as duplicates: lower-case letters, no placeholder, no numbers."""
    return " ".join(word for word in re.findall(r"[a-z]+", text.lower()) if word != PLACEHOLDER)


def content_words(key: str) -> frozenset[str]:
    """The words of a normalised text that carry meaning."""
    return frozenset(word for word in key.split() if word not in _FUNCTION_WORDS and len(word) > 1)


def _sentences(docstring: str) -> list[str]:
    return [sentence for paragraph in _paragraphs(docstring) for sentence in _cut(paragraph)]


def _paragraphs(docstring: str) -> list[str]:
    """At most two paragraphs of prose, up to the first section, list, field or indented block."""
    lines = docstring.strip().split("\n")
    found: list[str] = []
    current: list[str] = []
    for number, raw in enumerate(lines):
        line = raw.strip()
        if not line:
            if current:
                found.append(" ".join(current))
                current = []
            if len(found) == 2:
                return found
            continue
        if _UNDERLINE.match(line):
            continue
        if number + 1 < len(lines) and _UNDERLINE.match(lines[number + 1].strip()):
            if current or found:
                break
            continue  # a title: the prose comes after it
        if _SECTION.match(line) or (raw[0] in " \t" and found and not current):
            break
        current.append(line)
    if current:
        found.append(" ".join(current))
    return found[:2]


def _cut(paragraph: str) -> list[str]:
    """Sentences of a paragraph; an unfinished rest counts only where it is all there is."""
    text = " ".join(paragraph.split())
    found = []
    start = 0
    for match in _STOP.finditer(text):
        if not _ABBREVIATION.search(text[: match.end()]):
            found.append(text[start : match.end()].strip())
            start = match.end()
    return found or ([text] if text else [])


def _plain(sentence: str, names: tuple[str, ...]) -> str:
    """Strip the markup and mask the names."""
    text = _ROLE.sub(PLACEHOLDER, sentence)
    text = _LINK.sub(lambda match: match[1] or match[2], text)
    text = _CODE.sub(_code, _FOOTNOTE.sub("", text))
    text = _EMPHASIS.sub(r"\2", text)
    text = text.replace("“", '"').replace("”", '"').replace("’", "'").replace("–", "-").replace("—", "-")
    for name in names:
        text = _own_name(name).sub(PLACEHOLDER, text)
    text = _IDENTIFIER.sub(lambda match: match[0] if match[0] in _KEPT_IDENTIFIERS else PLACEHOLDER, text)
    text = _NAME.sub(PLACEHOLDER, text)
    text = _RUN.sub(PLACEHOLDER, text).strip(" *-")
    first, blank, rest = text.partition(" ")
    text = _THIRD_PERSON.get(first.lower(), first) + blank + rest
    if text[:1].islower() and not text.startswith(PLACEHOLDER):
        text = text[0].upper() + text[1:]
    return text if text.endswith((".", "!", "?", ":")) else f"{text}."


def _code(match: re.Match[str]) -> str:
    inner = match[1] if match[1] is not None else match[2]
    return inner if _WORDY_CODE.fullmatch(inner) else PLACEHOLDER


@functools.lru_cache(maxsize=256)
def _own_name(name: str) -> re.Pattern[str]:
    """Matches a name also where a version number or a size follows: ``clip``, ``CLIP-2``, ``clips``."""
    parts = r"[\s_-]?".join(map(re.escape, name.split("_")))
    return re.compile(rf"(?i)(?<!\w){parts}[-.\d]*\w{{0,2}}(?:'s)?(?!\w)")


def _is_english(text: str) -> bool:
    words = _WORD.findall(text)
    lower = {word.lower() for word in words}
    masked = sum(word == PLACEHOLDER for word in words)
    letters = sum(character.isalpha() or character == " " for character in text)
    symbols = sum(len(word) == 1 and word not in "aAI" for word in words)
    return (
        4 <= len(words) <= _MOST_SENTENCE
        and text.isascii()
        and not _FOREIGN.search(text)
        and not _BOILERPLATE.match(text)
        and not text.endswith(":")
        and masked <= 2
        and masked * 4 <= len(words)
        and symbols * 6 <= len(words)
        and letters >= 0.88 * len(text)
        and bool(lower & _FUNCTION_WORDS)
        and len(lower - _FUNCTION_WORDS - {PLACEHOLDER}) >= 3
    )
