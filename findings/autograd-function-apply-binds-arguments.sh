#!/usr/bin/env bash
# torch.autograd.Function.apply binds its arguments to the signature of forward at every call, if the class has a setup_context.
#
# Expected: the two documented styles of a custom Function (forward with ctx, or forward and setup_context apart) cost the same in eager
# mode, as apply only has to collect inputs and call into C++. What happens: with setup_context every call first goes through
# inspect.Signature.bind and apply_defaults, in Python, so that default values could be filled in, even when there are none. The style that
# torch.func asks for is therefore the slower one: for a Function of ten arguments the binding takes several times as long as everything else in apply.
# Why it matters: small fused ops (a norm, a rotation) are limited by the host; a third of the host's time of a norm's forward and backward
# pass was this. Source: torch/autograd/function.py, Function.apply and bind_default_args.
# Versions: torch 2.13.0, numpy 2.3.5, CPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip --quiet --disable-pip-version-check install torch==2.13.0 numpy==2.3.5
cat > "$folder/count.py" <<'PYTHON'
import sys
import timeit

import torch


class Together(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, a, b, c, d, e, f, g, h, i):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, *[None] * 9


class Apart(torch.autograd.Function):
    @staticmethod
    def forward(x, a, b, c, d, e, f, g, h, i):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    backward = Together.backward


def bindings(function, arguments):
    """How often inspect.Signature.bind runs during one call of apply."""
    seen = []

    def profile(frame, event, argument):
        if event == "call" and frame.f_code.co_name == "bind" and frame.f_code.co_filename.endswith("inspect.py"):
            seen.append(frame)

    sys.setprofile(profile)
    function.apply(*arguments)
    sys.setprofile(None)
    return len(seen)


arguments = (torch.zeros(1, requires_grad=True), *range(9))
counts = {kind.__name__: bindings(kind, arguments) for kind in (Together, Apart)}
print("torch", torch.__version__)
for kind in (Together, Apart):
    call = min(timeit.repeat(lambda: kind.apply(*arguments), number=1000, repeat=20)) * 1000
    print(f"{kind.__name__:9} Signature.bind calls per apply: {counts[kind.__name__]}   {call:.1f} µs per apply")
sys.exit(counts != {"Together": 0, "Apart": 1})
PYTHON
"$folder/venv/bin/python" "$folder/count.py"
