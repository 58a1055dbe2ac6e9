"""RLlib at the edge: the module, the columnar runner, learners and algorithms of the policy phase.

A columnar algorithm has four parts with one job each: :mod:`~rl_exit.trainers.rllib.module` (how to act),
:mod:`~rl_exit.trainers.rllib.runner` (draws :class:`~rl_exit.method.Trajectories`), a learner (how to learn from them:
``pg``, ``ppo``, ``exact``) and :mod:`~rl_exit.trainers.rllib.algorithm` (who does what, when). Class paths are written
into RLlib checkpoints, so the names of these modules are part of the format.
"""
