"""A tokenizer process: answers questions on its standard input, one at a time, under limits of its own.

Tokenizers and templates are other people's code and data. Here they may use so much memory and processor time, write no file and
open few; the parent kills the process when an answer takes too long. It holds no secret, has no network use, and ends with its
parent: at the end of its input, or when its processor time for one question is used up.

Usage: python -m shared.inference.tokenizer_child STORE CPU_S MEMORY_BYTES
"""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary

from shared.inference.tokenization import (
    LoadedTokenizer,
    TokenizationRefused,
    digest_of_files,
    load_tokenizer,
)
from shared.inference.tokenizer_protocol import (
    LENGTH,
    MAX_FRAME_BYTES,
    MODEL_UNREADABLE,
    TOKENIZER_FAILED,
    Answer,
    AnyQuestion,
    Decode,
    Done,
    EncodeChat,
    EncodeChats,
    EncodeTexts,
    EncodeWords,
    Load,
    Refused,
    Spellings,
    SpellTokens,
    Texts,
    Tokens,
    Unload,
    frame,
    question_decoder,
)

MAX_OPEN_FILES = 64


class Child:
    def __init__(self, store: Path) -> None:
        self._store = store.resolve()
        self._loaded: dict[str, LoadedTokenizer] = {}
        self._by_files: WeakValueDictionary[bytes, LoadedTokenizer] = WeakValueDictionary()

    def answer(self, question: AnyQuestion) -> Answer:
        try:
            return self._answer(question)
        except TokenizationRefused as refusal:
            return Refused(refusal.code, refusal.message)
        except BaseException as error:
            if not _is_the_librarys_own(error):
                raise
            return Refused(MODEL_UNREADABLE if isinstance(question, Load) else TOKENIZER_FAILED, "it failed")

    def _answer(self, question: AnyQuestion) -> Answer:
        match question:
            case Load(folder):
                self._loaded[folder] = self._load(self._path(folder))
                return Done()
            case Unload(folder):
                self._loaded.pop(folder, None)
                return Done()
            case EncodeTexts(folder, texts):
                loaded = self._loaded[folder]
                return Tokens([loaded.encode_text(text) for text in texts])
            case EncodeWords(folder, words):
                loaded = self._loaded[folder]
                return Tokens([ids for word in words for ids in loaded.encode_word(word)])
            case EncodeChat(folder, messages):
                return Tokens([self._loaded[folder].encode_chat(messages)])
            case EncodeChats(folder, conversations):
                loaded = self._loaded[folder]
                return Tokens([loaded.encode_chat(messages) for messages in conversations])
            case Decode(folder, token_lists):
                loaded = self._loaded[folder]
                return Texts([loaded.decode(tokens) for tokens in token_lists])
            case SpellTokens(folder, tokens):
                loaded = self._loaded[folder]
                return Spellings([loaded.spell(token) for token in tokens])

    def _load(self, path: Path) -> LoadedTokenizer:
        """Fine-tunes mostly have their base's files: equal ones are read as a tokenizer once, which takes a third of a second."""
        digest = digest_of_files(path)
        found = self._by_files.get(digest)
        if found is None:
            found = self._by_files[digest] = load_tokenizer(path)
        return found

    def _path(self, folder: str) -> Path:
        path = (self._store / folder).resolve()
        if not path.is_relative_to(self._store) or not path.is_dir():
            raise TokenizationRefused(MODEL_UNREADABLE, "no such folder in the model store")
        return path


def _is_the_librarys_own(error: BaseException) -> bool:
    """Whether `tokenizers` itself gave up: a bare Exception, or a panic, e.g. a regular expression that ran too long.

    It would do so again with the same text, so the client must hear a refusal and not "try again".
    """
    return type(error) is Exception or type(error).__name__ == "PanicException"


def serve(child: Child, source: BinaryIO, sink: BinaryIO, cpu_s: int) -> None:
    while True:
        header = source.read(LENGTH.size)
        if len(header) < LENGTH.size:
            return
        (size,) = LENGTH.unpack(header)
        if size > MAX_FRAME_BYTES:
            raise ValueError("question too long")
        question = question_decoder.decode(source.read(size))
        allow_cpu(cpu_s)
        sink.write(frame(child.answer(question)))
        sink.flush()


def allow_cpu(seconds: int) -> None:
    """Let this process use so much more processor time from now on; past it the kernel ends it (SIGXCPU)."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))


def main(store: str, cpu_s: str, memory_bytes: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_OPEN_FILES, MAX_OPEN_FILES))
    serve(Child(Path(store)), sys.stdin.buffer, sys.stdout.buffer, int(cpu_s))


if __name__ == "__main__":
    main(*sys.argv[1:])
