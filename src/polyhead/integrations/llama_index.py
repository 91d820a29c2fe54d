"""Polyhead's search as a retriever of LlamaIndex."""

from __future__ import annotations

from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from polyhead.integrations.asking import Asked

__all__ = ["PolyheadRetriever"]


class PolyheadRetriever(BaseRetriever):
    """Documents by every aspect of a question, as nodes of LlamaIndex: the best chunk of each.

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
        >>> PolyheadRetriever(url="http://127.0.0.1:8000", k=3).retrieve("who pays")  # doctest: +SKIP
    """

    def __init__(
        self,
        index: str | None = None,
        url: str | None = None,
        *,
        key: str | None = None,
        k: int = 10,
        strategy: str = "aspects",
        where: str | None = None,
    ) -> None:
        super().__init__()
        self._asked = Asked(index, url, key)
        self._k, self._strategy, self._where = k, strategy, where

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        hits = self._asked.hits(query_bundle.query_str, self._k, self._strategy, self._where)
        return [
            NodeWithScore(
                node=TextNode(
                    id_=f"{hit['document']}:{hit['start']}",
                    text=hit["text"],
                    metadata={k: v for k, v in hit.items() if k not in ("text", "heads", "terms", "words")},
                ),
                score=hit["score"],
            )
            for hit in hits
        ]
