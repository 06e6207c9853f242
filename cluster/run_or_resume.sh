#!/usr/bin/env bash
# run_or_resume.sh SIZE NAME [key=value ...]: trains runs/SIZE.yaml as the run NAME. Where a run of that name was begun
# it goes on with it, which is what a job that is retried needs; a new NAME begins a new run.
set -euo pipefail
size=$1 name=$2
shift 2
runs=${RUNS_DIR:-/runs}
# Quoted: a value is YAML, in which 2 and true are no text.
command=(raygrpo train "$(dirname "$0")/runs/$size.yaml" "name='$name'" "output_dir=$runs" "$@")
if [ -e "$runs/$name-latest" ]; then
    command+=(--resume)
fi
exec "${command[@]}"
