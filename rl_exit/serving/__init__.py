"""Serving a model: texts of different requests that wait at the same layer run together.

``pool`` decides which rows run next (no torch), ``steps`` runs a layer on rows that come from different batches,
``engine`` puts both in a thread of their own, ``batch`` is plain batching for comparison, ``http`` is the HTTP API.
Nothing here needs Ray; :mod:`rl_exit.cluster.serving` spreads it over a Ray cluster.
"""
