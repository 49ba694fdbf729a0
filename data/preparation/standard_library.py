"""The embedded corpus: source code and documentation of Python's standard library, about ten megabytes on every machine with Python."""

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

from data.command_line import UserError

# Folders that are left out: tests and their data, character set tables, other people's packages, compiled files.
_EXCLUDED_FOLDERS = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages", "lib-dynload", "__pycache__"}
# Files that are left out: tables (entities, stringprep, _casefix), and files that differ from machine to machine (build settings, a site's
# own start-up).
_EXCLUDED_FILES = (
    "html/entities.py",
    "stringprep.py",
    "re/_casefix.py",
    "_sysconfigdata*",
    "config-*/*",
    "sitecustomize.py",
    "usercustomize.py",
)
_TOPICS = "pydoc_data/topics.py"  # the language reference as one literal; the texts in it are read instead


@dataclass(frozen=True)
class Document:
    """One text. `source` is where it is, the same on every machine: its path inside the library, and its name if a file has many."""

    text: str
    source: str


def embedded_documents() -> list[Document]:
    """Return the documents of the embedded corpus, in a fixed order. Raise UserError if this machine has none."""
    root = Path(sysconfig.get_path("stdlib"))
    documents = [document for document in _standard_library(root) if document.text.strip()]
    if not documents:
        raise UserError(f"{root} does not contain the source code of Python's standard library. Give a corpus with --input.")
    return documents


def _standard_library(root: Path) -> Iterator[Document]:
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.suffix not in (".py", ".txt", ".rst") or _EXCLUDED_FOLDERS & set(inside.parts) or any(map(inside.match, _EXCLUDED_FILES)):
            continue
        if inside.as_posix() == _TOPICS:
            for name, text in sorted(topics.items()):
                yield Document(text, f"{_TOPICS}:{name}")
        elif path.is_file():
            try:
                yield Document(path.read_bytes().decode(), inside.as_posix())
            except UnicodeDecodeError:
                continue  # a file in another encoding, on purpose
