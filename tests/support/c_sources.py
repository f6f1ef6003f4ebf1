"""What C sources take from each other: by includes, by calls, and by uses of variables.

A header and the source file of the same name are one *file* here, named as the source file. It
takes from another if it includes its header, or mentions a function or a variable that the other
defines for all (without ``static``). A mention counts without an include, too: a prototype by hand
hides no arrow. Members (``carrier->end``), tags (``struct image``), comments and texts are no
mentions.

The reading is a simple one, for sources in the style of this project. No macro defines a function
that other files call. A local variable, or the declaration of a member, that has the name of
another file's function counts as a mention of it: give it another name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from .layers import Arrow

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
_NO_CODE = re.compile(
    r"""/\*.*?\*/ | //[^\n]* | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*'""",
    re.DOTALL | re.VERBOSE,
)
_DIRECTIVE = re.compile(r"^\s*#\s*(?:include|if|ifdef|ifndef|elif|else|endif|error)\b.*$", re.M)
_MENTION = re.compile(r"(?<![\w.])(?<!->)(?:\b(struct|union|enum)\s+)?\b([A-Za-z_]\w*)\b")


def read_edges(
    directory: Path, names: Iterable[str], generated: Mapping[str, str]
) -> dict[Arrow, set[str]]:
    """Arrows between these files of a directory, with the headers and the names taken.

    :param names: paths of all ``.c`` and ``.h`` files, from the directory on, with ``/``.
    :param generated: headers that a build makes, and the source file that each is made from.
    """
    names = sorted(names)
    texts = {name: (directory / name).read_text() for name in names}
    file_of = {name: _file_of(name, texts) for name in names}
    codes = {name: _code(text) for name, text in texts.items()}
    definers: dict[str, str] = {}
    own: dict[str, set[str]] = {file: set() for file in file_of.values()}
    for name, code in codes.items():
        for defined, for_all in _definitions(code):
            if for_all and defined != "main":  # which each program has, and nobody calls
                definers[defined] = file_of[name]
            own[file_of[name]].add(defined)

    edges: dict[Arrow, set[str]] = {}
    for name, code in codes.items():
        taker = file_of[name]
        for header in _INCLUDE.findall(texts[name]):
            giver = file_of.get(generated.get(header, header))
            if giver is None:
                raise ValueError(f"{name} includes {header}, which does not exist")
            if giver != taker:
                edges.setdefault((taker, giver), set()).add(header)
        for tag, mentioned in _MENTION.findall(_DIRECTIVE.sub("", code)):
            if not tag and mentioned in definers and mentioned not in own[taker]:
                edges.setdefault((taker, definers[mentioned]), set()).add(mentioned)
    return edges


def _file_of(name: str, texts: Mapping[str, str]) -> str:
    source = name.removesuffix(".h") + ".c"
    return source if name.endswith(".h") and source in texts else name


def _code(text: str) -> str:
    return _NO_CODE.sub(" ", re.sub(r"\\\n", " ", text))


def _definitions(code: str) -> Iterator[tuple[str, bool]]:
    """Functions and variables that are defined at the top level; whether all files see them."""
    code = re.sub(r"^\s*#.*$", "", code, flags=re.MULTILINE)
    for declaration, is_function in _top_level(code):
        words = re.findall(r"\w+", declaration)
        if words and words[0] not in ("extern", "typedef", "_Static_assert"):
            for name in _function(declaration) if is_function else _variables(declaration):
                yield name, "static" not in words


def _function(declaration: str) -> list[str]:
    return re.findall(r"(\w+)\s*\(", declaration)[:1]


def _variables(declaration: str) -> list[str]:
    if re.fullmatch(r"\s*(?:struct|union|enum)\s+\w+\s*(?:\{\}\s*)?", declaration):
        return []  # a type
    before_value, *_ = declaration.split("=")
    if "(" in before_value:  # a pointer to a function, or a prototype
        return re.findall(r"^[^(]*\(\s*\*\s*(?:const\s+)?(\w+)", before_value)
    declarators = re.sub(r"\{\}|\[[^\]]*\]", " ", declaration).split(",")
    return [re.findall(r"\w+", declarator.split("=")[0])[-1] for declarator in declarators]


def _top_level(code: str) -> Iterator[tuple[str, bool]]:
    """Declarations without what is in braces; whether each is a function with its body."""
    depth, declaration = 0, ""
    for char in code:
        if char == "}":
            depth -= 1
            if depth == 0:
                declaration += "}"
                if declaration.removesuffix("{}").rstrip().endswith(")"):
                    yield declaration.removesuffix("{}"), True
                    declaration = ""
            continue
        if char == "{":
            declaration += "{" if depth == 0 else ""
            depth += 1
        elif depth == 0 and char == ";":
            yield declaration, False
            declaration = ""
        elif depth == 0:
            declaration += char
    if depth:
        raise ValueError("braces that do not match")
