#!/bin/sh
# Proves an installation, in an image or out of it, in a minute on CPUs: a tiny network is trained
# from scratch, goes on from its checkpoint, and draws. Needs nothing but the package.
#
#   sh docker/smoke.sh [FOLDER]
set -eu
# Here is no TPU and no machine that could be taken away: don't look for Google Cloud's metadata
# server, for which libtpu would wait minutes, nor for whoever else has loaded it.
export TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 NO_GCE_CHECK=true
folder=${1:-$(mktemp -d)}
train() {
    python -m trainer train --config=smoke --workdir="$folder/run" --strategy=cpu \
        --jit=off --set=model.channel_max=8 --set=telemetry.tick_kimg=0.032 \
        --set=run.precision=float32 --set=training.total_kimg="$1"
}
train 0.032
train 0.064
python -m trainer generate --run="$folder/run" --seeds=0-3 --out="$folder/out"
test -n "$(ls "$folder/out")"
grep -q '"nimg": 64' "$folder/run/stats.jsonl"
echo "smoke: trained, resumed and drawn in $folder"
