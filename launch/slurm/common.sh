# shellcheck shell=bash
# Functions of the job files. Each sources this by its absolute path, since SLURM runs a copy of the job file elsewhere.

readonly STOPPED=85 # exit code of a run that was asked to stop and has saved; started again, it continues

# record_start FOLDER: record what started and where, at every start of a requeued job.
# Variables whose names look like secrets stay out.
record_start() {
    mkdir -p "$1"
    cp "$0" "$1/job.sbatch"
    {
        echo "== start $((${SLURM_RESTART_COUNT:-0} + 1)) of job $SLURM_JOB_ID, $(date --iso-8601=seconds), on $(hostname)"
        echo "nodes: $SLURM_JOB_NODELIST"
        echo "commit: $(git -C "$REPOSITORY" describe --always --dirty 2>&1)"
        python --version
        python -c "from importlib.metadata import distributions
for found in distributions(): print(found.name, found.version, sep='==')" | grep -iE '^(torch|deepspeed|transformers|numpy|pyarrow)='
        nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null
        scontrol show job "$SLURM_JOB_ID"
        env --null | grep --null-data -viE '^[^=]*(key|token|secret|passw|credential)' | tr '\0' '\n'
    } >>"$1/environment.txt" 2>&1
}

# run_step FOLDER SRUN...: run a step to its end, and end the job with its exit code. When SLURM announces the end of
# the job's time or its preemption (USR1 or TERM), the ranks get USR1, save, and exit with 85: the job is then queued
# again. The folder is the job's own, for its logs.
run_step() {
    local step='' code interrupted signalled='' early="$1/ended_before_training"
    shift
    trap stop_step USR1 TERM # a TERM would end srun at once
    "$@" &
    step=$!
    [[ ! $signalled ]] || stop_step # the trap came before `step` was set
    while true; do
        interrupted=
        wait "$step"
        code=$?
        [[ $interrupted ]] || break # a trap ends `wait` before the step has ended
    done
    trap '' USR1 TERM
    # 138: ranks that had not begun to train died of the USR1 itself.
    if [[ $signalled && $code -eq 138 ]]; then
        echo "${SLURM_RESTART_COUNT:-0}" >>"$early"
        if (($(wc -l <"$early") >= 3)); then
            echo "three starts in a row ended before the training began: not queued again; give it more --time"
            exit "$code"
        fi
        code=$STOPPED
    else
        rm -f "$early"
    fi
    if [[ $code -eq $STOPPED ]]; then
        requeue
    fi
    exit "$code"
}

# The trap of run_step, with its variables. A process just forked still has this trap, which would swallow the signal.
stop_step() {
    interrupted=1 signalled=1
    sleep 0.2
    kill -USR1 "$step" 2>/dev/null
}

# Queue this job again, unless SLURM itself has ended it: cancelled, out of time, or requeued already.
requeue() {
    local state
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)
    if [[ $state == RUNNING ]]; then
        echo "stopped and saved: job $SLURM_JOB_ID is queued again"
        scontrol requeue "$SLURM_JOB_ID" || echo "it could not be queued again: submit the same file by hand"
    else
        echo "stopped; SLURM says that job $SLURM_JOB_ID is ${state:-gone}: not queued again"
    fi
}
