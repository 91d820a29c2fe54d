"""From a folder of files to documents: ``scan`` lists the files, ``read_documents`` reads one.

>>> import polyhead, pathlib
>>> found = scan(pathlib.Path(polyhead.__file__).parent, include=["errors.py"])
>>> next(read_documents(found.files[0])).title
'polyhead.errors'

What a document is, by kind:

========================  =========================================================================================
txt, md, rst, html,       one document a file; markup becomes readable text, headings keep their offsets
pdf, docx
json, jsonl, csv, tsv     one document a record; ``text_field`` names the text, other scalar fields become attributes;
                          also gzipped (``.jsonl.gz`` ...)
py                        one document a docstring (module, class, function), parsed and never imported
========================  =========================================================================================

A file without any text (empty, or Python without docstrings) yields no document and is no error: the caller can
count it. A file that cannot be read raises ``ReadError``; a damaged record is a ``ReadProblem`` (``read_documents``).
"""

from __future__ import annotations

from polyhead.errors import ReadError
from polyhead.search.ingest.document import Document, FileStamp, ReadProblem
from polyhead.search.ingest.reader import read_documents
from polyhead.search.ingest.scan import SUPPORTED, ScanResult, scan

__all__ = ["SUPPORTED", "Document", "FileStamp", "ReadError", "ReadProblem", "ScanResult", "read_documents", "scan"]
