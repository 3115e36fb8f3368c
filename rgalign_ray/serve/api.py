"""What the service takes and returns, field by field; its OpenAPI document is made of these."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from rgalign_ray.logs import partitions

Id = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Text = Annotated[str, StringConstraints(max_length=4000)]
Scalar = str | bool | int | float | None
Path = Literal["store", "live", "null"]


def _moment(value: object) -> object:
    """Times are texts: a number might count seconds or milliseconds, of whatever day."""
    if not isinstance(value, str):
        return value
    try:
        return datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("is no time as in 2026-01-31T12:00:00Z") from None


def _utc(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        return moment
    try:
        return moment.astimezone(UTC).replace(tzinfo=None)
    except OverflowError:
        raise ValueError("is, in UTC, not within the years 1 to 9999") from None


def _region(region: str) -> str:
    if not partitions.fits(region):
        most, null = partitions.LONGEST, partitions.NULL
        raise ValueError(f"must have at most {most} bytes, percent-encoded, and not be {null}: logs name folders by it")
    return region


Moment = Annotated[datetime, BeforeValidator(_moment), AfterValidator(_utc)]
"""In UTC and without a zone, as logs hold it."""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True, use_attribute_docstrings=True)


class Event(Strict):
    """Something the user did before the entry."""

    event: Annotated[Id, Field(examples=["view_tracking"])]
    """Its name, as the log has it."""
    text: Text | None = None
    """Words that go with it, as a search or a chat line."""
    ts: Moment
    """When; UTC where no zone is given. Events after the session's own time are neither read nor kept."""


class Session(Strict):
    """The situation of a user as the chat opens."""

    user_id: Id
    region: Annotated[Id, AfterValidator(_region), Field(examples=["SG"])]
    """At most 240 bytes, percent-encoded: logs have a folder for each."""
    ts: Moment | None = None
    """Time of the entry; UTC where no zone is given, and now where none is."""
    history: Annotated[list[Event], Field(max_length=500)] = []
    """In any order."""
    features: Annotated[
        dict[str, Scalar | list[Scalar]], Field(examples=[{"order_tab": "To Receive", "order_status": "delayed"}])
    ] = {}
    """Columns of the log that the feature spec or the prompt reads; one that is left out counts as missing."""


class RankRequest(Strict):
    session: Session
    candidates: Annotated[list[Id], Field(min_length=1, max_length=10_000)] | None = None
    """Intents to choose from; none: the whole knowledge base."""
    k: Annotated[int, Field(ge=1, le=100)] = 3
    """How many to return."""
    path: Literal["auto"] | Path = "auto"
    """Force the way to the latent query, for tests; auto: the first of store, live and null that is there in time."""
    variant: Id | None = None
    """Ask one variant by name; none: the user's own."""
    explain: bool = False
    """Write the latent query down, on the live path (some hundred milliseconds on CPUs), and take scores apart."""
    request_id: Id | None = None
    """Comes back, and is what feedback names; none: one is made. An id is for one answer."""


class ScoreParts(Strict):
    """What a score is the sum of."""

    base_rate: float
    """How often the intent is clicked at all, as a logarithm."""
    user_item: float
    """What the user's features and history say, read linearly."""
    query_item: float
    """What the latent query says, read linearly."""
    fused: float
    """What all three say together."""


class RankedIntent(Strict):
    intent_id: str
    title: str
    score: float
    """The ranker's, comparable within one answer."""
    propensity: float
    """Probability that this intent was put at this place, given those above it; 1 without exploration."""
    parts: ScoreParts | None
    """With `explain`."""


class RankResponse(Strict):
    request_id: str
    intents: list[RankedIntent]
    """The best first."""
    latent_query: str | None
    """What the reasoner takes the user to be about to ask, where it was written down."""
    version: str
    """Of the pair that answered: reasoner and ranker."""
    variant: str
    """Its name."""
    path: Path
    """store: a vector kept for the user; live: the reasoner read the session; null: the ranker alone."""
    timings_ms: dict[str, float]
    """Milliseconds by stage: read, reasoner, ranker, total."""


class BatchRequest(Strict):
    requests: Annotated[list[RankRequest], Field(min_length=1, max_length=256)]


class BatchResponse(Strict):
    responses: list[RankResponse]
    """In the order of the requests."""


class FeedbackRequest(Strict):
    """What became of an answer. Of several on one answer, what any of them says counts."""

    request_id: Id
    """Of the answer."""
    seen: Annotated[int, Field(ge=0, le=100)] | None = None
    """How many of its intents the user was shown, from the top; none: all."""
    clicks: Annotated[list[Id], Field(max_length=100)] = []
    """Intents that were clicked."""
    resolved: Annotated[list[Id], Field(max_length=100)] = []
    """Intents whose answer was what the user had needed."""


class FeedbackResponse(Strict):
    request_id: str
    """What was told of it is on the disk."""


class RefreshRequest(Strict):
    session: Session
    """The user's situation as it is now, after an order's event, say."""


class RefreshResponse(Strict):
    variants: list[str]
    """Those whose vector of the user is new."""


class ForgetResponse(Strict):
    answers: int
    """Kept answers that are removed, with what was told of them."""


class ServedVersion(Strict):
    name: str
    """Of the variant."""
    share: float
    """Of the users, that it answers."""
    version: str
    reasoner: str
    ranker: str
    round: int
    """Of the run it comes from; 0 is the frozen reasoner."""
    intents: int
    features: list[str]
    """Columns that a session may give."""
    read: list[str]
    """Of them, those that the reasoner reads."""


class Served(Strict):
    variants: list[ServedVersion]
    refused: str | None
    """Why what was to follow them was not taken; none where all was."""


class Counted(Strict):
    """What a gateway has done since it started."""

    answers: dict[str, dict[str, int]]
    """By variant and path."""
    others: dict[str, int]
    """feedback, overload, fallbacks and lost_answers, with their reasons."""
    total_ms: dict[str, float]
    """p50 and p99 of the last answers."""


class Example(Strict):
    name: str
    session: Session


class Refusal(Strict):
    """What is wrong with a request, and where."""

    field: str
    """As in session.features.hour; empty where it is no field."""
    message: str


def now() -> datetime:
    """In UTC and without a zone, as logs hold it."""
    return datetime.now(UTC).replace(tzinfo=None)
