"""A client for the jobs of a cluster that has been looked at first: there, let in, and of the right versions."""

from __future__ import annotations

import http.client
import json
import logging
import os
import platform
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rl_exit.cluster.address import ENV_KEYS, Target
from rl_exit.errors import UserError

ANSWER_SECONDS = 10.0


def connect(target: Target, *, any_version: bool = True) -> Any:
    """A ``ray.job_submission.JobSubmissionClient`` of the cluster.

    Args:
        target: Where it is.
        any_version: Whether the cluster may have another Ray or Python than this machine; looking at jobs may, sending
            one should not.

    Raises:
        UserError: It cannot be reached, wants another token, is no Ray dashboard, or has other versions.
    """
    from ray.job_submission import JobSubmissionClient

    for name in ("dashboard_sdk", "job.sdk"):
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    if target.is_http:
        about = _ask(target, "/api/version")
        if "ray_version" not in about:
            raise UserError(
                f"{target.url}: answers, but is no Ray dashboard; the port of the dashboard is usually 8265"
            )
    with telling(target), _only(target):
        client = JobSubmissionClient(target.url, headers=target.headers or None)
    if not any_version:
        found = cluster_versions(Target(client.get_address(), target.origin, target.token))
        check_versions(found, target.url)
    return client


def cluster_versions(target: Target) -> dict[str, str]:
    """``ray`` and ``python`` of the cluster's head; what it does not tell is missing."""
    found = {"ray": str(_ask(target, "/api/version").get("ray_version", ""))}
    try:
        data = _ask(target, "/api/v0/cluster_metadata").get("data", {})
    except UserError:  # an older dashboard has no such page
        data = {}
    found["python"] = str(data.get("pythonVersion", "")) if isinstance(data, dict) else ""
    return {name: version for name, version in found.items() if version}


def check_versions(found: dict[str, str], where: str) -> None:
    """Refuse a cluster whose Ray, or whose Python's minor version, is not that of this machine.

    Raises:
        UserError: With both versions and what to do.
    """
    import ray

    here = {"ray": ray.__version__, "python": platform.python_version()}
    for name, word in (("ray", "Ray"), ("python", "Python")):
        there = found.get(name)
        parts = 2 if name == "python" else 3
        if there is not None and there.split(".")[:parts] != here[name].split(".")[:parts]:
            raise UserError(
                f"{where}: the cluster has {word} {there} and this machine {here[name]}; a run needs the same on both. "
                f"Submit from an environment with {word} {there}, start the cluster with {here[name]} "
                "(rl-exit manifest dockerfile), or try as it is with --any-version"
            )


@contextmanager
def telling(target: Target, job: str | None = None) -> Iterator[None]:
    """What Ray's client raises, as one message for the user.

    Args:
        target: The cluster.
        job: The job that is asked for.
    """
    from ray.exceptions import AuthenticationError

    try:
        yield
    except UserError:
        raise
    except AuthenticationError as error:
        raise UserError(not_let_in(target, 403 if "nvalid" in str(error) else 401)) from None
    except Exception as error:  # noqa: BLE001 - Ray raises RuntimeError, ValueError, and those of two HTTP libraries
        words = str(error)
        if job is not None and ("404" in words or "does not exist" in words):
            raise UserError(f"no job '{job}' at {target.url}; 'rl-exit jobs list' shows those that are there") from None
        first = next((line for line in words.splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"{target.url} ({target.origin}): {first[:300]}") from None


def not_let_in(target: Target, status: int) -> str:
    """What to do about a 401 or 403."""
    if target.token is None:
        return (
            f"{target.url}: {status}, the cluster wants a token and none was found. On the head, `ray get-auth-token` "
            "prints it; set RAY_AUTH_TOKEN to it, or RAY_AUTH_TOKEN_PATH to a file that holds it"
        )
    return (
        f"{target.url}: {status}, the cluster does not accept the token given (RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or "
        "~/.ray/auth_token). Is it that of another cluster? `ray get-auth-token` on the head prints the right one"
    )


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer like others: followed, it would carry the token to whoever it names."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def _ask(target: Target, page: str) -> dict[str, Any]:
    """A page of the dashboard as JSON; an empty mapping if it is none."""
    request = urllib.request.Request(target.url + page, headers=target.headers)
    try:
        with _OPENER.open(request, timeout=ANSWER_SECONDS) as answer:
            found = json.loads(answer.read(1 << 20))
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            raise UserError(not_let_in(target, error.code)) from None
        if error.code == 404:
            return {}
        raise UserError(f"{target.url} ({target.origin}): answers with {error.code} {error.reason}") from None
    except http.client.HTTPException as error:
        raise UserError(
            f"{target.url} ({target.origin}): does not answer as a dashboard does ({type(error).__name__}). Is it the "
            "head's dashboard (normally port 8265)?"
        ) from None
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        why = f"no answer in {ANSWER_SECONDS:.0f} s" if isinstance(reason, (TimeoutError, socket.timeout)) else reason
        raise UserError(
            f"{target.url} ({target.origin}): cannot be reached: {why}. Is it the head's dashboard, and the port open?"
        ) from None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def _only(target: Target) -> Iterator[None]:
    """Ray lets its environment variables win over the address given; here the command line does."""
    before = {key: os.environ.pop(key) for key in ENV_KEYS if key in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
