#!/usr/bin/env bash
# torch.compile(fullgraph=True) traces operator.itemgetter only where it is constructed inside the traced function.
#
# Expected: an itemgetter, attrgetter or methodcaller is a plain callable without state that changes, so that one which a module made once at
# import (the usual way, as making it takes longer than calling it) is traced as well as one made inside. What happens: made inside it is
# replaced by torch's own polyfill and traced; made outside, the very same call is refused with "Unsupported method call ... __call__ of class
# itemgetter", and breaks the graph without fullgraph. Why it matters: code that keeps such a getter for speed in eager mode (a look-up of a
# call's arguments, a sort key) compiles no more, and the message suggests to "avoid calling" it, not to construct it where it is used.
# Source: torch/_dynamo/polyfills/operator.py, which replaces the classes; instances that exist already are unknown objects.
# Versions: torch 2.13.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.3.5
cat > "$folder/trace.py" <<'PYTHON'
import operator
import sys

import torch

pick = operator.itemgetter(0, 2)
transposed = operator.attrgetter("T")
total = operator.methodcaller("sum")

functions = {
    "itemgetter, made inside": lambda x: operator.itemgetter(0, 2)((x, x + 1, x + 2))[1],
    "itemgetter, made outside": lambda x: pick((x, x + 1, x + 2))[1],
    "attrgetter, made outside": lambda x: transposed(x) + 1,
    "methodcaller, made outside": lambda x: total(x) + 1,
}


def outcome(function):
    torch._dynamo.reset()
    try:
        torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(2, 3))
    except torch._dynamo.exc.Unsupported as error:
        return f"refused: {str(error).splitlines()[0]}"
    return "traced"


print("torch", torch.__version__)
outcomes = {name: outcome(function) for name, function in functions.items()}
for name, text in outcomes.items():
    print(f"{name:28} {text}")
sys.exit([text.split(":")[0] for text in outcomes.values()] != ["traced", "refused", "refused", "refused"])
PYTHON
"$folder/venv/bin/python" "$folder/trace.py"
