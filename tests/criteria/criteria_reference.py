"""Every criterion once more: one instance at a time, plain Python and the rule as the paper states it.

Written without the package (only its stored tensors are read), as what the vectorised criteria are checked against.
"""

from __future__ import annotations

import math

import numpy as np


def softmax(z):
    top = max(z)
    e = [math.exp(v - top) for v in z]
    return [v / sum(e) for v in e]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def entropy(p):
    return -sum(v * math.log(v) for v in p if v > 0)


def argmax(z):
    return max(range(len(z)), key=lambda c: (z[c], -c))


def dot(a, b):
    return sum(float(x) * float(y) for x, y in zip(a, b, strict=True))


def linear(tensors, name, x):
    weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    return [dot(row, x) + float(b) for row, b in zip(weight, bias, strict=True)]


class Instance:
    """One instance: logits [L][C], states [L][H], pi [L-1]; exits are asked for by word."""

    def __init__(self, logits, states, pi):
        self.z = [list(map(float, row)) for row in logits]
        self.h = [list(map(float, row)) for row in states]
        self.pi = list(map(float, pi))
        self.layers = len(self.z)

    def exit(self, word, tensors=None, **params):
        """Layer of the first l < L where the rule holds, else L."""
        rule = getattr(self, word)
        for layer in range(1, self.layers):
            if rule(layer, tensors, **params):
                return layer
        return self.layers

    def p(self, layer, temperature=1.0):
        return softmax([v / temperature for v in self.z[layer - 1]])

    def said(self, layer):
        return argmax(self.z[layer - 1])

    # --- rules: does the instance leave at this layer, given that it is still inside? ---

    def fixed(self, layer, _, depth):
        return layer == depth

    def consistentee(self, layer, _, threshold):
        return self.pi[layer - 1] > threshold

    def entropy(self, layer, _, threshold):
        return entropy(self.p(layer)) < threshold

    def fastbert(self, layer, _, threshold):
        p = self.p(layer)
        return entropy(p) / math.log(len(p)) < threshold

    def max_probability(self, layer, _, threshold):
        return max(self.p(layer)) >= threshold

    def right_tool(self, layer, tensors, threshold):
        return max(self.p(layer, float(tensors["temperature"][layer - 1]))) >= threshold

    def pabee(self, layer, _, patience):
        count = 0
        for number in range(2, layer + 1):
            count = count + 1 if self.said(number) == self.said(number - 1) else 0
        return count == patience

    def pabee_regression(self, layer, _, threshold, patience):
        count = 0
        for number in range(2, layer + 1):
            count = count + 1 if abs(self.z[number - 1][0] - self.z[number - 2][0]) < threshold else 0
        return count == patience

    def pcee(self, layer, _, threshold, patience):
        count = 0
        for number in range(1, layer + 1):
            count = count + 1 if self.fastbert(number, _, threshold) else 0
        return count == patience

    def beem(self, layer, tensors, threshold):
        total = 0.0
        for number in range(1, layer + 1):
            weight = 0.1 * number if tensors is None else float(tensors["weight"][number - 1])
            agrees = number > 1 and self.said(number) == self.said(number - 1)
            total = (total if agrees else 0.0) + weight * max(self.p(number))
        return total >= threshold

    def lambda_t(self, layer, threshold, decay):
        return min(max(0.9 * threshold + 0.1 * math.exp(-decay * (layer - 1) / self.layers), 0.0), 1.0)

    def calm_softmax(self, layer, _, threshold, decay):
        p = sorted(self.p(layer))
        return p[-1] - p[-2] >= self.lambda_t(layer, threshold, decay)

    def calm_saturation(self, layer, _, threshold, decay):
        if layer == 1:
            return False
        a, b = self.h[layer - 1], self.h[layer - 2]
        return dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) >= self.lambda_t(layer, threshold, decay)

    def calm_meta(self, layer, tensors, threshold, decay):
        return sigmoid(linear(tensors, "linear", self.h[layer - 1])[0]) >= self.lambda_t(layer, threshold, decay)

    def lte(self, layer, tensors, threshold):
        return sigmoid(linear(tensors, "linear", self.h[layer - 1])[0]) > threshold

    def cat(self, layer, tensors, threshold):
        p, now = self.p(layer), self.said(layer)
        pooled = [math.tanh(v) for v in linear(tensors, "pool", self.h[layer - 1])]
        history = [self.p(number)[now] for number in range(layer - 1, 1, -1)]
        history += [0.0] * (max(self.layers - 3, 0) - len(history))
        one_hot = [1.0 if c == now else 0.0 for c in range(len(p))]
        top = sorted(p)
        features = [*one_hot, *pooled, top[-1], top[-1] - top[-2], *history, layer / self.layers]
        hidden = [math.tanh(v) for v in linear(tensors, "hidden", features)]
        return sigmoid(linear(tensors, "out", hidden)[0]) > threshold

    def palbert(self, layer, tensors, threshold):
        left, stay = 0.0, 1.0
        for number in range(1, layer + 1):
            before = self.h[number - 2] if number > 1 else [0.0] * len(self.h[0])
            shift = tensors["layer"][number - 1]
            first = linear(tensors, "first", [*self.h[number - 1], *before])
            hidden = [math.tanh(v + float(s)) for v, s in zip(first, shift, strict=True)]
            halt = sigmoid(linear(tensors, "out", hidden)[0])
            left, stay = left + stay * halt, stay * (1 - halt)
        return left > threshold

    def jei(self, layer, tensors, threshold):
        p = self.p(layer)
        top = sorted(p)
        squared = [v * v / sum(u * u for u in p) for v in p]
        features = [*self.h[layer - 1], top[-1], entropy(p), top[-1] - top[-2], entropy(squared)]
        hidden = [max(v, 0.0) for v in linear(tensors, f"first.{layer - 1}", features)]
        return sigmoid(linear(tensors, f"out.{layer - 1}", hidden)[0]) > threshold


def instances(split):
    """The instances of a stored split."""
    pi = 1 / (1 + np.exp(-split.exit_logits.astype(np.float64)))
    return [Instance(*row) for row in zip(split.logits, split.states, pi, strict=True)]
