"""What both retrievers do: ask an index here, or a service elsewhere."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from polyhead.errors import InputError, PolyheadError

if TYPE_CHECKING:
    from polyhead.embed import Encoder
    from polyhead.search.index import Index

__all__ = ["Asked"]


@dataclass
class Asked:
    """Where questions go: ``index`` (a folder, its encoder loaded at the first question) or ``url`` of a service.

    Args:
        index: address of an index, as ``polyhead index --index`` has it.
        url: of ``polyhead serve``, such as ``http://127.0.0.1:8000``.
        key: API key of the service, where it asks for one.
        seconds: most that a question to a service may take.

    Raises:
        InputError: both or neither of ``index`` and ``url``.
    """

    index: str | None = None
    url: str | None = None
    key: str | None = None
    seconds: float = 60.0

    def __post_init__(self) -> None:
        if (self.index is None) == (self.url is None):
            raise InputError("Give either index, a folder made by `polyhead index`, or url, of `polyhead serve`.")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise InputError(f"url is {self.url!r}; expected something like http://127.0.0.1:8000")
        self._opened: tuple[Index, Encoder] | None = None

    def hits(self, query: str, k: int, strategy: str, where: str | None) -> list[dict[str, Any]]:
        """The best documents for a question, as :meth:`polyhead.search.engine.Hit.to_json` has them."""
        if self.url is not None:
            return self._from_service({"query": query, "k": k, "strategy": strategy, "where": where})
        from polyhead.search.engine import search_index

        if self._opened is None:
            self._opened = self._open()
        index, encoder = self._opened
        return [hit.to_json() for hit in search_index(index, query, encoder, k=k, by=strategy, where=where).hits]

    def _open(self) -> tuple[Index, Encoder]:
        from polyhead.embed import Encoder
        from polyhead.search.index import Index

        index = Index.open(str(self.index))
        return index, Encoder(index.meta.model)

    def _from_service(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        headers = {"content-type": "application/json", **({"authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(
            f"{str(self.url).rstrip('/')}/search", json.dumps(body).encode(), headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as answer:
                return list(json.load(answer)["hits"])
        except urllib.error.HTTPError as error:
            raise PolyheadError(f"{self.url} answered {error.code}: {_told(error.read())}") from error
        except OSError as error:
            raise PolyheadError(
                f"{self.url} cannot be reached ({error}); is `polyhead serve` running there?"
            ) from error


def _told(body: bytes) -> str:
    try:
        return str(json.loads(body)["message"])
    except (ValueError, KeyError):
        return body[:200].decode(errors="replace")
