#!/usr/bin/env bash
# The newest releases that pyproject.toml allows work together: see usage.
set -euo pipefail

usage() {
  cat <<'END'
Usage: tests/newest.sh [--python PYTHON] [--verify] [PYTEST ARGUMENTS]

Makes an environment of the newest Python on this machine and the newest releases that pyproject.toml allows, in a temporary folder.
There, on eight simulated devices with mesh.fsdp 2, it trains a tiny run on emoji, resumes it, evaluates it and exports it.
It downloads some 400 MB. The end prints the versions; exit status 0 says that all of it worked.

  --python PYTHON    this interpreter: a path, a command, or a version such as 3.11 (of pyenv, on PATH or of uv)
  --verify           installs PyTorch too, and compares the exports with clipjax there
  PYTEST ARGUMENTS   also runs these tests of this checkout there, such as `tests`
END
}

pythons() { # all interpreters, a line each
  printf '%s\n' "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/python3
  compgen -c python3 | grep -x 'python3\(\.[0-9]*\)\?' | sort -u || true
  if command -v uv >/dev/null; then printf '%s\n' "$(uv python dir)"/*/bin/python3; fi
}

find_python() { # the newest final release from 3.11 on, or of version $1
  local candidate look='
import sys, ensurepip, venv
*version, level, _ = sys.version_info
if version >= [3, 11] and level == "final" and (".".join(map(str, version)) + ".").startswith(sys.argv[1]):
    print("{:03}{:03}{:03}".format(*version), sys.executable)'
  pythons | while read -r candidate; do "$candidate" -c "$look" "${1:+$1.}" 2>/dev/null || true; done | sort | tail -n 1 | cut -d ' ' -f 2-
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python='' extras=captions,gcs,s3 verify=()
while [ $# -gt 0 ]; do
  case "$1" in
    -h | --help) usage && exit ;;
    --python) python=${2:?--python: which one?} && shift 2 ;;
    --verify) extras+=,torch verify=(--verify) && shift ;;
    -*) echo "newest: $1: no such option; --help lists them" >&2 && exit 2 ;;
    *) break ;;
  esac
done
case "$python" in '' | 3.*) python=$(find_python "$python") ;; esac
if ! command -v "$python" >/dev/null; then
  echo "newest: no such Python, final and from 3.11 on, with venv; --python names another" >&2
  exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
step() { say "\$ $*" && "$@"; }

say "$("$python" --version), $python"
"$python" -m venv "$work/venv"
export PATH="$work/venv/bin:$PATH" JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8
if [ $# -gt 0 ]; then extras+=,test; fi
python -m pip install -qq --upgrade pip # the one that comes with Python 3.11 searches for minutes
python -m pip install -qq --no-compile "${root}[$extras]"
python -m pip check
cd "$work" # the program is the installed one, not the checkout's
step clipjax data prepare emoji

train=(clipjax train emoji_clip --workdir run --mesh.fsdp 2 --train.steps 8 --train.batch_size 64 --train.checkpoint_every 4
  --train.log_every 4 --optim.schedule.warmup 2 --evals.0.every 8 --model.image.depth 2 --model.text.depth 2 --model.unroll 2)
last() { grep '"loss"' run/metrics.jsonl | tail -n 1 | grep -oE '"(loss|grad_norm|param_norm)": [^,}]+'; }
step "${train[@]}"
last >straight
rm -r run/checkpoints/8 # as if the run had been killed
step "${train[@]}"
last >resumed
step diff straight resumed
step clipjax eval zeroshot run --data emoji --split test --templates plain --json zeroshot.json
step clipjax eval retrieval run --data emoji --split test --json retrieval.json
for format in open_clip transformers; do
  step clipjax export run --to "$format" --out "$format" ${verify[@]+"${verify[@]}"}
done

say 'What was exported can be read, and is finite:'
python - open_clip/open_clip_model.safetensors transformers/model.safetensors <<'END'
import sys
import numpy as np
from safetensors.numpy import load_file

for path in sys.argv[1:]:
    arrays = load_file(path)
    assert arrays and all(np.isfinite(array).all() for array in arrays.values()), path
    print(f"{path}: {len(arrays)} arrays, {sum(array.size for array in arrays.values()):,} numbers")
END

if [ $# -gt 0 ]; then (cd "$root" && step python -m pytest -p no:cacheprovider "$@"); fi
say "These work together on $(python --version):"
pip list --format freeze | grep -iE '^(jax|jaxlib|flax|optax|orbax-checkpoint|grain|tensorstore|numpy|torch|open_clip_torch|transformers)=='
