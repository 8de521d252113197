#!/usr/bin/env bash
# The main job on real data: trains emoji_clip, evaluates it on held-out images, exports it to PyTorch in both formats and checks
# the exports there. Usage: launch/emoji.sh [RUN] [--any.config.field VALUE ...]; the default of RUN is runs/emoji.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
run=runs/emoji
case "${1:-}" in "" | --*) ;; *) run=$1 && shift ;; esac
export PATH="$PWD/.venv/bin:$PATH"

step() { printf '\n\033[1m$ %s\033[0m\n' "$*" && "$@"; }
start=$SECONDS
step clipjax train emoji_clip --workdir "$run" "$@"
step clipjax eval retrieval "$run" --data emoji --split test --json "$run/retrieval.json"
step clipjax eval zeroshot "$run" --data emoji --split test --templates plain --json "$run/zeroshot.json"
took=$((SECONDS - start))
if ! python -c "import torchvision" 2>/dev/null; then # its compiled part does not load on every machine: open_clip then does without
  export PYTHONPATH="$PWD/tests/shim${PYTHONPATH:+:$PYTHONPATH}"
fi
for format in open_clip transformers; do
  step clipjax export "$run" --to "$format" --out "$run/$format" --verify
done
printf '\nTrained and evaluated in %d:%02d min. In %s:\n' $((took / 60)) $((took % 60)) "$run"
board="tensorboard --logdir $run"
command -v tensorboard >/dev/null || board="pip install tensorboard && $board"
cat <<END
  checkpoints/, config.json, tokenizer.json   the run: \`clipjax train\` resumes it, clipjax.load("$run") encodes with it
  metrics.jsonl, tensorboard/                 its log: $board
  retrieval.json, zeroshot.json               its results on 363 held-out combinations
  open_clip/, transformers/                   the same weights for PyTorch, checked
END
