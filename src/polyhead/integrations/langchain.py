"""Polyhead's search as a retriever of LangChain."""

from __future__ import annotations

from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import PrivateAttr

from polyhead.integrations.asking import Asked

__all__ = ["PolyheadRetriever"]


class PolyheadRetriever(BaseRetriever):
    """Documents by every aspect of a question.

    Each :class:`~langchain_core.documents.Document` holds the best chunk of a document; its metadata say where it is
    (``path``, ``title``, ``heading``, ``start``, ``end``), which part of the question it answers, and its score.

    Args:
        index: folder of an index; its encoder is loaded at the first question.
        url: of ``polyhead serve``, instead of ``index``.
        key: API key of the service.
        k: how many documents.
        strategy: "aspects", "dense", "heads", "vote", "parts" or "late".
        where: a filter such as ``"kind = 'pdf'"``.

    Raises:
        InputError: both or neither of ``index`` and ``url``.

    Example:
        >>> PolyheadRetriever(url="http://127.0.0.1:8000", k=3).invoke("who pays")  # doctest: +SKIP
    """

    index: str | None = None
    url: str | None = None
    key: str | None = None
    k: int = 10
    strategy: str = "aspects"
    where: str | None = None
    _asked: Asked = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        """Check where questions go."""
        self._asked = Asked(self.index, self.url, self.key)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [
            Document(
                id=hit["document"],
                page_content=hit["text"],
                metadata={
                    name: value for name, value in hit.items() if name not in ("text", "heads", "terms", "words")
                },
            )
            for hit in self._asked.hits(query, self.k, self.strategy, self.where)
        ]
