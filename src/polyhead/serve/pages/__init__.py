"""The web pages: server-rendered templates, with htmx and Plotly from their packages; nothing comes from elsewhere."""

from __future__ import annotations

from polyhead.serve.pages.site import Site, add_pages

__all__ = ["Site", "add_pages"]
