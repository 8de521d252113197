#!/usr/bin/env bash
# The main job on real data: trains configs/emoji_clip.py, evaluates it on pictures it has not seen, exports it to PyTorch both
# ways and checks the exports there. Usage: launch/emoji.sh [RUN] [--any.config.field VALUE ...]; RUN is runs/emoji unless given.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
run=runs/emoji
case "${1:-}" in "" | --*) ;; *) run=$1 && shift ;; esac
export PATH="$PWD/.venv/bin:$PATH"
export PYTHONPATH="$PWD/tests/shim${PYTHONPATH:+:$PYTHONPATH}" # lets open_clip load where torchvision's compiled part can't

step() { printf '\n\033[1m$ %s\033[0m\n' "$*" && "$@"; }
start=$SECONDS
step clipjax train configs/emoji_clip.py --workdir "$run" "$@"
step clipjax eval retrieval "$run" --data emoji --split test --json "$run/retrieval.json"
step clipjax eval zeroshot "$run" --data emoji --split test --templates plain --json "$run/zeroshot.json"
took=$((SECONDS - start))
for format in open_clip transformers; do
  step clipjax export "$run" --to "$format" --out "$run/$format" --verify
done
printf '\nTrained and evaluated in %d:%02d min. In %s:\n' $((took / 60)) $((took % 60)) "$run"
cat <<END
  checkpoints/, config.json, tokenizer.json   the run: \`clipjax train\` goes on from it, clipjax.load("$run") encodes with it
  metrics.jsonl, tensorboard/                 what it logged: tensorboard --logdir $run
  retrieval.json, zeroshot.json               how well it does on 363 combinations it has not seen
  open_clip/, transformers/                   the same weights for PyTorch, checked
END
