"""A model's folder: config.json, model.safetensors, tokenizer files, README.md. Written whole, read with care."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import cached_file

from rl_exit.errors import ModelError
from rl_exit.files import atomic_folder, telling_disk_errors
from rl_exit.models import pretrained
from rl_exit.models.card import model_card
from rl_exit.models.lora import has_lora

if TYPE_CHECKING:
    from rl_exit.models.causal import EarlyExitCausalModel
    from rl_exit.models.early_exit import EarlyExitModel

# Which arguments of from_pretrained the tokenizer's loading shares.
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")


def kind(name: Any, options: Mapping[str, Any]) -> str | None:
    """The ``model_type`` of a saved model, None where it cannot be told (then loading says what is wrong).

    Args:
        name: Folder or hub id.
        options: Keyword arguments of from_pretrained; those that choose a place count.
    """
    path = Path(str(name)).expanduser()
    if path.is_dir():
        file: Path | None = path / "config.json"
    else:
        source = pretrained.find_source(str(name))
        shared = {key: options[key] for key in _HUB_OPTIONS if key in options}
        with pretrained.quiet():
            found = cached_file(source.path, "config.json", **{**shared, **source.options}, **pretrained.SILENT)
        file = None if found is None else Path(found)
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file else None
    except (OSError, ValueError):
        return None
    return config.get("model_type") if isinstance(config, dict) else None


def load(
    cls: type[EarlyExitModel | EarlyExitCausalModel],
    loader: Callable[..., Any],
    name: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Any:
    """Read a saved model through transformers' own ``loader``; its problems become one message.

    Args:
        cls: The model class.
        loader: ``PreTrainedModel.from_pretrained`` bound to it.
        name: Folder or hub id.
        args: Further positional arguments of the loader.
        kwargs: Further keyword arguments of the loader.

    Returns:
        The model in evaluation mode, or (model, report) if ``output_loading_info=True``.

    Raises:
        ModelError: See :meth:`EarlyExitModel.from_pretrained`.
    """
    source = pretrained.find_source(str(name))
    options = {key: value for key, value in kwargs.items() if key not in _OURS}
    with_report = options.pop("output_loading_info", False)
    options |= source.options
    if source.is_folder:
        folder = Path(source.path)
        _check_config(folder, cls.config_class.model_type)
        pretrained.refuse_pickle(folder)
    with pretrained.loading(f"model '{name}'"):
        model, report = loader(
            source.path,
            *args,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them; they are refused below
            **options,
        )
    _check_weights(str(name), report)
    shared = {key: options[key] for key in _HUB_OPTIONS if key in options}
    model.tokenizer = pretrained.load_tokenizer(
        pretrained.Source(source.name, source.path, source.is_folder, options=shared)
    )
    return (model, report) if with_report else model


def save(
    model: EarlyExitModel | EarlyExitCausalModel,
    saver: Callable[..., Any],
    target: Path,
    card: str | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Write a model through transformers' own ``saver``; what was there before stays whole until all is written.

    Args:
        model: The model.
        saver: ``PreTrainedModel.save_pretrained`` bound to it.
        target: Folder.
        card: Text of README.md, or None for a card without results.
        kwargs: Further keyword arguments of the saver.

    Raises:
        UserError: See :meth:`EarlyExitModel.save_pretrained`.
    """
    options = {key: value for key, value in kwargs.items() if key not in ("push_to_hub", "safe_serialization")}
    if not options.get("is_main_process", True):
        return
    if kwargs.get("push_to_hub"):
        raise ModelError(
            "save_pretrained(push_to_hub=True) is not offered; save to a folder, then model.push_to_hub(id)"
        )
    if model.tokenizer is None:
        raise ModelError("this model has no tokenizer, so what it saves could not be used; set model.tokenizer first")
    if has_lora(model):
        raise ModelError("this model carries LoRA adapters; rl_exit.models.lora.merge_lora(model) before saving it")
    # One weights file, whatever the size: the folder's form does not depend on the backbone.
    options.setdefault("max_shard_size", "10TB")

    def write(folder: Path) -> None:
        with pretrained.quiet():
            saver(folder, **options)
        model.tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card or model_card(model.config, model.num_layers), encoding="utf-8")

    if target.exists() and not target.is_dir():
        raise ModelError(f"{target}: a file stands where the model's folder is needed")
    if target.is_dir() and any(entry.name not in _OWN_FILES for entry in target.iterdir()):
        _write_among_others(target, write)
    else:
        with atomic_folder(target) as beside:
            write(beside)


def push(model: EarlyExitModel, repo_id: str, options: Mapping[str, Any]) -> str:
    """Upload a model: what ``save_pretrained`` writes with its own card, its learned criteria and its dial.

    Args:
        model: The model.
        repo_id: ``user/name`` on the hub.
        options: ``private``, ``token``, ``revision``, ``commit_message``, ``create_pr``, as of the hub's client.

    Returns:
        Address of the commit.

    Raises:
        ModelError: The hub cannot be reached or refuses, or an unknown option.
    """
    from huggingface_hub import HfApi

    known = ("private", "token", "revision", "commit_message", "create_pr")
    if wrong := [key for key in options if key not in known]:
        raise ModelError(f"push_to_hub: {', '.join(wrong)} unknown; accepted: {', '.join(known)}")
    shared = {key: options[key] for key in ("token",) if key in options}
    upload = {key: value for key, value in options.items() if key != "private"}
    upload.setdefault("commit_message", "Upload early-exit model")
    with tempfile.TemporaryDirectory(prefix="rl-exit-push-") as name:
        folder = Path(name) / "model"
        model.save_pretrained(folder)
        source = Path(model.config.name_or_path or ".")
        for extra in _EXTRAS:
            if (source / extra).is_dir():
                shutil.copytree(source / extra, folder / extra)
            elif (source / extra).is_file():
                shutil.copy2(source / extra, folder / extra)
        api = HfApi()
        try:
            api.create_repo(repo_id, private=options.get("private"), exist_ok=True, **shared)
            return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder), **upload))
        except (OSError, ValueError) as error:  # of the client: not reachable, no rights, no such name
            raise ModelError(f"push_to_hub '{repo_id}': {error}") from None


def _write_among_others(target: Path, write: Callable[[Path], None]) -> None:
    """Into a folder with foreign files (say a checkpoint of Trainer): all written first, then renamed one by one."""
    with telling_disk_errors(target), tempfile.TemporaryDirectory(prefix=".saving.", dir=target) as name:
        write(Path(name))
        # The configuration last: a reader that finds it new finds everything new.
        for path in sorted(Path(name).iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(target / path.name)


def _check_config(folder: Path, expected: str) -> None:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as a model's configuration: {error}") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != expected:
        what = f"a model of type '{kind}'" if kind else "not a transformers configuration"
        raise ModelError(
            f"{folder}: {what}, not an early-exit model; to train one on it, give it as model.backbone to rl-exit train"
        )


def _check_weights(name: str, report: Any) -> None:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # Mismatched ones come with their two shapes.
        keys = sorted(key if isinstance(key, str) else key[0] for key in report.get(problem) or ())
        if keys:
            what = problem.removesuffix("_keys")
            raise ModelError(
                f"model '{name}': {what} weights: {pretrained.listed(keys)}; its config.json and model.safetensors "
                "do not belong together"
            )


# What lies beside a model that belongs to it on any machine.
_EXTRAS = ("criteria", "dial.json", "dial.safetensors", "training.yaml")
# Arguments of from_pretrained that are not the caller's choice.
_OURS = frozenset({"trust_remote_code", "use_safetensors", "ignore_mismatched_sizes"})
_OWN_FILES = frozenset(
    {
        "README.md",
        "added_tokens.json",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "sentencepiece.bpe.model",
        "special_tokens_map.json",
        "spiece.model",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
        "vocab.txt",
    }
)
