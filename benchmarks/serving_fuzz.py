"""``python benchmarks/serving.py fuzz``: requests drawn from the schema of a running server, then spoilt."""

from __future__ import annotations

import argparse
import asyncio
import json
import random
from collections import Counter
from typing import Any

import aiohttp
from serving_desk import Server, serving

JSON_TYPE = {"content-type": "application/json"}


def fuzz(args: argparse.Namespace) -> dict[str, Any]:
    """Random requests, right and wrong, against every path of the schema; counts statuses."""
    rng = random.Random(args.seed)
    statuses: Counter[str] = Counter()
    faults: list[dict[str, Any]] = []

    async def run(server: Server) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(60)) as session:
            async with session.get(f"{server.address}/openapi.json") as response:
                tree = await response.json()
            for _ in range(args.requests):
                path, method, body, headers = fuzzed(tree, rng)
                async with session.request(method, server.address + path, data=body, headers=headers) as response:
                    text = await response.text()
                    declared = str(response.status) in tree["paths"].get(path, {}).get(method.lower(), {}).get(
                        "responses", {str(response.status): None}
                    )
                    statuses[str(response.status)] += 1
                    problem = response.status >= 400 and "message" not in text
                    if response.status >= 500 or problem or not declared:
                        faults.append({"path": path, "status": response.status, "body": repr(body)[:200]})
            async with session.post(f"{server.address}/v1/predict", json={"text": "goes on"}) as response:
                assert response.status == 200, "the service must go on"

    with serving(args.model) as server:
        asyncio.run(run(server))
    return {
        "requests": args.requests,
        "seed": args.seed,
        "statuses": dict(sorted(statuses.items())),
        "server_errors": sum(count for status, count in statuses.items() if status.startswith("5")),
        "undeclared_or_without_message": len(faults),
        "faults": faults[:20],
    }


ODD = (
    None,
    True,
    False,
    0,
    -1,
    1e308,
    "",
    " ",
    "\x00",
    "a" * 30_000,
    "\ud800",
    "😀" * 50,
    [],
    [[]],
    {},
    {"text": {}},
    [None],
)


def fuzzed(tree: dict[str, Any], rng: random.Random) -> tuple[str, str, bytes, dict[str, str]]:
    """A request drawn from the schema, then spoilt in up to three places."""
    posts = [path for path, methods in tree["paths"].items() if "post" in methods]
    path = rng.choice(posts)
    reference = tree["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    shape = tree["components"]["schemas"][reference.rsplit("/", 1)[1]]
    body: Any = {
        name: drawn(part, rng)
        for name, part in shape["properties"].items()
        if name in shape.get("required", ()) or rng.random() < 0.3
    }
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        kind = rng.randrange(4)
        if kind == 0 and body:
            body[rng.choice(sorted(body))] = rng.choice(ODD)
        elif kind == 1 and body:
            del body[rng.choice(sorted(body))]
        elif kind == 2:
            body[rng.choice(("txt", "", "text ", "__class__", "\ud800"))] = rng.choice(ODD)
        else:
            body = {**body, "texts": ["a"] * rng.choice((0, 1, 300))}
    if rng.random() < 0.03:
        body = rng.choice(ODD)
    raw = json.dumps(body).encode()
    if rng.random() < 0.15:  # bytes that are no JSON any more
        cut = bytearray(raw)
        for _ in range(rng.randint(1, 6)):
            cut[rng.randrange(len(cut))] = rng.randrange(256)
        raw = bytes(cut[: rng.randint(0, len(cut))])
    if rng.random() < 0.02:
        raw = b'{"text": "' + b"a" * 1_100_000 + b'"}'
    headers = JSON_TYPE if rng.random() < 0.95 else {"content-type": rng.choice(("text/plain", "", "application/xml"))}
    method = "POST" if rng.random() < 0.95 else rng.choice(("PUT", "DELETE", "PATCH"))
    if rng.random() < 0.03:
        path = rng.choice(("/v2/predict", "/v1/predict/", "/..", "/v1/%00", "/v1/model"))
    return path, method, raw, headers


def drawn(part: dict[str, Any], rng: random.Random) -> Any:
    """A value that the schema allows."""
    if "anyOf" in part:
        return drawn(rng.choice(part["anyOf"]), rng)
    if part["type"] == "array":
        return [drawn(part["items"], rng) for _ in range(rng.randint(1, 5))]
    if part["type"] == "number":
        return rng.uniform(part.get("minimum", 0), part.get("maximum", 1))
    if part["type"] == "string":
        return "".join(rng.choice('ab éß漢😀\n\t"\\') for _ in range(rng.randint(part.get("minLength", 0), 60)))
    return None
