"""From a docstring to plain sentences."""

from __future__ import annotations

import inspect

import pytest

from rl_exit.data.docstring_text import content_words, normalised, opening


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        # the leading verb, the missing full stop
        ("Returns the number of nodes in the graph", "Return the number of nodes in the graph."),
        # identifiers of every kind and a run of them
        (
            "Convert a :class:`~a.b.Graph` to ``np.ndarray``, `foo_bar` of the same size.",
            "Convert a foo to foo of the same size.",
        ),
        ("Build an RLModule for every policy in a SingleAgentEnv.", "Build an foo for every policy in a foo."),
        # library names, also in the plural, with a genitive, and inside a sentence
        (
            "Draws the figure the way that Plotly's renderer and the Requests session would.",
            "Draw the figure the way that foo renderer and the foo session would.",
        ),
        # markup
        (
            "Compute the *shortest* path, see [1]_, of the `tree <http://x.org>`_.",
            "Compute the shortest path, see, of the tree.",
        ),
        # the second sentence joins across paragraphs, the third does not
        (
            "Find the cliques of a graph.\n\nA clique is a set of connected nodes. Not this one of all.",
            "Find the cliques of a graph. A clique is a set of connected nodes.",
        ),
        # abbreviations end no sentence
        (
            "Add the edges, e.g. Between two neighbouring nodes of the given graph.",
            "Add the edges, e.g. Between two neighbouring nodes of the given graph.",
        ),
        # a title is skipped, a section ends the prose
        (
            "Sets\n====\n\nAll about the sets of numbers here.\n\nParameters\n----------\nx : int",
            "All about the sets of numbers here.",
        ),
        (
            "Open a connection to the given host.\n\nArgs:\n    host: The name of the host.",
            "Open a connection to the given host.",
        ),
        # a second sentence that is no prose is left away
        ("Open a connection to the given host. Uses x = {y: z} as key.", "Open a connection to the given host."),
    ],
)
def test_opening(docstring: str, text: str) -> None:
    assert opening(inspect.cleandoc(docstring)) == text


@pytest.mark.parametrize(
    "docstring",
    [
        "",
        "Too short a text.",
        ">>> print(1)\n1",
        "Construct a new Bar object for the given figure.",
        "The 'color' property is a color and may be specified as:",
        "x = {a: b} is the form of the mapping that is read.",
        "Zeichnet die Kanten eines Graphen mit Größe und Farbe.",
        "Copyright of the authors of the file, all rights reserved.",
        "self_x other_y and third_z are the arguments of fourth_w here",
        ":param name: the name of the person to be greeted here",
    ],
)
def test_unusable(docstring: str) -> None:
    assert opening(docstring) == ""


@pytest.mark.parametrize("name", ["ClipSeg", "CLIPSeg-2", "clip seg", "clip-segs", "CLIP_SEG"])
def test_own_names(name: str) -> None:
    docstring = f"Embed the patches of an image as {name} does it."
    assert opening(docstring, ("clip_seg",)) == "Embed the patches of an image as foo does it."
    assert opening("Embed the patches of a clipped image as usual.", ("clip",)).count("foo") <= 1


def test_normalised_sees_through_case_numbers_and_masks() -> None:
    assert normalised("Return the 3 nodes of foo.") == normalised("return the nodes, of 12")
    assert normalised("Return the nodes.") != normalised("Return the edges.")
    assert content_words("return the nodes of a graph") == {"return", "nodes", "graph"}
