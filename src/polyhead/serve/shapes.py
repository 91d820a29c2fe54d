"""Requests and answers, as OpenAI's, Cohere's and Jina's clients send and read them, and Polyhead's own."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "ChangeAnswer",
    "ChangeRequest",
    "EmbeddingsAnswer",
    "EmbeddingsRequest",
    "Failure",
    "HeadsAnswer",
    "RerankAnswer",
    "RerankRequest",
    "SearchAnswer",
    "SearchRequest",
    "StateAnswer",
]

Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Ids = Annotated[list[TokenId], Field(min_length=1)]
Scalar = str | int | float | bool


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: int


class Failure(BaseModel):
    """Every error has this form."""

    error: Problem
    message: str


class EmbeddingsRequest(BaseModel):
    """As ``client.embeddings.create`` of the openai package sends it."""

    input: Text | Texts | Ids | Annotated[list[Ids], Field(min_length=1)] = Field(
        description="A text, a list of texts, the token ids of a text, or a list of those."
    )
    model: str | None = Field(None, description="Taken and given back; this service has one model.")
    dimensions: int | None = Field(None, ge=1, description="Keep the first so many numbers, at length 1 again.")
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


class EmbeddingItem(BaseModel):
    """One vector: numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens that were read, special ones included."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(BaseModel):
    """As the openai package reads it."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: Usage


class RerankDocument(BaseModel):
    """A document as an object."""

    model_config = ConfigDict(extra="ignore")
    text: Text


class RerankRequest(BaseModel):
    """As Cohere's and Jina's clients send it."""

    model_config = ConfigDict(extra="ignore")
    query: Text
    documents: Annotated[list[Text | RerankDocument], Field(min_length=1)]
    model: str | None = None
    top_n: int | None = Field(None, ge=1, description="Give the best so many; all where absent.")
    return_documents: bool = False
    strategy: Literal["both", "late", "dense"] = Field(
        "both", description="One vector a text, token by token, or the mean of the two."
    )


class RerankResult(BaseModel):
    """One document, best first; ``relevance_score`` is from 0 to 1."""

    index: int
    relevance_score: float
    document: RerankDocument | None = None


class RerankAnswer(BaseModel):
    """What both clients read."""

    id: str
    model: str
    results: list[RerankResult]
    usage: Usage
    meta: dict[str, Any] = {}


class SearchRequest(BaseModel):
    """A question to the index."""

    model_config = ConfigDict(extra="forbid")
    query: Text
    k: int = Field(10, ge=1)
    strategy: Literal["aspects", "dense", "heads", "vote", "parts", "late"] = "aspects"
    where: str | None = Field(None, description="Filter, for instance \"kind = 'pdf' AND size > 1000\".")
    language: str = Field("en", pattern="^[a-z]{2}$", description="ISO 639-1 code for cutting into sentences.")
    explain: bool = Field(False, description="Give heads, terms and words of each hit, and what was decided.")


class SearchAnswer(BaseModel):
    """Hits, best first, each a document with its best chunk."""

    model_config = ConfigDict(extra="allow")
    query: str
    strategy: str
    hits: list[dict[str, Any]]


class DocumentIn(BaseModel):
    """A document to put into the index, in the place of an earlier one of its id."""

    model_config = ConfigDict(extra="forbid")
    id: Annotated[str, Field(min_length=1, max_length=512)]
    text: Text
    title: str | None = None
    kind: Annotated[str, Field(min_length=1, max_length=64)] = "text"
    attributes: dict[str, Scalar] = {}


class ChangeRequest(BaseModel):
    """Documents to put and ids of documents to remove; what is removed goes first."""

    model_config = ConfigDict(extra="forbid")
    documents: list[DocumentIn] = []
    remove: list[Annotated[str, Field(min_length=1, max_length=512)]] = []


class ChangeAnswer(BaseModel):
    """What was done; it is on disk."""

    added: int
    changed: int
    removed: int
    chunks: int
    total_chunks: int


class HeadsAnswer(BaseModel):
    """The heads of the model, and what was measured of them."""

    model: str
    layers: int
    heads: int
    head_dim: int
    maps: list[dict[str, Any]]


class StateAnswer(BaseModel):
    """How the service is."""

    status: str
    model: str
    version: str
