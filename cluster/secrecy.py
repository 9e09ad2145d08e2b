"""What in a configuration is a secret, so that it can be refused there.

A configuration is printed, sent to Serve, shown on its dashboard and kept in a repository. Secrets come from the environment of
the command that starts a node, or from files that the libraries read themselves. Caller: `config`.
"""

from __future__ import annotations

import re
from urllib.parse import parse_qs, urlsplit

# Endings of the names that libraries give to variables with a secret in them; `..._FILE` and `..._PATH` name a file and are fine.
NAME = re.compile(r"(^|_)(TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS)$")
HOW = "set it in the environment of the command that starts the node, or in the file that the library reads"
HOW_DATABASE = "and give it as PGPASSFILE or PGPASSWORD in the environment of the command that starts the head"


def names_secret(variable: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return NAME.search(variable.upper()) is not None


def in_url(url: str) -> bool:
    """Whether a database URL holds a password, before the host or as a parameter."""
    try:
        parts = urlsplit(url)
    except ValueError:  # not an address at all; who opens it says so
        return False
    return bool(parts.password) or any("password" in name.lower() for name in parse_qs(parts.query))
