#!/usr/bin/env bash
# The main job, end to end: every kernel checked on this machine, a small model trained on real text, its pictures, its text.
# A second run finds the trained model and does not train again (delete the run's folder to see it train).
set -euo pipefail
run=${RUN:-runs/demo}
start=$SECONDS
title() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

title "1/4  Every kernel against the naive reference, on this machine"
pytransformer verify

title "2/4  Train a small transformer on the Python standard library's source"
pytransformer train --out "$run" --resume

title "3/4  Draw where each head looks (training has drawn the loss, beside what counting words and pairs achieves)"
pytransformer plot attention "$run" -o "$run/attention.png"

title "4/4  Generate, through prefill and a KV cache"
pytransformer generate --model "$run" --prompt '    def __init__(self' --max-new-tokens 120 --temperature 0.7 --top-k 50 --seed 1
printf '\nThe five most probable next tokens, and their probabilities:\n'
pytransformer generate --model "$run" --prompt 'import' --top 5

printf '\nDone in %d s. Pictures: %s/loss.png and %s/attention.png\n' $((SECONDS - start)) "$run" "$run"
