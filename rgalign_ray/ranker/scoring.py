"""Ranker artefacts: weights as safetensors beside `ranker.json`, and scores from a loaded one."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from rgalign_ray import config, storage
from rgalign_ray.config.base import sentence
from rgalign_ray.errors import DataError
from rgalign_ray.logs.features import FeatureSpace, FeatureSpec
from rgalign_ray.ranker.base import Ranker
from rgalign_ray.ranker.batches import SCORE_BATCH, score_rows
from rgalign_ray.ranker.embeddings import Embeddings
from rgalign_ray.ranker.models import MODELS
from rgalign_ray.ranker.rows import with_embeddings
from rgalign_ray.ranker.sizes import Sizes

WEIGHTS = "weights.safetensors"
META = "ranker.json"


class Meta(BaseModel):
    """What a ranker is and what it may read."""

    model_config = ConfigDict(extra="forbid")

    kind: str
    settings: config.Ranker
    sizes: dict[str, int]
    space: dict[str, Any]
    """`FeatureSpace.to_dict`."""
    space_version: str
    intent_ids: list[str]
    """The catalogue's ids by index."""
    reasoner_version: str | None
    """Of the session embeddings it was trained on; None for a ranker that reads none."""
    seed: int
    figures: dict[str, Any] = {}
    version: str = ""
    """Hash of the weights, filled in by `save`."""

    @property
    def feature_spec(self) -> FeatureSpec:
        return FeatureSpec.model_validate(self.space["spec"])


@dataclass(frozen=True)
class LoadedRanker:
    """A frozen ranker in memory, in evaluation mode."""

    model: Ranker
    space: FeatureSpace
    meta: Meta

    def require(
        self,
        *,
        reasoner_version: str | None = None,
        space_version: str | None = None,
        intent_ids: list[str] | None = None,
    ) -> None:
        """Checks that inputs are of the versions this ranker was trained on; None is not checked.

        Raises:
            DataError: with both versions.
        """
        meta = self.meta
        if reasoner_version is not None and reasoner_version != meta.reasoner_version:
            raise DataError(
                f"embeddings are of reasoner '{reasoner_version}', but ranker {meta.version} was trained on "
                f"'{meta.reasoner_version}'; encode with that version or train a ranker on this one."
            )
        if space_version is not None and space_version != meta.space_version:
            raise DataError(
                f"features are of space '{space_version}', but ranker {meta.version} was trained on "
                f"'{meta.space_version}'; transform sessions with the space stored in its {META}."
            )
        if intent_ids is not None and intent_ids != meta.intent_ids:
            raise DataError(
                f"the catalogue has {len(intent_ids)} intents that differ from the {len(meta.intent_ids)} that ranker "
                f"{meta.version} was trained on; train it on this catalogue."
            )


def save(model: Ranker, uri: str, meta: Meta) -> Meta:
    """Writes the two files into folder `uri`; returns `meta` with its version."""
    weights = save_tensors({name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()})
    meta = meta.model_copy(update={"version": _version(weights)})
    storage.write_bytes(storage.join(uri, WEIGHTS), weights)
    storage.write_json(storage.join(uri, META), meta.model_dump())
    return meta


def load_meta(uri: str) -> Meta:
    """What the ranker of an artefact is, without its weights.

    Raises:
        DataError: where there is no ranker, or one that another version of this package made with other settings.
    """
    if not storage.exists(storage.join(uri, META)):
        raise DataError(f"{uri}: no {META} here, so this is not a ranker.")
    try:
        return Meta.model_validate(storage.read_json(storage.join(uri, META)))
    except ValidationError as error:
        raise DataError(f"{uri}: made by another version; train the ranker again. {sentence(error, Meta)}") from None


def load(uri: str, rank_by: config.RankBy = "log") -> LoadedRanker:
    """The ranker of an artefact, frozen.

    Args:
        rank_by: what its scores are for. log: as trained, which intent is shown and clicked. click: which is clicked if
            shown.

    Raises:
        DataError: where there is no ranker, its weights or feature space are not of the version it names, or its model
            had other weights when it was saved.
    """
    meta = load_meta(uri)
    fs, path = storage.filesystem(storage.join(uri, WEIGHTS))
    with fs.open_input_stream(path) as stream:
        weights = stream.read()
    space = FeatureSpace.from_dict(meta.space)
    named = {WEIGHTS: (_version(weights), meta.version), "the feature space": (space.version, meta.space_version)}
    for what, (found, wanted) in named.items():
        if found != wanted:
            raise DataError(f"{uri}: {what} is of version {found}, but {META} names {wanted}; train the ranker again.")
    model = MODELS[meta.kind](Sizes(**meta.sizes), meta.settings)
    try:
        model.load_state_dict(load_tensors(weights))
    except RuntimeError:  # torch names every tensor that is missing, or of another shape
        raise DataError(f"{uri}: its weights are of another version of {meta.kind}; train the ranker again.") from None
    if rank_by == "click":
        model.rank()
    return LoadedRanker(model.eval().requires_grad_(False), space, meta)


def score_sessions(
    ranker: LoadedRanker,
    examples: dict[str, Any],
    *,
    space_version: str,
    readout: str = "prompt",
    embeddings: Embeddings | None = None,
    batch_size: int = SCORE_BATCH,
) -> np.ndarray:
    """Scores of sessions.

    Args:
        examples: as `logs.examples.examples` makes them.
        space_version: version of the feature space that made them.
        readout: null, prompt or query; a session without e(x,q) is read through e(x), one without either
            through the null query.
        embeddings: of the reasoner version the ranker was trained on; None reads the null query.

    Returns:
        float32 [B, C], -inf where candidates are padded.

    Raises:
        DataError: for features or embeddings of another version.
    """
    if not ranker.model.reads_queries:
        embeddings = None
    ranker.require(space_version=space_version, reasoner_version=embeddings.reasoner_version if embeddings else None)
    rows = with_embeddings(examples, embeddings)
    return score_rows(ranker.model, rows, readout, batch=batch_size)


def meta_of(
    model: Ranker,
    *,
    space: dict[str, Any],
    intent_ids: list[str],
    reasoner_version: str | None,
    seed: int,
    figures: dict[str, Any],
) -> Meta:
    """The description of a trained model, ready for `save`."""
    return Meta(
        kind=model.kind,
        settings=model.settings,
        sizes=asdict(model.sizes),
        space=space,
        space_version=FeatureSpace.from_dict(space).version,
        intent_ids=intent_ids,
        reasoner_version=reasoner_version if model.reads_queries else None,
        seed=seed,
        figures=figures,
    )


def _version(weights: bytes) -> str:
    return hashlib.sha256(weights).hexdigest()[:16]
