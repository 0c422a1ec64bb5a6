"""What the gateway and its tokenizer processes say to each other: frames of a length and JSON, one answer per question."""

from __future__ import annotations

import struct

import msgspec

LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 64 * 1024 * 1024
"""Above the largest answer: a body of 1 MiB has at most as many tokens, of at most eight characters each."""

# What a child says no to. Everything else that goes wrong there ends the child.
MODEL_UNREADABLE = "model_unreadable"
NO_CHAT_TEMPLATE = "no_chat_template"
TEMPLATE_REFUSED = "template_refused"
CONTROL_TOKEN = "control_token"
NO_TOKENS = "no_tokens"
TOKENIZER_FAILED = "tokenizer_failed"


class Question(msgspec.Struct, frozen=True, tag_field="op"):
    """`folder` is below the model store; the model must have been loaded."""

    folder: str


class Load(Question, frozen=True, tag="load"):
    pass


class Unload(Question, frozen=True, tag="unload"):
    pass


class EncodeTexts(Question, frozen=True, tag="encode_texts"):
    texts: list[str]


class EncodeWords(Question, frozen=True, tag="encode_words"):
    """Answered by all spellings of all words."""

    words: list[str]


class EncodeChat(Question, frozen=True, tag="encode_chat"):
    messages: list[dict[str, str]]


class EncodeChats(Question, frozen=True, tag="encode_chats"):
    """Many conversations at once: a question for each would cost more than its answer."""

    conversations: list[list[dict[str, str]]]


class Decode(Question, frozen=True, tag="decode"):
    token_lists: list[list[int]]


class SpellTokens(Question, frozen=True, tag="spell_tokens"):
    tokens: list[int]


class Tokens(msgspec.Struct, frozen=True, tag_field="op", tag="tokens"):
    token_lists: list[list[int]]


class Texts(msgspec.Struct, frozen=True, tag_field="op", tag="texts"):
    texts: list[str]


class Spellings(msgspec.Struct, frozen=True, tag_field="op", tag="spellings"):
    """The bytes that each token stands for; a character may need several tokens."""

    spellings: list[bytes]


class Done(msgspec.Struct, frozen=True, tag_field="op", tag="done"):
    pass


class Refused(msgspec.Struct, frozen=True, tag_field="op", tag="refused"):
    """`message` comes from the model's own template or files, shortened."""

    code: str
    message: str


AnyQuestion = Load | Unload | EncodeTexts | EncodeWords | EncodeChat | EncodeChats | Decode | SpellTokens
Answer = Tokens | Texts | Spellings | Done | Refused

encoder = msgspec.json.Encoder()
question_decoder: msgspec.json.Decoder[AnyQuestion] = msgspec.json.Decoder(AnyQuestion)
answer_decoder: msgspec.json.Decoder[Answer] = msgspec.json.Decoder(Answer)


def frame(message: AnyQuestion | Answer) -> bytes:
    body = encoder.encode(message)
    return LENGTH.pack(len(body)) + body
