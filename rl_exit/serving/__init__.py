"""Serving a model: texts of different requests that wait at the same layer run together.

``pool`` decides which rows run next (no torch), ``steps`` runs a layer on rows that come from different batches,
``engine`` puts both in a thread of their own, ``service`` is a model with its rules, ``model_worker`` the same in a
process of its own, ``model_process`` that of those who started it, ``lines`` that of the front, which asks it straight,
``wire`` what goes over a line, ``texts`` what they need of a model, ``http`` the HTTP API. ``writer`` and ``decoding``
write text. Nothing here needs Ray; :mod:`rl_exit.cluster.serving` spreads it over a Ray cluster.
"""
