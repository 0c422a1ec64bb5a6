"""Properties that the AMQP library gives up at are read; in a process of its own, as it is this that the library is changed for."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import ROOT

PROGRAM = """
import time
from pamqp import commands, header
from shared.amqp_decoding import read_whatever_comes

def read(flags, data):
    found = header.ContentHeader()
    found.unmarshal(bytes.fromhex("003c0000") + bytes(8) + flags.to_bytes(2, "big") + data)
    return found.properties

def fails(flags, data):
    try:
        read(flags, data)
    except Exception:
        return True
    return False

def table(entries):
    return len(entries).to_bytes(4, "big") + entries

HEADERS, MODE, REPLY_TO, TIMESTAMP = 1 << 13, 1 << 12, 1 << 9, 1 << 6
deep = b""
for _ in range(2000):
    deep = b"\\x00F" + table(deep)
good = (HEADERS | MODE | REPLY_TO | TIMESTAMP, table(b"\\x01aS" + table(b"b")) + b"\\x02" + b"\\x01q" + bytes(7) + b"\\x01")
bad = {
    "text": (REPLY_TO, b"\\x03q\\xff\\xfe"),
    "date": (REPLY_TO | TIMESTAMP, b"\\x01q" + b"\\xff" * 8),
    "name": (HEADERS | REPLY_TO, table(b"\\x01\\xffV") + b"\\x01q"),
    "deep": (HEADERS | REPLY_TO, table(deep) + b"\\x01q"),
}
before = read(*good)
assert [name for name, each in bad.items() if not fails(*each)] == [], "the library reads them now: this is not needed"
for _ in range(2):
    read_whatever_comes()
after = read(*good)
assert before == after and after.headers == {"a": "b"} and after.delivery_mode == 2 and after.timestamp is not None
for name, each in bad.items():
    found = read(*each)
    assert (found.reply_to, found.headers or None, found.timestamp) == ("q", None, None), name
assert read(MODE | REPLY_TO, b"\\x07\\x01q").delivery_mode is None
many = table(b"\\x01kV" * 40_000)
found = read(HEADERS | REPLY_TO, many + b"\\x01q")
assert found.headers == {} and found.reply_to == "q"
"""


def test_what_cannot_be_read_is_left_out_and_the_rest_is_as_ever() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
