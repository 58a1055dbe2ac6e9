"""The exit policy as an RLlib module: whole blocks of states for the columnar route, single steps for stock RLlib."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.apis import InferenceOnlyAPI, TargetNetworkAPI, ValueFunctionAPI
from ray.rllib.core.rl_module.apis.target_network_api import TARGET_NETWORK_ACTION_DIST_INPUTS
from ray.rllib.core.rl_module.torch import TorchRLModule
from torch import Tensor
from torch.nn import functional as F

from rl_exit.method import explore
from rl_exit.models.policy import PolicyHeads
from rl_exit.trainers.rllib.passes import heads_pass

STATES = "states"
EXIT_LOGITS = "exit_logits"
VALUES = "values"


class ExitModule(TorchRLModule, InferenceOnlyAPI, ValueFunctionAPI, TargetNetworkAPI):
    """Policy heads, and value heads of the same form where the algorithm has a critic.

    ``model_config``: ``num_layers`` L, ``hidden_size`` H, ``width`` W, ``shared`` weights (bool), ``critic`` (bool),
    ``seed`` of the initialisation.

    A batch is either ``{"states": [B, L, H]}`` (one pass gives every layer) or RLlib's ``{"obs": {"state": [T, H],
    "layer": [T]}}``. Exploration is epsilon-greedy with the buffer ``epsilon``, which travels with the weights: the
    module, not the runner, defines the behaviour policy.
    """

    def setup(self) -> None:
        """Build the heads without touching torch's global generator."""
        shape = {key: int(self.model_config[key]) for key in ("num_layers", "hidden_size", "width")}
        shared = bool(self.model_config.get("shared", False))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self.model_config.get("seed", 0)))
            self.policy = PolicyHeads(**shape, shared=shared)
            if self.model_config.get("critic", False):
                self.critic = PolicyHeads(**shape, shared=shared)
                # The heads start at exit hazards; a value starts at 0.
                torch.nn.init.zeros_(self.critic.bias_out)
        self.register_buffer("epsilon", torch.zeros(()))
        # The forward methods read RLlib's batches as they are; no catalog is involved.
        self.num_layers = shape["num_layers"]

    def get_non_inference_attributes(self) -> list[str]:
        """What a runner does not need."""
        return ["critic", "target"]

    def make_target_networks(self) -> None:
        """A frozen copy of the policy (APPO); RLlib's learner keeps it up to date."""
        self.target = copy.deepcopy(self.policy).requires_grad_(False)

    def get_target_network_pairs(self) -> list[tuple[torch.nn.Module, torch.nn.Module]]:
        """(policy, its copy)."""
        return [(self.policy, self.target)]

    def forward_target(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Action logits of the copy."""
        with torch.no_grad():
            logits = _two_actions(self._by_layer(self.target, batch[Columns.OBS]))
        return {TARGET_NETWORK_ACTION_DIST_INPUTS: logits}

    def load_policy(self, weights: Mapping[str, Tensor]) -> None:
        """Take over the weights of :class:`~rl_exit.models.policy.PolicyHeads`."""
        self.policy.load_state_dict(dict(weights))

    def policy_weights(self) -> dict[str, Tensor]:
        """Copies of the policy's weights as plain tensors on the CPU."""
        return {name: value.detach().cpu().clone() for name, value in self.policy.state_dict().items()}

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        if STATES in batch:
            if not hasattr(self, "critic"):
                return {EXIT_LOGITS: heads_pass(batch[STATES], self.policy)[0]}
            # The states are read once for both.
            logits, values = heads_pass(batch[STATES], self.policy, self.critic)
            return {EXIT_LOGITS: logits, VALUES: values}
        return {Columns.ACTION_DIST_INPUTS: _two_actions(self._by_layer(self.policy, batch[Columns.OBS]))}

    def _forward_exploration(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        with torch.no_grad():
            out = self._forward(batch)
            epsilon = float(self.epsilon)
            if Columns.ACTION_DIST_INPUTS in out and epsilon > 0.0:
                logits = out[Columns.ACTION_DIST_INPUTS]
                out[Columns.ACTION_DIST_INPUTS] = explore(logits.softmax(-1), epsilon).log()
            return out

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """V of single steps, [T] (stock PPO)."""
        return self._by_layer(self.critic, batch[Columns.OBS])

    def _by_layer(self, heads: PolicyHeads, observation: Mapping[str, Tensor]) -> Tensor:
        """Output of each row's own layer, [T]; 0 at layer L, where there is no head."""
        state, layer = observation["state"], observation["layer"]
        if layer.dim() > 1:  # one-hot, as some connectors encode a Discrete
            layer = layer.argmax(-1) + 1
        out = state.new_zeros(state.shape[0])
        for number in torch.unique(layer).tolist():
            if number < self.num_layers:
                rows = (layer == number).nonzero().squeeze(-1)
                out = out.index_copy(0, rows, heads.at(int(number), state[rows]))
        return out


def _two_actions(exit_logit: Tensor) -> Tensor:
    """Logits [T, 2] of (Continue, Exit) with P(Exit) = sigmoid(exit_logit)."""
    return F.pad(exit_logit.unsqueeze(-1), (1, 0))
