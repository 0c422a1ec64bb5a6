"""Addresses of the broker taken apart and put together again. Pure."""

from __future__ import annotations

from urllib.parse import quote, urlsplit


def with_user(url: str, username: str, secret: str) -> str:
    """The address with who connects."""
    parts = urlsplit(url)
    user = f"{quote(username, safe='')}:{quote(secret, safe='')}"
    return parts._replace(netloc=f"{user}@{parts.netloc.rpartition('@')[2]}").geturl()


def without_user(url: str) -> str:
    """The address alone, fit to be shown."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def in_vhost(url: str, vhost: str) -> str:
    """The address of another vhost of the same broker."""
    return urlsplit(url)._replace(path="/" + quote(vhost, safe="")).geturl()
