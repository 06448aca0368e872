"""Pretrained: save an operated model, load it, and push it to the Hugging Face Hub.

In: a model, or where one is. Out: a folder or a commit, or the model. What is saved is a plain timm model of the
generic architecture `se_surgery`: after `import se_surgery`, `timm.create_model("local-dir:...")` and `("hf-hub:...")`
load it wherever se-surgery is installed, and `from_pretrained` loads it from one pinned commit.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import ArtefactError, OptionError, shorten
from ..gates.excited import Excitations
from .artefact import CARD, CONFIG, PLOT, WEIGHTS, is_ours, outdated, refuse_pickles
from .assemble import assemble
from .card import card_text, license_of, lineage_of, refuse_tags
from .config import config_bytes, read_config
from .hub import card_of, is_repo, push, snapshot
from .pack import Pack, pack
from .replace import check_directory, replace_files
from .sources import Checkpoint
from .tensorfile import read_tensors, to_bytes

_PNG = b"\x89PNG\r\n\x1a\n"
# Arguments of timm.create_model that say where a model comes from; here the folder or repository does.
_OURS = frozenset("model_name pretrained pretrained_cfg pretrained_cfg_overlay checkpoint_path recipe digest".split())


def save_pretrained(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    base: str | nn.Module | None = None,
    base_args: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    license: str | None = None,
    base_model: str | None = None,
    tags: Collection[str] = (),
    plot: Any = None,
    example_input: Any = None,
) -> Path:
    """Save a model: its weights as safetensors, timm's configuration with the recipe, and a model card.

    Before anything is written the model is built anew from its configuration, and both compute the same, bit for bit.
    Each file is written whole or not at all, the weights first and the configuration last; both carry a digest, so that
    files that do not belong together are never loaded.

    Args:
        model: The model, operated on or not. One in DataParallel, DistributedDataParallel or torch.compile is taken out
            of it.
        directory: The folder; it is made where it does not exist.
        base: Name of the model's base, `torchvision/resnet50` for instance; timm's models know theirs. For a class of
            your own a fresh model of that class; `from_pretrained` then takes one, too.
        base_args: Arguments the base was created with, as far as it does not know them itself.
        overwrite: Whether to write into a folder that holds something. Other files in it stay, a README that this
            library did not write as well; a picture goes with the card that showed it.
        license: The licence, for the model card; by default that of the base's weights, where timm knows it.
        base_model: Repository on the Hub of the weights the model was made from; by default that of the base's tag. An
            empty text for a model that was trained from random weights.
        tags: Further tags for the model card.
        plot: A picture of the excitations for the model card: what `excitations` returned, a PNG file, or a figure of
            matplotlib.
        example_input: (C, H, W), a tensor or a tuple of arguments, to run the model with.

    Returns:
        The folder.

    Raises:
        SurgeryError: The model cannot be saved or would not be the same again, or the folder cannot be written; the
            message says what to do.

    Examples:
        >>> model = se_surgery.add_se(timm.create_model("resnet50", pretrained=True))
        >>> se_surgery.save_pretrained(model, "se_resnet50")
        >>> model = timm.create_model("local-dir:se_resnet50", pretrained=True)
    """
    folder = check_directory(directory, overwrite)
    packed = pack(model, base, base_args, example_input)
    where = f"local-dir:{Path(os.path.abspath(folder)).name}"
    files = _files(packed, where, license, base_model, tags, plot, publish=False)
    card = folder / CARD
    try:
        before = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else None
    except OSError as error:
        raise ArtefactError(f"{str(card)!r} cannot be read ({error}), and may be yours. Move it away.") from error
    if before is not None and not is_ours(before):
        del files[CARD]
    return replace_files(folder, files, outdated(before, files), overwrite=overwrite)


def from_pretrained(
    directory_or_repo: str | os.PathLike[str],
    *,
    revision: str | None = None,
    base: nn.Module | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    token: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Load a model that `save_pretrained` or `push_to_hub` wrote, from a folder or from the Hub.

    From the Hub, configuration and weights are those of one commit. The weights have to be the model's, key for key,
    and those it was saved with, bit for bit; of a folder without `config.json` the weights know the configuration.

    Args:
        directory_or_repo: A folder, or a repository: `user/model`.
        revision: A branch, tag or commit of the repository.
        base: A fresh model of a class of your own, where the base is no model of timm or torchvision; it is copied.
        cache_dir: Where downloads are kept.
        token: A token with the right to read; by default that of the environment or of `hf auth login`.
        kwargs: Arguments of `timm.create_model`: `num_classes=10` gives a new head, `in_chans`, `features_only`, ...

    Returns:
        The model in training mode, as timm creates models, in the dtype it was saved in.

    Raises:
        SurgeryError: It cannot be had or is damaged, or an argument means nothing.

    Examples:
        >>> model = se_surgery.from_pretrained("user/se_resnet50", revision="v1", num_classes=10)
    """
    refused = sorted(_OURS & kwargs.keys())
    if refused:
        raise OptionError(f"{refused[0]!r} is what the folder or repository says. Leave it out.")
    if base is not None and not isinstance(base, nn.Module):
        raise OptionError(
            f"base={shorten(base)} is no model. "
            f"The folder names its base; for a class of your own give a fresh model of it."
        )
    folder = locate(directory_or_repo, revision, cache_dir, token)
    config = read_config(folder)
    if base is None and config["model_args"]["recipe"]["base"] is None:
        own = config.get("se_surgery", {}).get("class")
        raise OptionError(
            f"The base of this model is of a class of its own, {own!r}, which has no name in timm or torchvision. Give "
            f"a fresh model of it: from_pretrained(..., base={own}(...))."
        )
    refuse_pickles(folder)
    checkpoint = Checkpoint(*read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))
    return assemble(config, checkpoint, base, **kwargs)


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    base: str | nn.Module | None = None,
    base_args: Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    tag: str | None = None,
    message: str = "Save the model with se-surgery",
    license: str | None = None,
    base_model: str | None = None,
    tags: Collection[str] = (),
    plot: Any = None,
    token: str | None = None,
    example_input: Any = None,
) -> str:
    """Push a model to the Hugging Face Hub, in one commit.

    All that `save_pretrained` checks is checked before anything is sent. Progress is shown while weights are uploaded.

    Args:
        model: The model.
        repo_id: `user/model`; it is made where it does not exist.
        base: As for `save_pretrained`.
        base_args: As for `save_pretrained`.
        private: Whether a new repository is private; by default as the account has it.
        revision: The branch, by default `main`; it is made where it does not exist.
        tag: A name for this state of the repository, `v1` for instance.
        message: The commit's.
        license: The licence. By default that of the base's weights, where timm knows it; it is never guessed.
        base_model: As for `save_pretrained`.
        tags: Further tags for the model card.
        plot: As for `save_pretrained`.
        token: A token with the right to write; by default that of the environment or of `hf auth login`.
        example_input: As for `save_pretrained`.

    Returns:
        The repository at that commit, `user/model@0a1b2c...`, which `from_pretrained` and `hf-hub:` take.

    Raises:
        SurgeryError: The model cannot be saved, its licence is not known, or the Hub refuses.

    Examples:
        >>> se_surgery.push_to_hub(model, "user/se_resnet50", tag="v1")
        >>> model = timm.create_model("hf-hub:user/se_resnet50@v1", pretrained=True)
    """
    if not isinstance(repo_id, str) or not is_repo(repo_id) or "@" in repo_id:
        raise OptionError(f"{shorten(repo_id)} is not the name of a repository. Name it as 'user/model'.")
    packed = pack(model, base, base_args, example_input)
    files = _files(packed, f"hf-hub:{repo_id}", license, base_model, tags, plot, publish=True)
    return push(repo_id, files, message=message, private=private, branch=revision, tag=tag, token=token)


def pull_from_hub(repo: str, directory: str | os.PathLike[str], *, overwrite: bool = False) -> str:
    """Write a model of the Hub into a folder, if it can be loaded.

    Args:
        repo: `user/model`, or `user/model@revision`.
        directory: The folder.
        overwrite: Whether to write into a folder that holds something.

    Returns:
        The repository at the commit that was written, `user/model@0a1b2c...`.

    Raises:
        SurgeryError: It cannot be had, is damaged, or the folder cannot be written.
    """
    if not is_repo(repo):
        raise OptionError(f"{shorten(repo)} is not the name of a repository. Name it as 'user/model'.")
    check_directory(directory, overwrite)
    held = snapshot(repo)
    commit = f"{repo.partition('@')[0]}@{held.name}"
    from_pretrained(held)
    card = card_of(commit)
    cards = {} if card is None else {CARD: card}
    files = {WEIGHTS: (held / WEIGHTS).read_bytes(), **cards, CONFIG: (held / CONFIG).read_bytes()}
    replace_files(directory, files, overwrite=overwrite)
    return commit


def locate(
    place: str | os.PathLike[str], revision: str | None = None, cache_dir: Any = None, token: str | None = None
) -> Path:
    """The folder that a model is in; from the Hub it is fetched.

    Raises:
        SurgeryError: There is none.
    """
    if not isinstance(place, (str, os.PathLike)):
        raise OptionError(f"{shorten(place)} is no folder and no repository. Give a path, or a name as 'user/model'.")
    if os.path.isdir(place):  # Path.is_dir raises where a name is too long
        if revision is not None:
            raise OptionError(f"{str(place)!r} is a folder, which has no revision {revision!r}. Leave it out.")
        return Path(place)
    if not is_repo(str(place)):
        raise OptionError(f"There is no folder {str(place)!r}, and it names no repository. Name one as 'user/model'.")
    if revision is not None and "@" in str(place):
        raise OptionError(f"{str(place)!r} names a revision, and revision={revision!r} another. Give one of the two.")
    return snapshot(f"{place}@{revision}" if revision is not None else str(place), cache_dir, token)


def _files(
    packed: Pack,
    where: str,
    license: str | None,
    base_model: str | None,
    tags: Collection[str],
    plot: Any,
    *,
    publish: bool,
) -> dict[str, bytes]:
    """All files of a model, in the order to write them in."""
    refuse_tags(tags)
    described = packed.config["pretrained_cfg"]
    lineage = lineage_of(base_model, packed.recipe["base"], described)
    known = license_of(license, described, lineage, needed=publish)
    packed = packed.with_description({"license": known, **({} if base_model is None else {"tag": None})})
    picture = _picture(plot)
    card = card_text(
        packed.recipe,
        packed.config["pretrained_cfg"],
        packed.parameters,
        packed.costs,
        where=where,
        license=known,
        base_model=lineage,
        tags=tags,
        plot=PLOT if picture else None,
    )
    weights = to_bytes(packed.tensors, packed.metadata)
    pictures = {PLOT: picture} if picture else {}
    return {WEIGHTS: weights, **pictures, CARD: card.encode(), CONFIG: config_bytes(packed.config)}


def _picture(plot: Any) -> bytes | None:
    """A picture as PNG."""
    if plot is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PLOT
        if isinstance(plot, Excitations):
            plot.plot(path)
        elif hasattr(plot, "savefig"):
            plot.savefig(path, bbox_inches="tight")
        else:
            path = plot
        try:
            data = Path(path).read_bytes()
        except (OSError, TypeError, ValueError) as error:
            raise OptionError(
                f"plot={plot!r} cannot be read ({error}). Give a PNG file, Excitations, or a matplotlib figure."
            ) from error
    if not data.startswith(_PNG):
        raise OptionError(f"plot={str(plot)!r} is no PNG file. Give one, Excitations, or a matplotlib figure.")
    return data
