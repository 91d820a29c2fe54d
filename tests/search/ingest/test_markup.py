"""Files of prose: text, Markdown, reStructuredText, HTML. What is read is what a reader of the page would read."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingest_files import read, read_one, write

from polyhead.search.ingest import read_documents

MARKDOWN = """---
title: The Guide
author: Ada
tags: [tea, milk]
date: 2024-05-01
draft: false
nested: {a: 1}
---
Intro with **bold**, `code`,
and a [link](http://x.y "t").

# First *part*

- one
- two
  continued

1. step

| A | B |
|---|---|
| 1 | 2 |

## Second

```python
def f(): return 1
```

![a cat](cat.png) <b>raw</b>&amp; end\\
next

<div>html <i>block</i></div>
<!-- hidden -->
"""


def test_markdown(tmp_path: Path) -> None:
    document = read_one(write(tmp_path, "guide.md", MARKDOWN))
    assert document.text == (
        "Intro with bold, code, and a link.\n\nFirst part\n- one\n- two continued\n1. step\nA | B\n1 | 2\n\nSecond\n\n"
        "def f(): return 1\n\na cat raw& end\nnext\n\nhtml block"
    )
    assert document.title == "The Guide"
    assert document.attributes == {"author": "Ada", "tags": "tea, milk", "date": "2024-05-01", "draft": False}
    assert [heading for _, heading in document.headings] == ["First part", "Second"]
    for offset, heading in document.headings:
        assert document.text.startswith(heading, offset)
    assert document.heading_at(0) is None
    assert document.heading_at(document.text.index("one")) == "First part"
    assert document.heading_at(len(document.text) - 1) == "Second"


def test_markdown_titles(tmp_path: Path) -> None:
    assert read_one(write(tmp_path, "a.md", "text\n\nTop\n===\nmore")).title == "Top"
    assert read_one(write(tmp_path, "some-notes.markdown", "just text")).title == "some-notes"
    rule = read_one(write(tmp_path, "b.md", "---\nnot: [yaml\n---\n\ntext"))
    assert "text" in rule.text


RST = """:orphan:

.. _top:

=====
Title
=====

:Author: Me

See :class:`~foo.Bar`, :ref:`that text <target>`, ``code``, *emph*, **bold**, `link <http://x>`_, ``*raw``,
*args and snake_case.

.. note::
   Careful here.

.. code-block:: python
   :linenos:

   def f(*args):
       return `args`

Example::

    a  b
      c

Sub ``x``
---------
* one
  more
* two

.. toctree::
   :maxdepth: 2

   secret

.. function:: open(file)

   Opens it.

=====  =====
A      B
=====  =====
1      2
=====  =====

.. comment
   hidden

.. [1] A footnote.
"""


def test_rst(tmp_path: Path) -> None:
    document = read_one(write(tmp_path, "a.rst", RST))
    assert document.text == (
        "Title\nAuthor: Me\n\n"
        "See Bar, that text, code, emph, bold, link, *raw, *args and snake_case.\n\nCareful here.\n\n"
        "def f(*args):\n    return `args`\n\nExample:\n\na  b\n  c\n\n"
        "Sub x\n- one more\n- two\n\nopen(file)\n\nOpens it.\n"
        "A | B\n1 | 2\n\n[1] A footnote."
    )
    assert document.title == "Title"
    assert [document.text[offset : offset + len(heading)] for offset, heading in document.headings] == [
        "Title",
        "Sub x",
    ]


HTML = """<!doctype html><html lang="fr"><head><title> The
 title </title><meta name="Author" content="Ada"><style>p{}</style><script>var x = "<p>no</p>"</script></head><body>
<nav>Home</nav><div role="navigation">Side</div><p hidden>no</p><p style="color: red; display : none">no</p>
<h1>First <em>part</em><a class="headerlink" href="#">¶</a></h1>tail of <b>body</b>text
<p>one&nbsp;two<br>three &lt; <img alt="a cat" src="x"> caf&eacute;</p>
<ul><li>alpha</li><li><p>beta</p></li></ul><pre>
 a
   b</pre><table><tr><th>A</th><th>B</th></tr><tr><td>1</td><td><p>2</p></td></tr></table>
<!-- hidden --><h2>Second</h2><div>x<div>y</div>z</div></body></html>"""


def test_html(tmp_path: Path) -> None:
    document = read_one(write(tmp_path, "a.html", HTML))
    assert document.text == (
        "First part\n\ntail of bodytext\n\none two\nthree < a cat café\n- alpha\n- beta\n\n a\n   b\nA | B\n1\n\n2\n\n"
        "Second\n\nx\n\ny\n\nz"
    )
    assert document.title == "The title"
    assert document.attributes == {"language": "fr", "author": "Ada"}
    assert [document.text[offset : offset + len(heading)] for offset, heading in document.headings] == [
        "First part",
        "Second",
    ]


def test_html_titles_encodings_and_depth(tmp_path: Path) -> None:
    assert read_one(write(tmp_path, "a.htm", "<p>x</p><h3>Late</h3>")).title == "Late"
    assert read_one(write(tmp_path, "page.html", "bare words")).title == "page"
    declared = "<meta charset='windows-1251'><p>Привет</p>".encode("cp1251")
    assert read_one(write(tmp_path, "b.html", declared)).text == "Привет"
    lying = "<meta charset='utf-8'><p>It’s a café</p>".encode("cp1252")
    (document,), problems = read(write(tmp_path, "c.html", lying))
    assert document.text == "It’s a café"
    assert "cp1252" in problems[0].reason
    assert read_one(write(tmp_path, "d.html", "<div>" * 2000 + "deep")).text == "deep"
    (document,), (problem,) = read(write(tmp_path, "d.html", "<p>shallow</p>" + "<div>" * 5000 + "deep"))
    assert document.text == "shallow"
    assert problem.lost
    assert "depth" in problem.reason
    assert read(write(tmp_path, "e.html", "<!-- nothing --><script>x</script>")) == ([], [])


MARKUP = [
    "# x",
    "\n",
    "===",
    "<p>",
    "</p>",
    "<pre>",
    "<td>",
    "- ",
    ".. a:: b",
    "::",
    "`",
    "**",
    "   ",
    "```",
    "word",
    "1. ",
]
LINES = st.lists(st.sampled_from([*MARKUP, "---", "<h1>", "</h1>", "|", ":a:", "\n\n"]), max_size=30).map("".join)


@pytest.mark.parametrize("suffix", ["md", "rst", "html", "txt"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.text(max_size=120), LINES))
def test_any_text_is_read_with_exact_headings(tmp_path: Path, suffix: str, text: str) -> None:
    stamp = write(tmp_path, f"a.{suffix}", text.replace("\0", "").encode("utf-8", "replace"))
    for document in read_documents(stamp, problems=[]):
        assert document.text.strip()
        for offset, heading in document.headings:
            assert document.text.startswith(heading, offset)
