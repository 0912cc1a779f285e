"""A directory for a name: local ones as they are, those of the hub through its own cache."""

from __future__ import annotations

from pathlib import Path

from megatron_mimo.hf.files import INDEX, SINGLE

#: What belongs to a model that is no weight: of its processor and tokenizer.
BESIDE = (
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json", "tokenizer.json",
    "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "chat_template.json", "chat_template.jinja", "generation_config.json", "vocab.txt", "spiece.model",
)  # fmt: skip
OWN = "megatron_mimo.json"


def resolve(source: str | Path) -> Path:
    """The local directory of a model.

    Args:
        source: a directory, or a name on the hub such as `Qwen/Qwen2.5-0.5B`, which is looked up in the cache of
            `huggingface_hub` and fetched where it is not there. ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and ``HF_HOME``
            hold.

    Raises:
        FileNotFoundError: neither a directory nor a name that the hub or, offline, the cache has.
        ConnectionError: the hub could not be reached, or broke off.
    """
    path = Path(source)
    if path.is_dir():
        return path
    text = str(source)
    if path.is_absolute() or text.startswith(".") or text.count("/") > 1:
        raise FileNotFoundError(
            f"{text}: expected a directory, or a name on the hub such as owner/model, found neither."
        )
    return _fetched(text)


def _fetched(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    patterns = ["config.json", SINGLE, INDEX, "model-*-of-*.safetensors", OWN, *BESIDE]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise FileNotFoundError(
            f"{name}: expected a directory, or a name on the hub, found neither ({error})."
        ) from None
    except GatedRepoError as error:
        raise FileNotFoundError(
            f"{name}: the hub asks for a login or a licence first ({error.__class__.__name__}). Accept it there, then "
            "run `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(f"{name}: expected a directory, or a name on the hub, found neither.") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ConnectionError(
            f"{name}: the hub cannot be reached or HF_HUB_OFFLINE is set, the local cache has no whole snapshot, and "
            f"no such directory is in {Path.cwd()}. Fetch it once where there is a network (`hf download {name}`), or "
            "give a directory."
        ) from error
    except Exception as error:  # what the client's transport raises is its own affair, and changes
        raise ConnectionError(
            f"{name}: fetching it from the hub broke off ({type(error).__name__}: {error}). Try again; what has "
            "arrived is kept."
        ) from error
