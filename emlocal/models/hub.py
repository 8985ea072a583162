"""Models of the Hugging Face hub: lists a repository's files, finds cached ones, downloads and removes them.

The hub's own cache is the store, so files are shared with llama.cpp, mlx-lm and transformers. HF_HOME,
HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE have the same meaning as there. Cached files are used without a
request.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from emlocal.errors import EmlocalError, ModelError, WrongNameError
from emlocal.files import Progress, check_space, disk_errors
from emlocal.models.folder import weight_files
from emlocal.models.gguf import shard_paths

# The order in which quantizations are tried by default. Q4_K_M is also llama.cpp's default for -hf.
DEFAULT_QUANTS = (
    *("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "IQ4_XS", "IQ4_NL", "Q5_K_M", "Q5_K_S", "Q5_0", "Q6_K", "Q8_0"),
    *("MXFP4", "BF16", "F16", "F32"),
)
REQUEST_SECONDS = 15.0
STALE_SECONDS = 24 * 3600.0  # a part that nobody wrote to for this long belongs to no running download

_QUANT = re.compile(
    r"(?<![A-Z0-9])(?:UD-)?(?:I?Q[1-8](?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4(?:_MOE)?|NVFP4|BF16|FP?16|FP?32)(?![A-Z0-9])"
)


def quant_of(file: str) -> str:
    """Returns the quantization in a file's name, in capitals ("Q4_K_M"); "" if there is none."""
    found = _QUANT.findall(file.upper())
    return found[-1].replace("FP16", "F16").replace("FP32", "F32") if found else ""


def models_among(files: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Returns the models in a list of files: first file -> all its files (shards).

    Projectors do not count.
    """
    ggufs = {f for f in files if f.lower().endswith(".gguf") and f.isprintable()}
    names = {f for f in ggufs if not re.search(r"mmproj|imatrix", f.lower())}
    models = {}
    for name in sorted(names):
        shards = tuple(p.as_posix() for p in shard_paths(Path(name)))
        if shards[0] == name and names.issuperset(shards):
            models[name] = shards
    return models


def choose(repo: str, files: Iterable[str], wanted: str | None) -> tuple[str, ...]:
    """Returns the files of one model. `wanted` is a quantization, a file's name, or None for the default.

    If none or more than one fits, raises ModelError with a list of the models.
    """
    models = models_among(files)
    if not models:
        torch = " (the torch engine runs it: --backend torch)" if weight_files(files) else ""
        raise WrongNameError(
            f"{repo} has no GGUF model",
            hint=f"use a repository whose name ends in -GGUF, or list models: emlocal models list{torch}",
        )
    if wanted and wanted.lower().endswith(".gguf"):
        found = [shards for shards in models.values() if wanted in shards]
    elif wanted:
        asked = wanted.upper()
        plain = asked.removeprefix(
            "UD-"
        )  # Unsloth's dynamic quantizations, which can be named without the prefix
        found = [shards for first, shards in models.items() if quant_of(first).removeprefix("UD-") == plain]
        found = [shards for shards in found if quant_of(shards[0]) == asked] or found
    else:
        found = _default_among(models)
    if len(found) == 1:
        return found[0]
    quants = [quant_of(first) for first in models]
    unique = all(quants) and len(set(quants)) == len(quants)
    what = f"{repo} has {'more than one' if found else 'no'} {wanted or 'model of a default quantisation'}"
    raise WrongNameError(
        f"{what}; it has {', '.join(sorted(quants if unique else models))}",
        hint=f"name one of them: {repo}:{(quants if unique else list(models))[0]}",
    )


def _default_among(models: dict[str, tuple[str, ...]]) -> list[tuple[str, ...]]:
    if len(models) == 1:
        return list(models.values())
    for quant in DEFAULT_QUANTS:
        found = [shards for first, shards in models.items() if quant_of(first) == quant]
        if found:
            return found
    return []


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def cached_repos() -> list[str]:
    """Returns the repositories of models in the cache, whatever they contain."""
    folders = _cache().glob("models--*--*/")
    return sorted(f.name.removeprefix("models--").replace("--", "/") for f in folders)


def cached_files(repo: str) -> dict[str, Path]:
    """Returns the files of the newest cached snapshot: name in the repository -> path. Makes no request."""
    from huggingface_hub.file_download import repo_folder_name

    folder = _cache() / repo_folder_name(repo_id=repo, repo_type="model")
    reference = folder / "refs" / "main"
    if not reference.is_file():
        return {}
    snapshot = folder / "snapshots" / reference.read_text("ascii", "replace").strip()
    # is_file() is false for a link whose blob is gone
    return {p.relative_to(snapshot).as_posix(): p for p in snapshot.rglob("*") if p.is_file()}


def remote_files(repo: str) -> dict[str, int]:
    """Returns the repository's files on the hub with their sizes in bytes (0: unknown). One request."""
    from huggingface_hub import HfApi

    with disk_errors(_cache(), "HF_HOME"), hub_errors(repo):  # a token is read from HF_HOME
        info = HfApi().model_info(repo, files_metadata=True, timeout=REQUEST_SECONDS)
    return {s.rfilename: s.size or 0 for s in info.siblings or []}


def download(repo: str, sizes: dict[str, int], progress: Progress) -> list[Path]:
    """Downloads files of a repository into the cache; `sizes` are in bytes. Raises ModelError in one line."""
    from huggingface_hub import hf_hub_download

    cache, cached = _cache(), cached_files(repo)
    label, total = f"fetching {repo}", sum(sizes.values())
    needed = sum(size for name, size in sizes.items() if name not in cached)
    paths, before = [], 0
    with disk_errors(cache, "HF_HOME"):
        _remove_stale_parts(cache, repo)
        check_space(cache, needed, repo)
        for name, size in sizes.items():
            bar = _bar_class(partial(_report_sum, progress, label, before, total))
            with hub_errors(repo):
                paths.append(Path(hf_hub_download(repo, name, tqdm_class=bar)))
            before += size
    return paths


def _remove_stale_parts(cache: Path, repo: str) -> None:
    """Deletes partial files of killed downloads, which huggingface_hub neither uses nor finds again."""
    from huggingface_hub.file_download import repo_folder_name

    blobs = cache / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    for part in blobs.glob("*.incomplete"):
        if time.time() - part.stat().st_mtime > STALE_SECONDS:
            part.unlink(missing_ok=True)


def _report_sum(progress: Progress, label: str, before: int, total: int, done: int) -> None:
    """Reports the progress over all files of a download; files that are done have `before` bytes."""
    progress(label, before + done, total or None)


def _bar_class(report: Callable[[int], None]) -> type:
    """Returns a progress bar class for huggingface_hub: it prints nothing and reports the bytes done."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]
            self.done = 0

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            report(self.done)

        def update_transfer(self, n: float) -> None:
            """Counts bytes on the wire. Its existence tells Xet downloads to use one bar, not two."""

    return Bar


def remove(repo: str) -> tuple[int, int]:
    """Deletes all cached revisions of a repository; returns the number of files and bytes deleted."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    cache = _cache()
    with disk_errors(cache, "HF_HOME"):
        try:
            info = scan_cache_dir(cache)
        except CacheNotFound:
            return 0, 0
        repos = [r for r in info.repos if r.repo_id == repo and r.repo_type == "model"]
        info.delete_revisions(*(rev.commit_hash for r in repos for rev in r.revisions)).execute()
    return sum(r.nb_files for r in repos), sum(r.size_on_disk for r in repos)


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turns huggingface_hub's errors about `repo` into one line each. Disk errors pass through."""
    from huggingface_hub import constants, errors

    # The root of the errors of a lost connection: from httpx in huggingface_hub 1, from httpx2 in 2.
    transport_error: type[BaseException] = errors.HfHubHTTPError.__bases__[0]
    hub = constants.ENDPOINT.removeprefix("https://")
    offline_hint = "use a model that is on this machine: emlocal models list"
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: its owner requires you to accept its licence",
            hint=f"accept it at {constants.ENDPOINT}/{repo}, then log in: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WrongNameError(
            f"{hub} has no model {repo}, or it is private",
            hint="check the name (emlocal models list); for a private model log in: hf auth login",
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise ModelError(
            f"{repo} is not on this machine, and HF_HUB_OFFLINE is set", hint=offline_hint
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise ModelError(f"cannot reach {hub} to fetch {repo}", hint=offline_hint) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(
            f"{repo} no longer has that file", hint=f"see its files: {constants.ENDPOINT}/{repo}"
        ) from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise ModelError(
            f"{hub} answered {status} for {repo}",
            hint="log in: hf auth login" if status in (401, 403) else "try again later",
        ) from error
    except errors.HFValidationError as error:
        raise WrongNameError(
            f"{repo} is not a valid model name", hint="list the models: emlocal models list"
        ) from error
    except transport_error as error:
        why = str(error) or type(error).__name__
        raise ModelError(f"cannot reach {hub} for {repo}: {why}", hint=offline_hint) from error
    except OSError as error:
        if error.errno is not None:
            raise
        # huggingface_hub's own error for fewer bytes than announced
        raise ModelError(
            f"the download of {repo} was interrupted", hint="try again; partial files are not kept"
        ) from error


def hub_rows(
    name: str, split: str, limit: int | None = None, config: str | None = None
) -> list[Mapping[str, Any]]:
    """Returns the first rows of ORG/NAME's split.

    Raises EmlocalError if the package is missing, or if the hub or the dataset is not available.
    """
    try:
        from datasets import load_dataset
    except ImportError as why:
        raise EmlocalError(
            f"there is no file {name}, and the hub's data sets need the package datasets",
            "pip install datasets",
        ) from why
    try:
        rows: Iterable[Mapping[str, Any]] = load_dataset(name, config, split=split, streaming=True)
        return list(islice(rows, limit))
    except (OSError, ValueError, RuntimeError) as why:  # what the package raises for names and networks
        said = str(why).splitlines()[0][:200] if str(why) else type(why).__name__
        raise EmlocalError(f"the dataset {name}:{split} cannot be read: {said}") from why
