"""The process environment of a run; set before ray is imported, since ray reads some of it then.

This module imports no ray. Processes that a local Ray starts inherit it; workers of a cluster get
`for_workers` with the job.
"""

from __future__ import annotations

import os
import secrets
from importlib import resources
from pathlib import Path

from rgalign_ray.config import Config

PASSED_ON = ("RGALIGN_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_OFFLINE")
"""What the user's environment says and every worker must hear."""

WORKERS = {
    # who asked for no GPU sees none, as the plan says; Ray lets such workers see all of a machine's
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
}

LOCAL = {
    # nobody drains the only node, and prints of a worker need not be logged as well
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # several workers share the cores: one thread each is faster than all threads each, and repeatable
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}


def prepare(config: Config) -> None:
    """Sets what this process and a Ray that it starts should run under; the user's own settings stand.

    Ray knows two modes of authentication, `disabled` and `token`. Its GCS and its workers listen on every
    interface, so `disabled` would let anyone on the network run code here. Left to itself Ray writes a
    token, readable by all, into the home folder; a token in the environment reaches Ray's own processes
    and leaves nothing behind. With an address given, the cluster decides.
    """
    defaults = dict(WORKERS)
    if config.cluster.address is None:
        defaults |= LOCAL
        defaults["RAY_DATA_LOGGING_CONFIG"] = str(resources.files("rgalign_ray") / "configs/logging/ray_data.yaml")
        if config.learner.use_gpu:
            defaults["DS_ACCELERATOR"] = "cuda"
        if "RAY_AUTH_MODE" not in os.environ:
            if "RAY_AUTH_TOKEN_PATH" in os.environ:
                ensure_token()
            else:
                defaults |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def ensure_token() -> None:
    """Sets token mode for this process and those it starts, with the user's token, which is made when there is none.

    It lies where Ray looks for it, in $RAY_AUTH_TOKEN, $RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token; made here, only the
    user may read it.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] != "token" or "RAY_AUTH_TOKEN" in os.environ:
        return
    place = _token_path()
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))


def use_token_if_present() -> None:
    """Shows the user's token, where there is one, to clusters that this process talks to."""
    if "RAY_AUTH_TOKEN" in os.environ or _token_path().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def _token_path() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def for_workers() -> dict[str, str]:
    """Environment variables of the workers of a cluster that somebody else started."""
    return WORKERS | {name: os.environ[name] for name in PASSED_ON if name in os.environ}
