#!/usr/bin/env bash
# Everything that needs a GPU, in three groups of less than nine minutes each, the most important first:
#   speed      our throughput, a run of base on text that is killed and resumed, a profile
#   contracts  the tests with the marker `gpu`, kills compared bit by bit, the other objective, a fine-tuning
#   peers      throughput compared with peers, base and large
# Every part has its own time limit; a part that fails is named at the end and does not stop the others. After each part
# OUTPUT_FOLDER/GROUP.log and GROUP.tgz hold all small files, so a group that is cut off loses at most one part.
# Usage: benchmarks/gpu.sh GROUP [OUTPUT_FOLDER], where the package is installed or on PYTHONPATH; PYTHON is the interpreter.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
group=${1:?usage: benchmarks/gpu.sh speed|contracts|peers [OUTPUT_FOLDER]} output=${2:-runs/gpu}
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" output python
mkdir -p "$output" || exit 1
failed=()

keep() { # archive the small files of the output, atomically
  find "$output" -type f \( -name '*.log' -o -name '*.md' -o -name '*.jsonl' -o -name config.json -o -name results.json \
    -o -name micro_batch.json \) -size -2M -print0 | tar -czf "$output/$group.tgz.new" --null -T - &&
    mv "$output/$group.tgz.new" "$output/$group.tgz"
}

part() { # NAME SECONDS COMMAND...: what it prints goes to NAME.log, its end to GROUP.log
  local name=$1 seconds=$2 began=$SECONDS state=passed
  shift 2
  # Into a file, not a pipe: a process that it leaves behind would hold the pipe open.
  timeout --kill-after=5 "$seconds" "$@" >"$output/$name.log" 2>&1 || { state="FAILED ($?)" && failed+=("$name"); }
  {
    echo "== $name: $state, $((SECONDS - began)) s"
    tail -c 2500 "$output/$name.log"
    echo
  } | tee -a "$output/$group.log"
  keep
}

corpus() {
  [[ -d $output/data ]] && return
  "$python" -m preprocessing.cli train-tokenizer --input examples/corpus --vocab_size 8192 --output "$output/tokenizer" &&
    "$python" -m preprocessing.cli shard --input examples/corpus --tokenizer "$output/tokenizer" \
      --output "$output/data" --validation_fraction 0.05 --workers 2
}

base=("$python" launch/pretrain.py --deepspeed_config ds_configs/zero2.json --data_dir "$output/data"
  --output_dir "$output/base" --model base --train_batch_size 1024 --max_steps 12 --warmup_steps 3 --save_interval 4)

killed() { # run a command and kill it after its first checkpoint
  "$@" &
  local process=$!
  until [[ -e $output/base/checkpoints/latest ]]; do
    kill -0 "$process" 2>/dev/null || return 1
    sleep 0.5
  done
  kill -KILL "$process"
  wait "$process"
  [[ $? -eq 137 ]]
}

labelled() { # lines of a book, and whether they say "the"
  "$python" - "$output/labelled.jsonl" <<'END'
import json, pathlib, sys
lines = pathlib.Path("examples/corpus/ethan-frome.txt").read_text(encoding="utf-8").split("\n")
rows = ({"text": line, "label": int(" the " in line)} for line in lines if line.strip())
pathlib.Path(sys.argv[1]).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
END
}
export -f corpus killed labelled

throughput=("$python" -m benchmarks.throughput --max_seq_length 512 --rounds 3 --micro_batch_tokens 32768)

case $group in
speed)
  part device 10 nvidia-smi --query-gpu=name,memory.total,driver_version,clocks.sm --format=csv
  part corpus 30 bash -c corpus
  part throughput_text 150 "${throughput[@]}" --model base --data_dir "$output/data" --contenders ours-bf16 \
    ours-bf16-flat ours-bf16-whole ours-bf16-flat-whole --output "$output/throughput_text.md"
  part base_killed 90 bash -c 'killed "$@"' killed "${base[@]}"
  part base_resumed 110 "${base[@]}"
  part base_went_on 5 grep -q "resuming from" "$output/base_resumed.log"
  part throughput_full 40 "${throughput[@]}" --model base --contenders ours-bf16 --output "$output/throughput_full.md"
  part profile 90 "$python" -m benchmarks.profile --model base --max_seq_length 512 --output "$output/profile.md"
  ;;
contracts)
  part pytest 260 "$python" -m pytest -m gpu tests/distributed -p no:cacheprovider
  part corpus 30 bash -c corpus
  part fault_injection 110 "$python" -m benchmarks.fault_injection --kills 1 --signals 0 --targets pretraining \
    --processes 1 --results "$output/fault_injection"
  part rts 60 "$python" launch/pretrain.py --deepspeed_config ds_configs/zero2.json --data_dir "$output/data" \
    --output_dir "$output/rts" --objective rts --model base --train_batch_size 256 --max_steps 5 --warmup_steps 1 \
    --torch_compile off
  part labelled 5 bash -c labelled
  part finetune 60 "$python" launch/finetune.py --model "$output/rts/hf" --task classification --bf16 \
    --data "train=$output/labelled.jsonl" "validation=$output/labelled.jsonl" --num_train_epochs 1 \
    --output_dir "$output/tuned"
  ;;
peers)
  part corpus 30 bash -c corpus
  part throughput_base 250 "${throughput[@]}" --model base --data_dir "$output/data" \
    --contenders ours-bf16 run_mlm-bf16 run_mlm-bf16-compiled ours-fp16 --output "$output/throughput_base.md"
  part throughput_large 250 "${throughput[@]}" --model large --steps 10 --data_dir "$output/data" \
    --contenders ours-bf16 run_mlm-bf16 run_mlm-bf16-compiled --output "$output/throughput_large.md"
  ;;
*)
  echo "no group $group: give speed, contracts or peers"
  exit 2
  ;;
esac

if ((${#failed[@]})); then
  echo "FAILED: ${failed[*]} (logs are in $output)" | tee -a "$output/$group.log"
  exit 1
fi
echo "all parts of $group passed, in $SECONDS s" | tee -a "$output/$group.log"
