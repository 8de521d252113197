#!/usr/bin/env bash
# The main job on real data: trains emoji_clip, evaluates it on held-out images, exports it to PyTorch in both formats and checks
# the exports there. Usage: launch/emoji.sh [RUN] [--any.config.field VALUE ...]; the default of RUN is runs/emoji.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
run=runs/emoji
case "${1:-}" in "" | --*) ;; *) run=$1 && shift ;; esac
export PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH="$PWD/tests/shim${PYTHONPATH:+:$PYTHONPATH}" # open_clip then loads also where the compiled part of torchvision does not

step() { printf '\n\033[1m$ %s\033[0m\n' "$*" && "$@"; }
start=$SECONDS
step clipjax train emoji_clip --workdir "$run" "$@"
step clipjax eval retrieval "$run" --data emoji --split test --json "$run/retrieval.json"
step clipjax eval zeroshot "$run" --data emoji --split test --templates plain --json "$run/zeroshot.json"
took=$((SECONDS - start))
for format in open_clip transformers; do
  step clipjax export "$run" --to "$format" --out "$run/$format" --verify
done
printf '\nTrained and evaluated in %d:%02d min. In %s:\n' $((took / 60)) $((took % 60)) "$run"
cat <<END
  checkpoints/, config.json, tokenizer.json   the run: \`clipjax train\` resumes it, clipjax.load("$run") encodes with it
  metrics.jsonl, tensorboard/                 its log: tensorboard --logdir $run
  retrieval.json, zeroshot.json               its results on 363 held-out combinations
  open_clip/, transformers/                   the same weights for PyTorch, checked
END
