"""Each op's schema names the types that its C++ function takes and returns.

The stable ABI compares their number at the first call and their types never: a float that the function takes for an int64_t is its bits.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
# Of what a function takes or returns, what the schema may say.
TYPES = {
    "Tensor": {"Tensor"},
    "OptionalTensor": {"Tensor?"},
    "std::optional<Tensor>": {"Tensor?"},
    "int64_t": {"int", "SymInt"},
    "std::optional<int64_t>": {"int?", "SymInt?"},
    "double": {"float"},
    "std::optional<double>": {"float?"},
    "bool": {"bool"},
    "std::string": {"str"},
    "std::optional<ScalarType>": {"ScalarType?"},
}


def _sources() -> str:
    files = [*sorted(CSRC.rglob("ops.cpp")), CSRC / "register.cpp"]
    text = "\n".join(path.read_text() for path in files)
    return re.sub(r"//[^\n]*", "", text).replace("\\\n", " ")


def _schemas(source: str) -> dict[str, str]:
    """By the name of an op, its schema, with the macros put in."""
    macros = dict(re.findall(r"^#define (\w+) ([^\n]*)$", source, re.MULTILINE))

    def text(expression: str) -> str:
        parts = re.findall(r'"((?:[^"\\]|\\.)*)"|(\w+)', expression)
        return "".join(literal if not name else text(macros[name]) for literal, name in parts)

    schemas = [text(expression) for expression in re.findall(r"library\.def\((.*?)\);", source, re.DOTALL)]
    return {schema.split("(", 1)[0]: schema for schema in schemas}


def _split(arguments: str) -> list[str]:
    """By commas that stand in no brackets."""
    parts = [part.strip() for part in re.split(r",(?![^<(\[]*[>)\]])", arguments)]
    return [part for part in parts if part]


def _schema_types(schema: str) -> tuple[list[str], list[str]]:
    schema = re.sub(r"\([a-z]!\)", "", schema)
    match = re.fullmatch(r"\w+\((.*?)\) -> (.*)", schema)
    assert match is not None, schema
    taken = [argument.split(" ")[0] for argument in _split(match[1]) if argument != "*"]
    return taken, _split(match[2].strip("()"))


def _function_types(source: str, name: str) -> tuple[list[str], list[str]]:
    match = re.search(rf"^(?:inline |static )?([\w:<>, ]+?) {name}\(([^)]*)\) {{", source, re.MULTILINE)
    assert match is not None, f"no function {name}"
    taken = [re.sub(r"^const |&| \w+$", "", argument).strip() for argument in _split(" ".join(match[2].split()))]
    returned = match[1].removeprefix("std::tuple<").removesuffix(">") if match[1].startswith("std::tuple") else match[1]
    return taken, [] if returned == "void" else _split(returned)


def _differences(source: str) -> list[str]:
    schemas = _schemas(source)
    implemented = dict(
        re.findall(r'library\.impl\("(\w+)", TORCH_BOX\(&(?:pytransformer::)?(\w+)(?:<\w+>)?\)\)', source)
    )
    assert schemas.keys() == implemented.keys() and len(schemas) > 10
    found = []
    for op, function in implemented.items():
        for what, named, typed in zip(
            ("takes", "returns"), _schema_types(schemas[op]), _function_types(source, function)
        ):
            fits = len(named) == len(typed) and all(name in TYPES[kind] for name, kind in zip(named, typed))
            if not fits:
                found.append(f"{op} {what} {named}, and {function} {typed}")
    return found


def test_the_schema_of_each_op_is_that_of_its_function() -> None:
    assert _differences(_sources()) == []


@pytest.mark.parametrize(
    ("said", "instead", "op"),
    [
        ("float softmax_scale", "int softmax_scale", "attention_forward"),
        ("Tensor? sequence_offsets, SymInt", "Tensor sequence_offsets, SymInt", "rope"),
        ("Tensor? sequence_offsets, SymInt offset", "SymInt offset, Tensor? sequence_offsets", "rope"),
        ("float norm_eps, ", "", "kv_append"),
        ("TORCH_BOX(&rope_at_inplace)", "TORCH_BOX(&rope_at)", "rope_at_"),
    ],
)
def test_a_schema_that_says_another_type_is_found(said: str, instead: str, op: str) -> None:
    source = _sources()
    assert said in source
    found = _differences(source.replace(said, instead))
    assert any(difference.startswith(f"{op} ") for difference in found), found
