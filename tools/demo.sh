#!/usr/bin/env bash
# The main job, end to end: every kernel checked on this machine, a small model trained on real text, its pictures, its text.
set -euo pipefail
run=${RUN:-runs/demo}
start=$SECONDS
title() { printf '\n\033[1m== %s\033[0m\n' "$*"; }

title "1/4  Every kernel against the naive reference, on this machine"
pytransformer verify

title "2/4  Train a small transformer on the Python standard library's source"
pytransformer train --out "$run" --overwrite

title "3/4  Pictures"
pytransformer plot loss "$run" -o "$run/loss.png"
pytransformer plot attention "$run" --prompt 'def read(self, path):' -o "$run/attention.png"

title "4/4  Generate, through prefill and a KV cache"
pytransformer generate --model "$run" --prompt 'def ' --max-new-tokens 120 --temperature 0.7 --top-k 50 --seed 1

printf '\nDone in %d s. Pictures: %s/loss.png and %s/attention.png\n' $((SECONDS - start)) "$run" "$run"
