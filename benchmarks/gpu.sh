#!/usr/bin/env bash
# All checks that need a GPU, in under nine minutes: the contracts under the marker `gpu`, a run of base that is
# killed and goes on, kills compared bit by bit, throughput beside peers, the other objective, a fine-tuning, and a
# profile. Every part has a time limit of its own; one that fails is named at the end and stops no other.
# Usage: benchmarks/gpu.sh [OUTPUT_FOLDER], where the package is installed or on PYTHONPATH.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
output=${1:-runs/gpu}
mkdir -p "$output" || exit 1
failed=()

part() { # NAME SECONDS COMMAND...: what it prints goes to NAME.log too
  local name=$1 seconds=$2 began=$SECONDS
  shift 2
  echo "== $name"
  if timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee "$output/$name.log"; then
    echo "== $name: $((SECONDS - began)) s"
  else
    failed+=("$name")
    echo "== $name FAILED after $((SECONDS - began)) s"
  fi
}

base=(launch/pretrain.py --deepspeed_config ds_configs/zero2.json --data_dir "$output/data" --output_dir "$output/base"
  --model base --train_batch_size 1024 --max_steps 20 --warmup_steps 5 --save_interval 2)

killed() { # until its first checkpoint is whole
  python "${base[@]}" &
  local process=$!
  until [[ -e $output/base/checkpoints/latest ]]; do
    kill -0 "$process" 2>/dev/null || return 1
    sleep 0.5
  done
  kill -KILL "$process"
  wait "$process"
  [[ $? -eq 137 ]]
}
export -f killed
export output

labelled() { # lines of a book, and whether they say "the"
  python - "$output/labelled.jsonl" <<'END'
import json, pathlib, sys
lines = pathlib.Path("examples/corpus/ethan-frome.txt").read_text(encoding="utf-8").split("\n")
rows = ({"text": line, "label": int(" the " in line)} for line in lines if line.strip())
pathlib.Path(sys.argv[1]).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
END
}

part device 10 nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv
part tokenizer 15 python -m preprocessing.cli train-tokenizer --input examples/corpus --vocab_size 8192 \
  --output "$output/tokenizer"
part data 15 python -m preprocessing.cli shard --input examples/corpus --tokenizer "$output/tokenizer" \
  --output "$output/data" --validation_fraction 0.05 --workers 2
part base_killed 50 bash -c "$(declare -p base); killed"
part base_resumed 40 python "${base[@]}"
part base_went_on 5 grep -q "resuming from" "$output/base_resumed.log"
part throughput_base 80 python -m benchmarks.throughput --model base --max_seq_length 512 \
  --contenders run_mlm-bf16 run_mlm-bf16-compiled ours-fp16 ours-bf16 --output "$output/throughput_base.md"
part throughput_large 70 python -m benchmarks.throughput --model large --max_seq_length 512 \
  --contenders run_mlm-bf16 run_mlm-bf16-compiled ours-bf16 --output "$output/throughput_large.md"
part rts 25 python launch/pretrain.py --deepspeed_config ds_configs/zero2.json --data_dir "$output/data" \
  --output_dir "$output/rts" --objective rts --model base --train_batch_size 256 --max_steps 5 --warmup_steps 1 \
  --torch_compile off
part finetune 25 bash -c "$(declare -f labelled); labelled && python launch/finetune.py --model $output/rts/hf \
  --task classification --data train=$output/labelled.jsonl validation=$output/labelled.jsonl --bf16 \
  --num_train_epochs 1 --output_dir $output/tuned"
part profile 35 python -m benchmarks.profile --model base --max_seq_length 512
part pytest 120 python -m pytest -m gpu tests/distributed -p no:cacheprovider
part fault_injection 50 python -m benchmarks.fault_injection --kills 1 --processes 1

tail -n 3 "$output/base/metrics.jsonl"
if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]} (logs are in $output)"
  exit 1
fi
echo "all parts passed, in $SECONDS s; logs are in $output"
