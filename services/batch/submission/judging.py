"""What a team's message comes to, before any table is asked. Pure.

1. Without reply_to there is nobody to answer -> missing_reply_to.
2. One that is no reply queue of the team's own users -> foreign_reply_to. So nobody is sent what another asked for, and
   an answer never leaves the team.
3. What the format refuses -> its code (`shared/queue_format.py`).
4. Lines are judged as those of a file are; one that is wrong refuses the message, which keeps nothing -> invalid_lines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from services.batch.input_lines import MAX_LINE_BYTES, FileCheck, FileLine, InputLine
from services.batch.submission.provisioning import Credential
from shared.queue_format import Refusal, Submission, read_submission
from shared.topology import TeamNames

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_decode_line = msgspec.json.Decoder(InputLine).decode


@dataclass(frozen=True, slots=True)
class Team:
    """Whose message it is: known from the queue that it lay in, whatever it says. users: by reply queue."""

    team_id: str
    tag: str
    users: Mapping[str, Credential] = field(default_factory=dict)

    @property
    def names(self) -> TeamNames:
        return TeamNames(self.tag)


@dataclass(frozen=True, slots=True)
class Judged:
    """A message that can be kept. lines: by place in the message, with their ids and texts."""

    submission: Submission
    digest: bytes
    user: Credential
    reply_queue: str
    endpoint: str
    model: str
    lines: tuple[tuple[str, bytes], ...]

    @property
    def size_bytes(self) -> int:
        return sum(len(text) for _, text in self.lines)


def judge(body: bytes, reply_to: str | None, team: Team) -> Judged | Refusal:
    """Read a message of this team's."""
    found = read_submission(body)
    known = found.id
    if not reply_to:  # 1
        return Refusal("missing_reply_to", "The message has no reply_to.", known)
    user = team.users.get(reply_to)
    if user is None:  # 2
        message = "reply_to is not the reply queue of one of the team's own credentials."
        return Refusal("foreign_reply_to", message, known)
    if isinstance(found, Refusal):  # 3
        return found
    texts = [bytes(line) for line in found.lines]
    check = FileCheck(_endpoint(texts[0]))
    for number, text in enumerate(texts, start=1):
        check.add(FileLine(number, 0, len(text), text if len(text) <= MAX_LINE_BYTES else None))
    if check.problems:  # 4
        errors = tuple(
            {"code": each.code, "message": each.message, "line": each.line, "param": each.param}
            for each in check.problems
        )
        return Refusal("invalid_lines", "Nothing of the message was kept: see errors.", known, errors)
    assert check.model is not None
    lines = tuple((each.custom_id, text) for each, text in zip(check.accepted, texts, strict=True))
    digest = hashlib.sha256(body).digest()
    return Judged(found, digest, user, reply_to, check.endpoint, check.model, lines)


def _endpoint(first: bytes) -> str:
    """All lines have to name the same: what the first one says, if that is one."""
    try:
        url = _decode_line(first).url
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ENDPOINTS[0]
    return url if url in ENDPOINTS else ENDPOINTS[0]
