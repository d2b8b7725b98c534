"""Uploads runs to the Hub: which files, in which form, with which error messages."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi

# HTTPError is that of the HTTP library that the installed huggingface_hub uses, which has changed over time.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalTokenNotFoundError
from huggingface_hub.utils import get_token, validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

from .. import __version__
from .usage import UNPUBLISHED

CARD, PICTURE, HISTORY, RESULTS = "README.md", "learning_rates.png", "lr_history.csv", "all_results.json"
# Neither checkpoints, nor the optimizer's state, nor training_args.bin, which holds the token and paths, nor logs.
MODEL_FILES = re.compile(
    r"config\.json|preprocessor_config\.json|processor_config\.json|adapter_config\.json"
    r"|(adapter_)?model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
)
BESIDE_THE_MODEL = (CARD, PICTURE, HISTORY, RESULTS)
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors")
CONFIGURATIONS = ("config.json", "adapter_config.json")
# Of a checkpoint; the card is one that PEFT writes, and names the base model's folder.
LEFT_OUT = ("training_args.bin", CARD)


def publish(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
) -> CommitInfo:
    """Uploads a finished run to the Hub: weights, config, image processor, card, picture, rates and results.

    Args:
        folder (`str` or `os.PathLike`): Output folder of a run.
        repo_id (`str`): `user/name` on the Hub. Made if it is not there.
        token (`str`, *optional*): A token with write access; the one of `hf auth login` by default.
        private (`bool`, *optional*): Whether a repository made here is private.
        revision (`str`, *optional*): Branch to commit to. Made if it is not there.
        commit_message (`str`, *optional*): Message of the commit.

    Returns:
        `huggingface_hub.CommitInfo`: its `repo_url` is the model's address.

    Raises:
        FileNotFoundError: if the folder is not one of a finished run.
        ValueError: if the repository's name is not one, or a file would tell a path of this machine.
        PermissionError: if the token may not write there.
        ConnectionError: if the Hub did not take it all. The run is as it was, and the same call finishes the job.

    Example:

    ```python
    from metalr_hf.hub.publish import publish

    print(publish("runs/demo", "me/digits").repo_url)
    ```
    """
    folder = Path(folder)
    _check_run(folder)
    with telling_errors(repo_id, folder):
        api = hub_api(token)
        repo_id = prepare_repository(api, repo_id, private, revision)
        operations = list(_run_files(folder, repo_id))
        return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


def publish_checkpoint(
    api: HfApi, folder: Path, repo_id: str, path_in_repo: str | None, *, revision: str | None, commit_message: str
) -> CommitInfo:
    """Uploads the model of a checkpoint, and on demand all that is needed to resume from it on another machine.

    Args:
        api (`huggingface_hub.HfApi`): With the token.
        folder (`Path`): The checkpoint.
        repo_id (`str`): A repository that is there.
        path_in_repo (`str`, *optional*): Folder in the repository for the whole checkpoint; only the model by default.
        revision (`str`, *optional*): Branch to commit to.
        commit_message (`str`): Message of the commit.

    Returns:
        `huggingface_hub.CommitInfo`

    Raises:
        FileNotFoundError: if the checkpoint has been deleted.
    """
    with telling_errors(repo_id):
        operations = [_addition(path, path.name) for path in _model_files(folder)]
        for path in sorted(folder.rglob("*")) if path_in_repo else ():
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name not in LEFT_OUT:
                operations.append(_addition(path, f"{path_in_repo}/{name}"))
        if not operations:
            raise FileNotFoundError(
                f"{str(folder)!r} was deleted before its push began. With hub_always_push pushes wait for each other; "
                "a larger save_total_limit keeps checkpoints longer."
            )
        return api.create_commit(repo_id, operations, commit_message=commit_message, revision=revision)


def hub_api(token: str | None = None) -> HfApi:
    """The Hub's client, under this package's name.

    Args:
        token (`str`, *optional*): The one of `hf auth login` by default.

    Returns:
        `huggingface_hub.HfApi`
    """
    return HfApi(library_name="metalr_hf", library_version=__version__, token=token)


def prepare_repository(api: HfApi, repo_id: str, private: bool | None, revision: str | None) -> str:
    """Makes sure that a model can be committed.

    Args:
        api (`huggingface_hub.HfApi`): With the token.
        repo_id (`str`): `user/name`, or a name of the token's user.
        private (`bool`, *optional*): Whether a repository made here is private.
        revision (`str`, *optional*): Branch that is made if it is not there.

    Returns:
        `str`: `user/name`.
    """
    validate_repo_id(repo_id)
    if not (api.token or get_token()):
        raise LocalTokenNotFoundError("no token")
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    # create_repo does not fail for an existing repository of somebody else.
    api.auth_check(repo_id, write=True)
    if revision and revision != "main" and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def history_file(name: str) -> Path:
    """The learning rates of a run: its folder, its `lr_history.csv`, or a repository on the Hub.

    Args:
        name (`str`): Folder, file, or `user/name`.

    Returns:
        `Path`: the CSV file, for [`LRHistory.load`].

    Raises:
        FileNotFoundError: if there are none.

    Example:

    ```python
    >>> import tempfile
    >>> from pathlib import Path
    >>> from metalr_hf.hub.publish import history_file
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     (Path(folder) / "lr_history.csv").touch()
    ...     history_file(folder).name
    'lr_history.csv'

    ```
    """
    path = Path(name)
    file = path / HISTORY if path.is_dir() else path
    if file.is_file():
        return file
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        try:
            return Path(hub_api().hf_hub_download(name, HISTORY))
        except (HfHubHTTPError, HTTPError, OSError) as error:
            reason = " ".join(str(error).split())
            raise FileNotFoundError(
                f"{name!r} is no folder here, and has no {HISTORY} on the Hub that can be reached: {reason}"
            ) from error
    raise FileNotFoundError(
        f"{file} does not exist. Give the output folder of a finished run, the {HISTORY} in it, or user/name on the "
        "Hub."
    )


@contextmanager
def telling_errors(repo_id: str, folder: Path | None = None) -> Iterator[None]:
    """Turns errors of the Hub into errors that tell the user what to do.

    Args:
        repo_id (`str`): The repository's name.
        folder (`Path`, *optional*): Of the run that is being published.

    Raises:
        ValueError: if the name, or something in the files, is refused.
        PermissionError: if the token may not write there.
        ConnectionError: if the Hub could not be reached or failed.
    """
    name, again = f"repo_id={repo_id!r}", ""
    if folder is not None:
        command = shlex.join(["metalr-hf", "publish", str(folder), "--repo_id", repo_id])
        again = f" The run is whole, and `{command}` finishes the job."
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{name} is not a name on the Hub: {error}") from error
    except LocalTokenNotFoundError as error:
        raise PermissionError(
            f"{name}: not logged in to the Hub. Run `hf auth login`, or set HF_TOKEN.{again}"
        ) from error
    except (HfHubHTTPError, HTTPError, ConnectionError, RuntimeError) as error:
        raise _upload_error(name, again, error) from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _upload_error(name: str, again: str, error: BaseException) -> OSError:
    # A failed upload is a RuntimeError with its reason behind it.
    while error.__cause__ is not None and not isinstance(error, (HfHubHTTPError, HTTPError)):
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError):
        told = f"{type(error).__name__}: {_without_secrets(str(error))}".removesuffix(": ")
        return ConnectionError(f"{name}: the connection to the Hub broke off ({told}).{again}")
    status = error.response.status_code
    reason = _without_secrets(error.server_message or str(error).splitlines()[0])
    if status == 401:
        return PermissionError(f"{name}: the Hub does not know the token ({reason}). Run `hf auth login` again.{again}")
    if status in (402, 403, 404):
        return PermissionError(
            f"{name}: the Hub does not let this token write there, or its quota is used up ({reason}). Give a "
            f"repository of your own, or a token with write access.{again}"
        )
    return ConnectionError(f"{name}: the Hub answered {status} ({reason}).{again}")


def _without_secrets(text: str) -> str:
    # The query of an upload address contains a signature that lets anyone write there.
    return re.sub(r"hf_\w+|(?<=\S)\?\S+", "…", " ".join(text.split()))


def _check_run(folder: Path) -> None:
    weights, configuration = (any((folder / name).is_file() for name in names) for names in (WEIGHTS, CONFIGURATIONS))
    # The run of a module that has no configuration is known by its learning rates.
    if not weights or not (configuration or (folder / HISTORY).is_file()):
        raise FileNotFoundError(
            f"{str(folder)!r} is not the output folder of a finished run: it needs weights ({', '.join(WEIGHTS)}) "
            f"and a config.json or {HISTORY}. Give the --output_dir of the run."
        )
    if not (folder / CARD).is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} has a model, but no card ({CARD}). `metalr-hf train` writes one; in a script call "
            "trainer.create_model_card() after train(), or trainer.push_to_hub()."
        )


def _model_files(folder: Path) -> Iterator[Path]:
    names = sorted(os.listdir(folder)) if folder.is_dir() else []
    files = [folder / name for name in names if MODEL_FILES.fullmatch(name)]
    yield from files
    yield from sorted({file for path in files if path.suffix == ".json" for file in _code_files(path)})


def _code_files(configuration: Path) -> Iterator[Path]:
    """The files beside a configuration with the code of its classes; no others that happen to lie there."""
    content = _read_json(configuration)
    classes = content.get("auto_map") if isinstance(content, dict) else None
    for names in (classes or {}).values():
        for name in names if isinstance(names, list) else [names]:
            # Code in another repository, `user/name--module.Class`, has no file here.
            file = configuration.parent / f"{str(name).rsplit('.', 1)[0]}.py"
            if file.is_file():
                yield file
                yield from map(Path, get_relative_import_files(file))


def _run_files(folder: Path, repo_id: str) -> Iterator[CommitOperationAdd]:
    for path in _model_files(folder):
        yield _addition(path, path.name)
    for path in (folder / name for name in BESIDE_THE_MODEL):
        if path.name == CARD:
            card = path.read_text(encoding="utf-8").replace(UNPUBLISHED, repo_id)
            yield CommitOperationAdd(CARD, _checked(card, path).encode())
        elif path.is_file():
            yield _addition(path, path.name)


def _addition(path: Path, path_in_repo: str) -> CommitOperationAdd:
    if path.suffix != ".json":
        return CommitOperationAdd(path_in_repo, str(path))
    content = _read_json(path)
    if path.name == "trainer_state.json" and content.get("best_model_checkpoint"):
        content["best_model_checkpoint"] = Path(content["best_model_checkpoint"]).name
    text = json.dumps(_without_local_paths(content), indent=2, ensure_ascii=False)
    return CommitOperationAdd(path_in_repo, _checked(text, path).encode())


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not whole: {error}") from error


def _without_local_paths(content: Any) -> Any:
    """A configuration without the folders of this machine that a model was loaded from."""
    if isinstance(content, dict):
        return {key: _without_local_paths(value) for key, value in content.items() if not _is_local_path(key, value)}
    return [_without_local_paths(value) for value in content] if isinstance(content, list) else content


def _is_local_path(key: str, value: Any) -> bool:
    # A value under a number is a class name, which may equal the name of a folder.
    if not isinstance(value, str) or not value or key.isdigit():
        return False
    if key.endswith("_or_path"):
        return os.path.isabs(value) or os.path.exists(value)
    return os.path.isabs(value) and os.path.exists(value)


def _checked(text: str, path: Path) -> str:
    home = str(Path.home())
    if home != "/" and re.search(rf"{re.escape(home)}(?![\w-])", text):
        raise ValueError(
            f"{path} names your home folder ({home}), which is nobody else's business. Take it out, and publish again."
        )
    return text
