#!/usr/bin/env bash
# All checks that need a GPU, in under nine minutes: the contracts under the marker `gpu`, then a short run of base.
# Usage: benchmarks/gpu.sh [OUTPUT_FOLDER], where the package is installed or on PYTHONPATH.
set -euo pipefail
cd "$(dirname "$0")/.."
output=${1:-runs/gpu}
mkdir -p "$output"
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$output/device.csv"
python -m pytest -m gpu tests/distributed -p no:cacheprovider 2>&1 | tee "$output/pytest.log"
python -m preprocessing.cli train-tokenizer --input examples/corpus --vocab_size 8192 --output "$output/tokenizer"
python -m preprocessing.cli shard --input examples/corpus --tokenizer "$output/tokenizer" --output "$output/data" \
  --validation_fraction 0.05 --workers 2
python launch/pretrain.py --deepspeed_config ds_configs/zero2.json --data_dir "$output/data" --output_dir "$output/base" \
  --model base --train_batch_size 1024 --max_steps 20 --warmup_steps 5 2>&1 | tee "$output/base.log"
tail -n 3 "$output/base/metrics.jsonl"
