"""Polyhead inside other frameworks: retrievers for LangChain and LlamaIndex (extra ``integrations``)."""
