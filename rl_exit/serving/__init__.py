"""Serving a model: texts of different requests that wait at the same layer run together.

``pool`` decides which rows run next (no torch), ``steps`` runs a layer on rows that come from different batches,
``engine`` puts both in a thread of their own, ``service`` is a model with its rules, ``model_process`` the same in a
process beside those who ask, ``texts`` what they need of it, ``http`` the HTTP API. ``writer`` and ``decoding`` write
text. Nothing here needs Ray; :mod:`rl_exit.cluster.serving` spreads it over a Ray cluster.
"""
