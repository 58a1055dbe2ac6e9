"""Which cluster is meant, and with which token: looked up as Ray's own tools do, read once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rl_exit.errors import UserError

ENV_KEYS = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
DASHBOARD_PORT = 8265
_HOST = re.compile(r"[A-Za-z0-9_.\-]+|\[[0-9A-Fa-f:.]+\]")


@dataclass(frozen=True)
class Target:
    """Where jobs are sent.

    Attributes:
        url: Of the head's dashboard, without a slash at the end; ``ray://HOST:PORT``, ``HOST:PORT`` and ``auto`` are
            left for Ray to look up.
        origin: Who named it: ``--address`` or an environment variable.
        token: For a cluster with token authentication; never shown.
    """

    url: str
    origin: str
    token: str | None = field(default=None, repr=False)

    @property
    def is_http(self) -> bool:
        """Whether it is the dashboard's own address."""
        return self.url.startswith(("http://", "https://"))

    @property
    def headers(self) -> dict[str, str]:
        """What a request carries."""
        return {} if self.token is None else {"Authorization": f"Bearer {self.token}"}


def find_target(address: str | None, environment: Mapping[str, str] = os.environ) -> Target:
    """The cluster named by ``--address``, else by RAY_API_SERVER_ADDRESS, else by RAY_ADDRESS.

    Raises:
        UserError: None of them is there, or it is no address.
    """
    for origin, given in (("--address", address), *((key, environment.get(key)) for key in ENV_KEYS)):
        if given:
            return Target(_checked(given.strip(), origin), origin, find_token(environment))
    raise UserError(
        "which cluster? Give --address http://HEAD:8265 (the dashboard of the head node) or set "
        f"{' or '.join(ENV_KEYS)}; on a cluster in Kubernetes forward the port of the head's service first"
    )


def find_token(environment: Mapping[str, str] = os.environ) -> str | None:
    """The token that Ray's own tools would send: RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH, then ~/.ray/auth_token.

    The file in the home directory counts only where RAY_AUTH_MODE asks for it.

    Raises:
        UserError: RAY_AUTH_TOKEN_PATH names no readable file.
    """
    if token := environment.get("RAY_AUTH_TOKEN", "").strip():
        return token
    if given := environment.get("RAY_AUTH_TOKEN_PATH", "").strip():
        try:
            return Path(given).expanduser().read_text(encoding="utf-8").strip() or None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"RAY_AUTH_TOKEN_PATH={given}: cannot be read: {error}") from None
    kept = Path(environment.get("HOME", "~")).expanduser() / ".ray" / "auth_token"
    if environment.get("RAY_AUTH_MODE") == "token" and kept.is_file():
        return kept.read_text(encoding="utf-8").strip() or None
    return None


def _checked(given: str, origin: str) -> str:
    wanted = "http://HOST:8265, https://..., ray://HOST:10001, HOST:6379 or auto"
    if given == "auto":
        return given
    scheme, separator, rest = given.rpartition("://")
    if separator and scheme not in ("http", "https", "ray"):
        raise UserError(f"{origin}={_shown(given)}: scheme '{scheme}' is not accepted; {wanted} is")
    place, slash, path = rest.rstrip("/").partition("/")
    if "@" in place:
        raise UserError(f"{origin}: a password in an address would end up in logs; use a token (RAY_AUTH_TOKEN)")
    host, _, port = place.rpartition(":") if re.search(r":\d*$", place) else (place, "", "")
    if not _HOST.fullmatch(host) or (port and not 0 < int(port) < 65536):
        raise UserError(f"{origin}={_shown(given)}: no address of a cluster; {wanted} is accepted")
    if scheme in ("http", "https"):
        shown = place if port or scheme == "https" else f"{host}:{DASHBOARD_PORT}"
        return f"{scheme}://{shown}{slash}{path}"
    if not port:
        raise UserError(f"{origin}={_shown(given)}: a port is missing; {wanted} is accepted")
    return given


def _shown(given: str) -> str:
    """An address without whatever secrets it holds."""
    return re.sub(r"//[^/@]*@", "//***@", given)
