"""Where an engine's model lies on this machine."""

from __future__ import annotations

from pathlib import Path

from ucm.errors import UnsupportedEngine


def model_place(model: str, revision: str | None) -> Path:
    """The folder, or for some formats the file, that holds the weights. Raises
    UnsupportedEngine."""
    place = Path(model)
    if place.exists():
        return place
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(model, revision=revision, local_files_only=True))
    except Exception as error:
        raise UnsupportedEngine(
            f"can't find the files of {model!r} to tell which weights these are ({error}); set "
            "model_id"
        ) from error
