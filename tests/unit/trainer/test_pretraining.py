"""What `builtin/tiny` is made of: the corpus that its script gathers, and what is shipped with the weights."""

import json

from pretraining.corpus import Library, Page, Pages, training_rows
from pretraining.packages import PACKAGES
from pretraining.pages import page_text, pieces

from luthier_trainer.inspect import BUILTIN

TINY = BUILTIN / "tiny"
PAGE = """<html><head><title>no</title><script>no()</script></head><body>
<div class="related"><ul><li>no</li></ul></div>
<div class="body" role="main"><h1>Stacks<a class="headerlink" href="#s">¶</a></h1>
<p>A list is a
stack &amp; a queue:</p><div class="highlight"><pre><span>stack</span> = []
if stack:
    stack.pop()
</pre></div><ul><li><p>first</p></li><li>second</li></ul><p>The end.</p></div>
<div class="footer">no</div></body></html>"""


def test_a_page_is_its_own_text_with_examples_as_they_stand_and_nothing_of_its_frame() -> None:
    assert page_text(PAGE) == (
        "Stacks\n\nA list is a stack & a queue:\n\n"
        "    stack = []\n    if stack:\n        stack.pop()\n\n"
        "* first\n* second\n\nThe end."
    )


def test_pieces_are_whole_paragraphs_and_together_the_page() -> None:
    text = "\n\n".join(str(number) * 30 for number in range(8))
    found = pieces(text, 100)
    assert "\n\n".join(found) == text
    assert all(len(piece) <= 100 for piece in found)
    assert pieces("x" * 300, 100) == ["x" * 300]


def test_what_is_held_out_is_not_said_in_the_same_words_by_what_is_trained_on() -> None:
    secret = "the seventh argument of this function is silently ignored unless a flag is set"
    library = Library(
        documents=[f'def f():\n    """Note: {secret}."""', "another document, long enough to be one"],
        chats=[f"What of it? {secret.upper()}!", "fine"],
        heldout_documents=[secret],
        heldout_chats=[],
        sources=[],
    )
    other = "This paragraph is about something else, and long enough to be kept as a row of its own in the corpus."
    found = Pages([Page("python3.11-doc", "a.html", f"{other}\n\nIn short,\n{secret}.")], [])
    assert training_rows(library, found, lambda line: None) == {
        "library": ["another document, long enough to be one"] * 2,
        "conversations": ["fine"],
        "python3.11-doc": [other],
    }


def test_the_shipped_model_names_every_source_with_its_licence_and_has_its_notices() -> None:
    corpus = json.loads((TINY / "corpus.json").read_text())
    packages = [source for source in corpus["sources"] if "sha256" in source]
    assert {source["name"]: source["licence"] for source in packages} == PACKAGES
    notices = (TINY / "licences.txt").read_text(encoding="utf-8")
    assert all(f"{source['name']} " in notices for source in packages)
    assert not any("GPL" in source["licence"] for source in corpus["sources"])


def test_the_shipped_weights_are_at_most_ten_megabytes_and_their_curve_is_with_them() -> None:
    assert (TINY / "model.safetensors").stat().st_size <= 10_000_000
    curve = json.loads((TINY / "curve.json").read_text())
    steps = [step for step, _ in curve["curve"]]
    assert steps == sorted(steps)
    assert steps[-1] == curve["recipe"]["steps"]
    assert curve["heldout"]["documents"]["loss"] < curve["evaluations"][0][1] / 2
